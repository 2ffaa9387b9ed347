"""Every k is rounded up to a multiple, or to n."""

import re

import numpy as np
import pytest
import torch
from helpers.oracle import assert_computes, chain, two_layers
from torch import nn
from torch.nn import functional

import taildropout as td
from taildropout.models.width import rounded_up

X = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rounded(n, k, multiple_of):
    """The smallest of 0, m, 2m, ... and n that is not below k."""
    return min(size for size in [*range(0, n, multiple_of), n] if size >= k)


def test_rounding_up_is_the_next_multiple_or_n():
    for n in range(14):
        for k in range(n + 1):
            for m in range(1, 16):
                assert rounded_up(k, m, n) == rounded(n, k, m)


@pytest.mark.parametrize(
    ("k", "becomes"),
    [(0, 0), (1, 4), (4, 4), (5, 8), (9, 10), (10, 10), (0.5, 8), (0.05, 4), (1.0, 10)],
)
def test_one_layer(k, becomes):
    model = chain(10, nn.Sigmoid()).double()
    small = td.prune(model, k, X, multiple_of=4)
    assert (small[0].out_features, small[3].in_features) == (becomes, becomes)
    assert_computes(small, model, {"1": becomes}, (3, 5), (7, 5))


@pytest.mark.parametrize("widths", [{"1": 1, "3.0": 3}, 0.5, {"*": 0.3}])
def test_several_layers(widths):
    model = two_layers().double()
    asked = td.plan_pruning(model, widths, X).k
    plan = td.plan_pruning(model, widths, X, multiple_of=4)
    assert plan.k == {name: rounded(plan.n[name], k, 4) for name, k in asked.items()}
    assert plan.asked == asked
    assert_computes(plan.apply(model), model, plan.k, (3, 5), (6, 5))


def test_the_ks_that_are_set():
    model = chain(10).double()
    model[1].set_k(3)
    small = td.prune(model, None, X, multiple_of=np.int64(8))
    assert small[0].out_features == 8
    assert model[1].k == 3


def test_a_plan_for_another_k_rounds_as_the_first_did():
    plan = td.plan_pruning(chain(10), 3, X.float(), multiple_of=4)
    assert plan.k == {"1": 4}
    assert plan.at(5).k == {"1": 8}
    assert plan.at(5, multiple_of=1).k == {"1": 5}
    assert plan.at(5, multiple_of=3).at(1).k == {"1": 3}
    assert [point.k for point in plan.sweep([1, 5, 10], repeats=1).points] == [4, 8, 10]


def test_the_summary_says_what_k_became():
    plan = td.plan_pruning(chain(10), 3, X.float(), multiple_of=4)
    head = "TailDropout '1': k = {} of 10 features{}"
    for k, line in {
        3: head.format(4, " (3 rounded up, multiple_of=4)"),
        8: head.format(8, ""),
        9: head.format(10, " (9 rounded up, multiple_of=4): nothing to remove"),
    }.items():
        assert plan.at(k).summary().splitlines()[0] == line


def test_a_k_above_n_is_refused_still():
    for k in (11, 12, 16):
        with pytest.raises(ValueError, match=f"at most the number of features n=10, got k={k}"):
            td.prune(chain(10), k, X.float(), multiple_of=4)


@pytest.mark.parametrize(
    ("multiple_of", "error", "words"),
    [
        (0, ValueError, "multiple_of must be at least 1, got 0"),
        (-8, ValueError, "multiple_of must be at least 1, got -8"),
        (2.0, TypeError, "multiple_of must be an int, got 2.0"),
        (True, TypeError, "multiple_of must be an int, got True"),
        ("8", TypeError, "multiple_of must be an int, got '8'"),
    ],
)
def test_what_is_no_count_is_refused(multiple_of, error, words):
    plan = td.plan_pruning(chain(10), 3, X.float())
    for use in (
        lambda: td.prune(chain(10), 3, X.float(), multiple_of=multiple_of),
        lambda: td.plan_pruning(chain(10), 3, X.float(), multiple_of=multiple_of),
        lambda: plan.at(3, multiple_of=multiple_of),
    ):
        with pytest.raises(error, match=re.escape(words)):
            use()


def test_a_budget_is_shared_out_in_multiples():
    model = nn.Sequential(
        *(nn.Linear(5, 20), td.TailDropout(), nn.Linear(20, 30)),
        *(td.TailDropout(), nn.Linear(30, 2)),
    )
    data = [(torch.randn(16, 5), torch.randn(16, 2))]

    def loss(output, target):
        return functional.mse_loss(output, target, reduction="none").mean(1)

    path = td.choose_widths(
        model, loss, data, 0.4, data[0][0][:2], steps=8, multiple_of=8, progress=False
    )
    assert path.steps[-1].cost <= 0.4 * path.steps[0].cost
    for step in path.steps:
        assert step.widths["1"] in (8, 16, 20)
        assert step.widths["3"] in (8, 16, 24, 30)
    small = td.prune(model, path.widths, data[0][0][:2])
    assert sum(p.numel() for p in small.parameters()) == path.steps[-1].cost
    with pytest.raises(ValueError, match=r"budget 0.1 is too small: layers of 8 features exceed"):
        td.choose_widths(model, loss, data, 0.1, data[0][0][:2], multiple_of=8)
