"""What each k costs, against networks that are pruned to it."""

import pytest
import torch
from helpers.oracle import chain, two_layers
from torch import nn
from torch.testing import assert_close

import taildropout as td
from taildropout import Scree
from taildropout.showing.plot import plot_sweep

X = torch.zeros(3, 5)


@pytest.fixture
def swept():
    model = chain(6)
    return model, td.plan_pruning(model, 2, X).sweep([1, 3, 6], repeats=2)


@pytest.fixture
def scree():
    loss = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    return Scree("1", [0, 1, 2, 3, 6], loss, 100, torch.eye(5).double())


def test_the_costs_are_those_of_the_pruned_networks(swept):
    model, sweep = swept
    assert [point.k for point in sweep.points] == [1, 3, 6]
    for point in sweep.points:
        small = td.prune(model, point.k, X)
        assert point.parameters == sum(p.numel() for p in small.parameters())
        assert point.flops == 2 * 3 * (5 * point.k + point.k * 3)
        assert point.seconds > 0


def test_the_table_has_losses_beside_the_costs(swept, scree):
    head, one, *_ = swept[1].table(scree).splitlines()
    assert head.split() == ["k", "loss", "parameters", "FLOPs", "ms"]
    assert one.split()[:6] == ["1", "3", "±", "0.1", "12", "48"]
    assert "loss" not in swept[1].table()


def test_the_plot_shows_loss_against_parameters(swept, scree):
    _, ax = plot_sweep(swept[1], scree)
    line = ax.lines[0]
    assert list(line.get_xdata()) == [12, 30, 57]
    assert_close(list(line.get_ydata()), [3.0, 1.0, 0.5], rtol=0, atol=0)
    assert [text.get_text() for text in ax.texts] == ["k = 1", "k = 3", "k = 6"]


def test_a_k_that_was_not_measured(swept):
    scree = Scree("1", [0, 6], torch.ones(2).double(), 9, torch.eye(2).double())
    with pytest.raises(ValueError, match=r"must have measured each k of the sweep, .* \[1, 3\]"):
        swept[1].table(scree)


def test_a_sweep_over_widths_finds_the_losses_at_them():
    model = two_layers()
    x = torch.randn(6, 5)
    curve = td.scree(model, nn.MSELoss(), [(x, model(x).detach())], layer="*", progress=False)
    sweep = td.plan_pruning(model, 0.5, x).sweep([0.25, 0.5, 1.0], repeats=1)
    assert [point.k for point in sweep.points] == [0.25, 0.5, 1.0]
    losses = [loss for loss, _ in sweep.losses(curve)]
    assert losses == [float(curve.loss[curve.ks.index(w)]) for w in (0.25, 0.5, 1.0)]
    assert "0.25" in sweep.table(curve)
