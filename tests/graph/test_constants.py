"""What features that are gone still contribute: the constants that biases take in."""

import pytest
import torch
from helpers.oracle import Net, as_trained, chain, convs
from torch import nn
from torch.testing import assert_close

import taildropout as td
from taildropout.graph.constants import Known


def folds(model, k, shape):
    return {
        fold.name: fold.constant for fold in td.plan_pruning(model, k, torch.randn(shape)).folds
    }


def shifted(m, x):
    return m.consumer((m.tail(m.producer(x)) * m.scale + m.shift) / m.temperature)


def norm_of_zero(norm):
    return norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()


@pytest.mark.parametrize("bias", [True, False])
def test_the_constant_of_a_sigmoid(bias):
    model = chain(4, nn.Sigmoid(), bias=bias)
    expected = 0.5 * model[-1].weight.double()[:, 2:].sum(1).detach()
    found = folds(model, {"1": 2}, (2, 5))
    assert_close(found, {"3.bias": expected}, rtol=1e-12, atol=1e-14)


def test_the_constant_of_a_shift():
    model = Net(shifted)
    expected = model.consumer.weight[:, 2:].double() @ (
        model.shift[0, 2:].double() / model.temperature.double()
    )
    found = folds(model, {"tail": 2}, (2, 5))
    assert_close(found, {"consumer.bias": expected.detach()}, rtol=1e-12, atol=1e-14)


def test_the_constant_of_a_batch_norm():
    model = as_trained(chain(4, nn.BatchNorm1d(4))).double()
    expected = model[-1].weight[:, 1:] @ norm_of_zero(model[2])[1:]
    found = td.plan_pruning(model, {"1": 1}, torch.randn(2, 5, dtype=torch.float64)).folds
    assert [fold.name for fold in found] == ["3.bias"]
    assert_close(found[0].constant, expected.detach(), rtol=1e-12, atol=1e-14)


def test_the_constant_in_a_convolution_counts_each_place_of_the_kernel():
    model = convs(nn.Sigmoid())
    expected = 0.5 * model[-1].weight.double()[:, 3:].sum((1, 2, 3)).detach()
    found = folds(model, {"1": 3}, (2, 2, 8, 8))
    assert_close(found, {"3.bias": expected}, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("behind", [nn.ReLU(), nn.Tanh(), nn.Hardshrink(), nn.BatchNorm1d(4)])
def test_nothing_is_folded_where_zero_stays_zero(behind):
    assert folds(chain(4, behind), {"1": 2}, (2, 5)) == {}


def known(*values):
    """None: unknown."""
    mask = torch.tensor([value is not None for value in values], dtype=torch.bool)
    return Known(mask, torch.tensor([value or 0.0 for value in values], dtype=torch.float64))


def as_list(found):
    pairs = zip(found.mask.tolist(), found.value.tolist(), strict=True)
    return [value if mask else None for mask, value in pairs]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_only_finite_numbers_are_known(value):
    """Infinity times a weight of zero is no number, so it can't be added to a bias."""
    found = Known.of(torch.ones(2, dtype=torch.bool), torch.tensor([value, 2.0]).double())
    assert as_list(found) == [None, 2.0]


@pytest.mark.parametrize(
    ("here", "labels", "there", "expected"),
    [
        ((1, 1, 2, 2), (0, 0, 1, 1), (1, 0), [2, 1]),
        ((1, 3, 2, 2), (0, 0, 1, 1), (0, 1), [None, 2]),  # of two values: none
        ((1, None, 2, 2), (0, 0, 1, 1), (0, 1), [None, 2]),  # all must be known
        ((0, None), (0, 0), (0,), [None]),
        ((1, 2), (0, 1), (-1, 1, 5), [None, 2, None]),  # what comes from nowhere
        ((1, 2), (-1, 1), (-1, 1), [None, 2]),  # what goes nowhere
        ((1, 2, 3), (0, 1, 2), (2, 2, 0), [3, 3, 1]),
        ((), (), (0,), [None]),
    ],
)
def test_what_passes_by_labels(here, labels, there, expected):
    labels, there = torch.tensor(labels, dtype=torch.int64), torch.tensor(there)
    assert as_list(known(*here).passed(labels, there)) == expected
