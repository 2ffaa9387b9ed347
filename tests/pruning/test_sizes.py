"""The sizes that modules hold beside their tensors, and those that code names."""

import pytest
import torch
from helpers.oracle import as_trained, assert_same, assert_same_outputs, chain, convs
from helpers.zoo.case import floats
from torch import nn

import taildropout as td
from taildropout import TailDropout


@pytest.mark.parametrize("d", [1, 2, 3])
def test_attributes_of_convolutions_and_norms(d):
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[d - 1]
    model = convs(norm(4, affine=False), nn.PReLU(4), before=[norm(4), nn.PReLU()], d=d)
    small = td.prune(as_trained(model), 3, torch.randn(2, 2, *[6] * d))
    first, before, prelu, _, behind, prelus, last = small
    assert (first.in_channels, first.out_channels) == (2, 3)
    assert (last.in_channels, last.out_channels) == (3, 3)
    assert (before.num_features, behind.num_features) == (3, 3)
    assert (prelu.num_parameters, prelus.num_parameters) == (1, 3)


def test_attributes_of_linears():
    small = td.prune(chain(4, nn.ReLU()), 3, torch.randn(2, 5))
    assert repr(small) == repr(chain(3, nn.ReLU()))


BUILDS = {
    "norms": lambda n: chain(n, nn.BatchNorm1d(n), nn.Sigmoid(), before=[nn.BatchNorm1d(n)]),
    "prelu": lambda n: chain(n, nn.PReLU(n), before=[nn.PReLU(n)]),
    "flatten": lambda n: nn.Sequential(
        nn.Conv2d(2, n, 3), TailDropout(dropout_dim=1), nn.Flatten(), nn.Linear(9 * n, 3)
    ),
}


@pytest.mark.parametrize("name", BUILDS)
def test_the_small_network_is_the_one_that_is_built_small(name):
    """Classes, sizes, attributes, keys and shapes; its weights load into it."""
    large, small = as_trained(BUILDS[name](4)), BUILDS[name](2)
    k = dict.fromkeys(td.tail_dropouts(large), 2)
    pruned = td.prune(large, k, torch.randn(2, *((2, 5, 5) if name == "flatten" else (5,))))
    assert repr(pruned) == repr(small)
    assert [type(m) for m in pruned.modules()] == [type(m) for m in large.modules()]
    assert list(pruned.state_dict()) == list(large.state_dict())
    small.load_state_dict(pruned.state_dict())
    assert_same(dict(small.state_dict()), dict(pruned.state_dict()))


class Named(nn.Module):
    """Weights of its own, and the numbers of their features."""

    def __init__(self, inner):
        super().__init__()
        self.hidden_dim, self.inner = 8, inner
        self.into, self.out = (
            nn.Parameter(torch.randn(8, inner)),
            nn.Parameter(torch.randn(inner, 3)),
        )

    def forward(self, x):
        return torch.relu(x.reshape(-1, self.hidden_dim) @ self.into) @ self.out


def test_the_features_that_a_module_names_beside_its_own_weights():
    model = nn.Sequential(nn.Linear(5, 8), TailDropout(), Named(12)).double()
    small = td.prune(model, 3, floats(2, 5))
    assert (small[2].hidden_dim, small[2].inner) == (3, 12)
    assert small[2].into.shape == (3, 12)
    assert_same_outputs(small, model, {"1": 3}, floats(4, 5))


def test_a_name_that_may_mean_other_features_too_is_left():
    """Of two sizes that were alike one has changed; what is reshaped by it stays then."""
    model = nn.Sequential(nn.Linear(5, 8), TailDropout(), Named(8)).double()
    small = td.prune(model, 3, floats(2, 5))
    assert small[2].hidden_dim == 8
    assert small[2].into.shape == (8, 8)
    assert_same_outputs(small, model, {"1": 3}, floats(4, 5))


# --------------------------------------------------------------------------- sizes written in code


class Written(nn.Module):
    """The code of forward names the width, which no cut of a tensor can change."""

    def __init__(self, split):
        super().__init__()
        self.split = split
        self.both = nn.Linear(5, 16)
        self.tail = TailDropout()
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        gate, value = self.split(self.both(x))
        return self.out(self.tail(torch.sigmoid(gate) * value))


def by_split(both):
    return both.split(8, dim=-1)


def by_view(both):
    return both.view(-1, 2, 8).unbind(1)


def by_slices(both):
    return both[:, :8], both[:, 8:]


@pytest.mark.parametrize("k", [1, 4, 7, 8])
@pytest.mark.parametrize("how", [by_split, by_view, by_slices])
def test_what_is_split_by_numbers_in_the_code_stays(how, k):
    model = Written(how).double()
    small = td.prune(model, k, floats(2, 5))
    assert_same_outputs(small, model, {"tail": k}, floats(4, 5))
    assert small.both.weight.shape == (16, 5)
    assert small.out.weight.shape == (3, k)
