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


# --- a layer's own -------------------------------------------------------------------------------


def in_groups_of(multiple_of, n):
    model = chain(n, nn.Sigmoid()).double()
    model[1].multiple_of = multiple_of
    return model


@pytest.mark.parametrize(
    ("k", "multiple_of", "becomes"),
    [(4, 1, 4), (0.3, 1, 4), (0.34, 1, 8), (1.0, 1, 12), (0.3, 6, 12), (4, 8, 8), (0.1, 3, 12)],
)
def test_a_layer_of_groups_is_cut_to_whole_ones(k, multiple_of, becomes):
    """Also with a `multiple_of` in the call: to a multiple of both."""
    model = in_groups_of(4, 12)
    small = td.prune(model, k, X, multiple_of=multiple_of)
    assert small[0].out_features == becomes
    assert_computes(small, model, {"1": becomes}, (3, 5), (7, 5))


def test_a_width_says_the_same_to_a_layer_of_groups_and_to_its_pruning():
    model = in_groups_of(4, 12).eval()
    for width in (0.01, 0.3, 0.34, 0.67, 1.0):
        with td.at_width(model, width):
            expected = model(X)
        torch.testing.assert_close(td.prune(model, width, X)(X), expected)


def test_groups_that_are_cut_through_are_refused():
    model = in_groups_of(4, 12)
    with pytest.raises(ValueError, match="k of layer '1' must be a multiple of multiple_of=4"):
        td.prune(model, 6, X)
    with pytest.raises(ValueError, match="must be a multiple of multiple_of=4, got n=10"):
        td.prune(in_groups_of(4, 10), 0.5, X)


def test_a_scree_of_groups_has_whole_ones():
    model, data = in_groups_of(4, 12), [(X, torch.randn(3, 3, dtype=torch.float64))]
    curve = td.scree(model, nn.MSELoss(), data, progress=False)
    assert curve.ks == [0, 4, 8, 12]
    assert td.scree(model, nn.MSELoss(), data, ks=[0.3, 1.0], progress=False).ks == [4, 12]
