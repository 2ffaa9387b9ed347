"""What the summary says goes, stays, and why."""

import io
import re

import pytest
import torch
from helpers.oracle import chain, two_layers
from torch import nn

import taildropout as td
from taildropout import TailDropout

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


FINITE = (
    "provided that all numbers inside the network are finite: zero times an infinite one is NaN"
)


def test_the_summary_counts_parameters_and_flops():
    model = nn.Sequential(
        nn.Conv2d(3, 100, 3),
        TailDropout(dropout_dim=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(400, 7),
    )
    plan = td.plan_pruning(model, 30, torch.randn(5, 3, 4, 4))
    # 3·9 products for each of 2·2 positions and channel, each channel read by 4·7 products.
    for cost, n in ((plan.before, 100), (plan.after, 30)):
        assert cost.parameters == n * 27 + n + 4 * n * 7 + 7
        assert cost.flops == 2 * 5 * (4 * n * 27 + 4 * n * 7)
    assert plan.summary().splitlines() == [
        "TailDropout '1': k = 30 of 100 features",
        "module  type    weights                            parameters      FLOPs",
        "0       Conv2d  100 x 3 x 3 x 3 -> 30 x 3 x 3 x 3  2,800 -> 840    108,000 -> 32,400",
        "4       Linear  7 x 400 -> 7 x 120                 2,807 -> 847    28,000 -> 8,400",
        "all                                                5,607 -> 1,687  136,000 -> 40,800",
        "4.bias takes in the constant of the columns that go",
        FINITE,
    ]


def test_the_summary_says_what_stays_and_why():
    model = nn.Sequential(nn.Linear(5, 4), TailDropout(), nn.LayerNorm(4))
    assert td.plan_pruning(model, 2, X).summary().splitlines()[-2] == (
        "behind '1' stays: layer_norm in module '2' subtracts the mean over all n features, zeros "
        "among them"
    )


def test_the_summary_says_which_norms_are_rescaled():
    model = nn.Sequential(nn.Linear(5, 4), TailDropout(), nn.RMSNorm(4), nn.Linear(4, 3))
    assert td.plan_pruning(model, 2, X).summary().splitlines()[-2] == (
        "2.weight takes in sqrt(4/2): the norm that it belongs to averages 2 features instead of 4"
    )


def test_rich_shows_the_summary_as_a_table():
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=120, record=True, file=io.StringIO())
    plan = td.plan_pruning(chain(4, nn.Sigmoid()), 2, X)
    console.print(plan)
    shown = console.export_text()
    for line in plan.summary().splitlines()[1:]:
        for cell in re.split(r"  +", line):
            assert cell in shown


def test_the_summary_says_where_nothing_goes():
    plan = td.plan_pruning(two_layers(), {"1": 4, "3.0": 5}, X)
    first, second, *_ = plan.summary().splitlines()
    assert first == "TailDropout '1': k = 4 of 4 features: nothing to remove"
    assert second == "TailDropout '3.0': k = 5 of 6 features"
