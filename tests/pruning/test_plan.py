"""The promise of pruning, the arguments, the record, and the file."""

import copy
import dataclasses
import io
import json
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.oracle import (
    Net,
    as_trained,
    assert_computes,
    assert_prunes,
    assert_same,
    chain,
    convs,
    masked,
    snapshot,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import relu
from torch.testing import assert_close

import taildropout as td
from taildropout import PruningError, TailDropout

# ------------------------------------------------------------------------------------ the promise

ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.ELU(),
    nn.ELU(inplace=True),
    nn.SELU(),
    nn.CELU(0.5),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.SiLU(),
    nn.SiLU(inplace=True),
    nn.Mish(),
    nn.Softplus(),
    nn.Softsign(),
    nn.Tanh(),
    nn.Tanhshrink(),
    nn.Sigmoid(),
    nn.LogSigmoid(),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.Hardtanh(0.25, 1.0),
    nn.LeakyReLU(0.3),
    nn.LeakyReLU(0.3, inplace=True),
    nn.PReLU(),
    nn.PReLU(4, init=-0.3),
    nn.Threshold(0.1, 2.0),
    nn.Threshold(0.1, 2.0, inplace=True),
    nn.Softshrink(),
    nn.Hardshrink(),
    nn.RReLU(),
    nn.Identity(),
    nn.Dropout(0.3),
    nn.Dropout(0.3, inplace=True),
    nn.AlphaDropout(0.3),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_elementwise_activation_before_and_behind_the_layer(activation):
    model = chain(4, copy.deepcopy(activation), before=[copy.deepcopy(activation)])
    for k in (0, 1, 3):
        assert_prunes(model, k, (3, 5), (1, 5), (7, 5))


@pytest.mark.parametrize("consumer_bias", [True, False])
@pytest.mark.parametrize("producer_bias", [True, False])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Sigmoid()], ids=str)
def test_every_k_with_and_without_biases(activation, producer_bias, consumer_bias):
    model = nn.Sequential(
        nn.Linear(5, 4, bias=producer_bias),
        TailDropout(),
        activation,
        nn.Linear(4, 3, bias=consumer_bias),
    )
    for k in range(5):
        assert_prunes(model, k, (3, 5), (1, 5), (7, 5))


NORMS = [
    ([nn.BatchNorm1d(4)], []),
    ([], [nn.BatchNorm1d(4)]),
    ([nn.BatchNorm1d(4)], [nn.BatchNorm1d(4)]),
    ([nn.BatchNorm1d(4, affine=False)], [nn.BatchNorm1d(4, affine=False), nn.GELU()]),
    ([nn.Tanh(), nn.BatchNorm1d(4)], [nn.BatchNorm1d(4), nn.Sigmoid(), nn.BatchNorm1d(4)]),
]


@pytest.mark.parametrize(("before", "behind"), NORMS, ids=str)
def test_batch_norm_with_trained_statistics(before, behind):
    model = as_trained(chain(4, *behind, before=before))
    for k in range(1, 5):
        assert_prunes(model, k, (3, 5), (1, 5), (7, 5))


def test_batch_norm_along_a_sequence():
    model = as_trained(
        nn.Sequential(
            nn.Conv1d(2, 4, 3),
            nn.BatchNorm1d(4),
            TailDropout(batch_dim=[0, 2], dropout_dim=1),
            nn.BatchNorm1d(4),
            nn.ELU(),
            nn.Conv1d(4, 2, 3),
        )
    )
    for k in range(1, 5):
        assert_prunes(model, k, (2, 2, 7), (3, 2, 9))


CONVS = {
    "1d": convs(nn.Sigmoid(), d=1),
    "2d": convs(nn.Sigmoid()),
    "3d": convs(nn.Sigmoid(), d=3),
    "stride": convs(nn.Sigmoid(), first={"stride": 2}, last={"stride": 2}),
    "dilation": convs(nn.Softplus(), first={"dilation": 2}, last={"dilation": 2}),
    "no bias": convs(nn.Sigmoid(), first={"bias": False}, last={"bias": False}),
    "padding": convs(nn.Tanh(), first={"padding": 1}, last={"padding": 1}),
    "same": convs(nn.GELU(), first={"padding": "same"}, last={"padding": "same"}),
    "same 1d": convs(d=1, first={"padding": "same"}, last={"padding": "same"}),
    "valid": convs(nn.Sigmoid(), first={"padding": "valid"}, last={"padding": "valid"}),
    "asymmetric": convs(nn.Sigmoid(), last={"kernel_size": (1, 3), "stride": (2, 1)}),
    "norm before": convs(nn.ReLU(), before=[nn.BatchNorm2d(4)], last={"padding": 1}),
    "norm behind": convs(nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
    "norm 3d": convs(nn.BatchNorm3d(4), d=3),
    "norm without affine": convs(nn.BatchNorm2d(4, affine=False), nn.Sigmoid()),
    "prelu": convs(nn.PReLU(4), before=[nn.PReLU(4)]),
    "dropout": convs(nn.Dropout2d(), nn.Sigmoid(), before=[nn.Dropout2d()]),
    "max": convs(nn.Sigmoid(), nn.MaxPool2d(2)),
    "max padding": convs(nn.Sigmoid(), nn.MaxPool2d(2, padding=1)),
    "max before": convs(nn.Sigmoid(), before=[nn.MaxPool2d(2, padding=1)]),
    "max 1d": convs(nn.Sigmoid(), nn.MaxPool1d(2), d=1),
    "max 3d": convs(nn.Sigmoid(), nn.MaxPool3d(2), d=3),
    "avg": convs(nn.Sigmoid(), nn.AvgPool2d(2)),
    "avg padding": convs(nn.Tanh(), nn.AvgPool2d(2, padding=1)),
    "avg padding left out": convs(
        nn.Sigmoid(), nn.AvgPool2d(2, padding=1, count_include_pad=False)
    ),
    "avg before": convs(nn.Sigmoid(), before=[nn.AvgPool2d(2, padding=1)]),
    "avg 1d": convs(nn.Sigmoid(), nn.AvgPool1d(2), d=1),
    "avg 3d": convs(nn.Sigmoid(), nn.AvgPool3d(2), d=3),
    "adaptive avg": convs(nn.Sigmoid(), nn.AdaptiveAvgPool2d(3)),
    "adaptive max": convs(nn.Sigmoid(), nn.AdaptiveMaxPool2d((3, 2))),
    "adaptive before": convs(nn.Sigmoid(), before=[nn.AdaptiveAvgPool2d(4)]),
}


@pytest.mark.parametrize("name", CONVS)
def test_convolutions_and_pooling(name):
    model = as_trained(copy.deepcopy(CONVS[name]))
    side = [10] * (next(p for p in model.parameters()).ndim - 2)
    for k in (1, 2, 4):
        assert_prunes(model, k, (2, 2, *side), (1, 2, *side), (3, 2, *side))


FLATTENED = {
    "behind": nn.Sequential(
        nn.Conv2d(2, 4, 3), TailDropout(dropout_dim=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(36, 3)
    ),
    "pooled": nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        TailDropout(dropout_dim=1),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3, bias=False),
    ),
    "unflattened": nn.Sequential(
        nn.Linear(50, 4),
        TailDropout(),
        nn.Sigmoid(),
        nn.Unflatten(1, (-1, 1, 1)),
        nn.Conv2d(4, 3, 1, bias=False),
    ),
}


@pytest.mark.parametrize("name", FLATTENED)
def test_reshaping_between_convolution_and_linear(name):
    model = as_trained(copy.deepcopy(FLATTENED[name]))
    shape = (50,) if name == "unflattened" else (2, 5, 5)
    for k in range(1, 5):
        assert_prunes(model, k, (2, *shape), (1, *shape), (3, *shape))


def test_channels_that_are_flattened_before_the_layer_go_whole():
    model = as_trained(
        nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            TailDropout(),
            nn.Softplus(),
            nn.Linear(36, 3),
        )
    )
    for channels in range(1, 5):
        small = assert_prunes(model, 9 * channels, (2, 2, 5, 5), (3, 2, 5, 5))
        assert small[0].weight.shape == (channels, 2, 3, 3)
        assert small[5].weight.shape == (3, 9 * channels)


@pytest.mark.parametrize("batch_dim", [0, 1, [0, 1], (), [1, 0]], ids=str)
def test_sequences(batch_dim):
    model = nn.Sequential(
        nn.Linear(5, 4), TailDropout(batch_dim=batch_dim), nn.Sigmoid(), nn.Linear(4, 3)
    )
    for k in range(5):
        assert_prunes(model, k, (2, 3, 5), (4, 1, 5), (1, 7, 5))


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Sigmoid()], ids=str)
def test_one_sample_without_a_batch_dim(activation):
    model = nn.Sequential(nn.Linear(5, 4), TailDropout(batch_dim=()), activation, nn.Linear(4, 3))
    for k in range(5):
        assert_prunes(model, k, (5,), (7, 5))


def test_nested_sequentials():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(5, 6), nn.Sequential(nn.Linear(6, 4), nn.ReLU())),
        nn.Sequential(nn.Sequential(TailDropout()), nn.Sequential(nn.Sigmoid(), nn.Linear(4, 3))),
    )
    for k in range(5):
        assert_prunes(model, k, (2, 5), (7, 5))


FORWARDS = {
    "scale and shift before": lambda m, x: m.consumer(
        m.tail(m.producer(x) * m.scale + m.shift - m.mean)
    ),
    "scale and shift behind": lambda m, x: m.consumer(
        (m.tail(m.producer(x)) * m.scale + m.shift - m.mean).tanh()
    ),
    "a scalar": lambda m, x: m.consumer((m.tail(m.producer(x)) / m.temperature + 0.3) ** 2),
    "a gate that broadcasts": lambda m, x: m.consumer(
        m.tail(m.producer(x) * m.gate(x).sigmoid()).relu()
    ),
    "two producers": lambda m, x: m.consumer(m.tail(relu(m.producer(x)) * m.other(x))),
    "the features with themselves": lambda m, x: m.consumer(
        (h := m.tail(m.producer(x))) * h.sigmoid() + h.exp()
    ),
    "where": lambda m, x: m.consumer(
        torch.where((h := m.tail(m.producer(x))) > 0, h, h.expm1() - 1).clamp(-2, 2)
    ),
    "two paths of the network": lambda m, x: m.consumer(m.tail(m.producer(x))) + m.gate(x),
    "twice, zero at zero": lambda m, x: (
        m.consumer(m.tail(m.producer(x)).relu()) - m.consumer(m.tail(m.producer(2 * x)).tanh())
    ),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_modules_that_users_write(name):
    model = Net(FORWARDS[name])
    for k in range(5):
        assert_prunes(model, k, (3, 5), (1, 5), (7, 5))


def test_a_consumer_that_is_called_twice_takes_in_its_constant_once():
    def forward(m, x):
        return sum(m.consumer(m.tail(m.producer(z)).sigmoid()) for z in (x, x.flip(0)))

    for k in range(5):
        assert_prunes(Net(forward), k, (3, 5), (7, 5))


def test_one_feature_can_go():
    model = nn.Sequential(nn.Linear(5, 1), TailDropout(), nn.Sigmoid(), nn.Linear(1, 3))
    for k in (0, 1):
        assert_prunes(model, k, (3, 5), (1, 5))


@pytest.mark.parametrize("batch", [1, 4, 5])
def test_sizes_that_coincide_are_not_confused(batch):
    model = nn.Sequential(nn.Linear(4, 4), TailDropout(), nn.Sigmoid(), nn.Linear(4, 4))
    for k in range(5):
        assert_prunes(model, k, (batch, 4), (3, 4))


DEEP = {"1": 3, "5": 2, "8": 4}


@pytest.mark.parametrize(
    "ks", [DEEP, {"1": 0, "5": 4, "8": 1}, {"5": 2}, {"1": 5, "8": 0}, dict.fromkeys(DEEP, 0)]
)
def test_several_layers_each_with_its_own_k(ks):
    model = as_trained(
        nn.Sequential(
            nn.Linear(5, 5),
            TailDropout(),
            nn.Sigmoid(),
            nn.Linear(5, 4),
            nn.Tanh(),
            TailDropout(),
            nn.GELU(),
            nn.Linear(4, 6),
            TailDropout(),
            nn.ELU(),
            nn.Linear(6, 2),
        )
    )
    assert_prunes(model, ks, (3, 5), (1, 5), (7, 5))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", range(5))
def test_a_linear_between_two_layers_takes_in_constants_and_loses_rows(bias, k):
    model = nn.Sequential(
        nn.Linear(5, 4),
        TailDropout(),
        nn.Sigmoid(),
        nn.Linear(4, 4, bias=bias),
        TailDropout(),
        nn.Linear(4, 2),
    )
    assert_prunes(model, {"1": 2, "4": k}, (3, 5), (7, 5))


@pytest.mark.parametrize("ks", [{"1": 3, "3": 1}, {"1": 1, "3": 3}, {"1": 2}, {"3": 2}], ids=str)
def test_two_layers_in_a_row(ks):
    model = nn.Sequential(
        nn.Linear(5, 4), TailDropout(), nn.Sigmoid(), TailDropout(), nn.Linear(4, 3)
    )
    assert_prunes(model, ks, (3, 5), (7, 5))


class LeNet(nn.Module):
    """Everything together: three layers, own parameters, pooling, flatten."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.tail1 = TailDropout(dropout_dim=1)
        self.pool = nn.MaxPool2d(2, padding=1)
        self.conv2 = nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.tail2 = TailDropout(dropout_dim=1)
        self.fc1 = nn.Linear(3 * 16, 5)
        self.tail3 = TailDropout()
        self.scale = nn.Parameter(torch.randn(5))
        self.fc2 = nn.Linear(5, 2)

    def forward(self, x):
        x = self.tail1(self.act(self.norm1(self.conv1(x))))
        x = self.tail2(self.conv2(self.pool(x)).sigmoid())
        x = self.fc1((x.tanh() + 0.5).flatten(1)) * self.scale + 1
        return self.fc2(self.tail3(x * x.sigmoid()) * self.scale)


def test_a_convolutional_network_with_three_layers():
    model = as_trained(LeNet())
    for ks in ({"tail1": 3, "tail2": 1, "tail3": 2}, {"tail1": 1, "tail3": 0}, {"tail2": 2}):
        assert_prunes(model, ks, (2, 1, 6, 6), (3, 1, 6, 6))


@st.composite
def chains(draw):
    """A random chain of Linears with one layer, its k, and the number of its features."""
    width = st.integers(2, 5)
    activation = st.sampled_from([nn.ReLU, nn.Sigmoid, nn.Softplus, nn.Mish, nn.Identity])
    modules, size, depth = [], 3, draw(st.integers(2, 4))
    place = draw(st.integers(0, depth - 2))
    for i in range(depth):
        new = draw(width)
        modules.append(nn.Linear(size, new, bias=draw(st.booleans())))
        size = new
        behind = [draw(activation)(), *([nn.BatchNorm1d(size)] if draw(st.booleans()) else [])]
        if i == place:
            behind.insert(draw(st.integers(0, len(behind))), TailDropout())
            k = draw(st.integers(1, size))
        modules += behind
    return modules, k


@settings(max_examples=30)
@given(chains())
@example(([nn.Linear(3, 2), TailDropout(), nn.Sigmoid(), nn.Linear(2, 2, bias=False)], 1))
def test_random_chains(drawn):
    modules, k = drawn
    assert_prunes(as_trained(nn.Sequential(*modules)), k, (3, 3), (1, 3), (6, 3))


# --------------------------------------------------------------------------- what the small one is


@pytest.mark.parametrize("k", [4, {"2": 4}])
def test_k_of_all_features_changes_nothing(k):
    model = as_trained(chain(4, nn.Sigmoid(), before=[nn.BatchNorm1d(4)]))
    plan = td.plan_pruning(model, k, torch.randn(2, 5))
    assert plan.cuts == plan.folds == []
    assert plan.before == plan.after
    assert_same(dict(plan.apply(model).state_dict()), dict(model.state_dict()))


def test_k_of_no_features_leaves_the_constant():
    model = chain(4, nn.Sigmoid()).double()
    small = td.prune(model, 0, torch.randn(2, 5, dtype=torch.float64))
    expected = 0.5 * model[-1].weight.sum(1) + model[-1].bias
    assert [tuple(p.shape) for p in small.parameters()] == [(0, 5), (0,), (3, 0), (3,)]
    output = small(torch.randn(7, 5, dtype=torch.float64))
    assert_close(output, expected.expand(7, 3), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "model",
    [convs(), convs(nn.MaxPool2d(2)), chain(4, nn.BatchNorm1d(4))],
    ids=["conv", "max", "bn"],
)
def test_where_torch_cannot_run_on_no_features_one_stays(model):
    shape = (2, 2, 8, 8) if isinstance(model[0], nn.Conv2d) else (2, 5)
    small = assert_prunes(as_trained(model), 0, shape)
    assert len(small[0].weight) in (0, 1)
    assert small[-1].weight.shape[1] == 1
    assert (small[1].width, small[1].size) == (0, 1)
    plan = td.plan_pruning(model, 0, torch.randn(shape, dtype=torch.float64))
    assert "can't be run by torch on no features" in plan.summary()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_stays_and_is_verified(dtype):
    model = chain(4, nn.Sigmoid(), bias=False).to(dtype)
    small = td.prune(model, 2, torch.randn(3, 5, dtype=dtype)).eval()
    x = torch.randn(7, 5, dtype=dtype)
    assert {t.dtype for t in small.state_dict().values()} == {dtype}
    rounding = 8 * torch.finfo(dtype).eps
    assert_close(small(x), masked(model, {"1": 2}, x), rtol=rounding, atol=rounding)


def test_a_model_that_insists_on_its_dtype_is_verified_in_it():
    model = Net(lambda m, x: m.consumer(m.tail(m.producer(x.float())).sigmoid()))
    small = td.prune(model, 2, torch.randn(3, 5)).eval()
    x = torch.randn(7, 5)
    assert_close(small(x), masked(model, {"tail": 2}, x), rtol=1e-5, atol=1e-6)


def test_the_layers_of_the_small_network_have_no_k_set():
    model = chain(4)
    model[1].set_k(2)
    small = td.prune(model, None, torch.randn(3, 5))
    assert small[1].k is None
    assert small.train()(torch.randn(50, 5)).shape == (50, 3)


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_kept(training):
    model = chain(4, nn.Sequential(nn.Dropout())).train(training)
    model[2].train(not training)
    small = td.prune(model, 2, torch.randn(3, 5))
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]


def test_the_small_network_trains_further():
    model = chain(6, nn.Tanh())
    small = td.prune(model, 3, torch.randn(2, 5)).train()
    x, y = torch.randn(64, 5), torch.randn(64, 3)
    optimizer = torch.optim.Adam(small.parameters(), lr=0.01)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (small.eval()(x) - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad.ne(0).any() for p in small.parameters())


def test_training_the_small_network_leaves_the_original_as_it_is():
    model = as_trained(chain(4, nn.Sigmoid(), before=[nn.BatchNorm1d(4)]))
    before = snapshot(model)
    small = td.prune(model, 2, torch.randn(2, 5)).train()
    small(torch.randn(8, 5)).square().sum().backward()
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.fill_(1)
    assert_same(snapshot(model), before | {"rng": torch.get_rng_state()})


def test_the_small_network_can_be_pruned_again():
    model = chain(6, nn.Sigmoid()).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    once = td.prune(model, 4, x)
    twice = td.prune(once, 2, x)
    assert once[0].weight.shape == (4, 5)
    assert twice[0].weight.shape == (2, 5)
    assert_computes(twice, model, {"1": 2}, (7, 5))


# --------------------------------------------------------------------------- the original is as was


def touched(model):
    """A model in a state that must all come back: modes, k, hooks, gradients, frozen parts."""
    model.register_forward_hook(lambda module, args, output: None)
    model[0].register_forward_pre_hook(lambda module, args: None)
    model.train()
    model[-1].eval()
    model[0].weight.requires_grad_(False)
    model[-1].weight.grad = torch.randn_like(model[-1].weight)
    td.tail_dropouts(model)["2"].set_k(1)
    return model


def test_the_original_is_untouched():
    model = touched(as_trained(chain(4, nn.Sigmoid(), before=[nn.BatchNorm1d(4)])))
    before = snapshot(model)
    td.prune(model, 2, torch.zeros(3, 5)).eval()
    assert_same(snapshot(model), before)


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class OfFour(nn.Module):
    def forward(self, x):
        if x.shape[-1] != 4:
            raise ValueError("must have 4 features")
        return x


@pytest.mark.parametrize(
    ("behind", "k", "error", "words"),
    [
        (Branch(), 2, PruningError, "exporting it failed"),
        (OfFour(), 2, PruningError, "the pruned network does not run"),
        (nn.Sigmoid(), 5, ValueError, "k must be at most the number of features n=4"),
    ],
    ids=["analysis", "run", "k"],
)
def test_the_original_is_untouched_when_pruning_fails(behind, k, error, words):
    model = touched(as_trained(chain(4, behind, before=[nn.BatchNorm1d(4)])))
    before = snapshot(model)
    with pytest.raises(error, match=words):
        td.prune(model, k, torch.zeros(3, 5))
    assert_same(snapshot(model), before)


def test_a_buffer_that_counts_calls_is_untouched():
    def forward(m, x):
        m.mean.add_(1)
        return m.consumer(m.tail(m.producer(x)))

    model = Net(forward)
    before = model.mean.clone()
    td.prune(model, 2, torch.randn(3, 5))
    assert_close(model.mean, before, rtol=0, atol=0)


def test_example_inputs_are_untouched_by_a_model_that_changes_its_input_in_place():
    model = nn.Sequential(nn.ELU(inplace=True), *chain(4))
    x = torch.randn(3, 5)
    before = x.clone()
    td.prune(model, 2, x)
    assert_close(x, before, rtol=0, atol=0)


# ------------------------------------------------------------------------------------- arguments


def two_layers():
    return nn.Sequential(
        nn.Linear(5, 4),
        TailDropout(),
        nn.Linear(4, 6),
        nn.Sequential(TailDropout(), nn.Linear(6, 2)),
    )


X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("k", [2, {"1": 2}, np.int64(2), {"1": np.int32(2)}], ids=repr)
def test_k_is_an_int_or_a_dict(k):
    plan = td.plan_pruning(chain(4), k, X)
    assert plan.k == {"1": 2}
    assert plan.n == {"1": 4}


def test_k_none_means_the_ks_that_are_set():
    model = two_layers()
    model[3][0].set_k(3)
    assert td.plan_pruning(model, None, X).k == {"3.0": 3}
    model[1].set_k(1)
    plan = td.plan_pruning(model, None, X)
    assert plan.k == {"1": 1, "3.0": 3}
    assert plan.n == {"1": 4, "3.0": 6}


def test_a_layer_without_a_k_stays_whole():
    model = two_layers()
    small = td.prune(model, {"3.0": 3}, X)
    assert [tuple(p.shape) for p in small.parameters()] == [
        (4, 5),
        (4,),
        (3, 4),
        (3,),
        (2, 3),
        (2,),
    ]


BAD_KS = [
    (5, ValueError, "k must be at most the number of features n=4, got k=5"),
    ({"1": 5}, ValueError, "k must be at most the number of features n=4, got k=5"),
    (-1, ValueError, "k must be at least 0, got -1 for layer '1'"),
    (2.0, ValueError, r"a fraction of the features must be in \(0, 1\], got 2.0 for layer '1'"),
    (True, TypeError, "k must be an integer or an integer tensor, got True"),
    ("2", TypeError, "k must be an integer or an integer tensor, got '2'"),
    ({"1": None}, TypeError, "k must be an integer or an integer tensor, got None"),
    (torch.tensor([1, 2]), TypeError, "k must be one int for all samples, got .* layer '1'"),
    ({"0": 2}, ValueError, r"k must name TailDropout layers of the model, \['1'\], got \['0'\]"),
    ({"a": 2, "1": 2}, ValueError, r"of the model, \['1'\], got \['a'\]"),
    (None, ValueError, r"k=None prunes to the ks that are set, and none is: call set_k\(k\)"),
]


@pytest.mark.parametrize(("k", "error", "words"), BAD_KS)
def test_bad_ks(k, error, words):
    with pytest.raises(error, match=words):
        td.plan_pruning(chain(4), k, X)


def test_a_set_tensor_is_not_one_k_for_all_samples():
    model = chain(4)
    model[1].set_k(torch.tensor([1, 2, 3]))
    with pytest.raises(
        TypeError, match=r"k must be one int for all samples, got tensor.* layer '1'"
    ):
        td.plan_pruning(model, None, X)


def test_several_layers_need_a_dict():
    with pytest.raises(ValueError, match=r"several TailDropout layers, .* dict: \['1', '3.0'\]"):
        td.plan_pruning(two_layers(), 2, X)


@pytest.mark.parametrize("k", [2, None, {"1": 2}])
def test_a_model_without_layers(k):
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="must contain a TailDropout layer to be pruned"):
        td.plan_pruning(model, k, X)


class Keywords(nn.Module):
    """Two inputs, one of them integers, and a flag; two outputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.body = chain(4, nn.Sigmoid())

    def forward(self, tokens, x, double=False):
        h = self.body(self.embed(tokens) + x)
        return {"once": h, "both": [h, 2 * h if double else h]}


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_example_inputs_are_several_positional_or_named(kind):
    model = Keywords().double()
    tokens, x = torch.tensor([1, 6, 3]), torch.randn(3, 5, dtype=torch.float64)
    inputs = {"tokens": tokens, "x": x, "double": True}
    small = td.prune(model, 2, inputs if kind is dict else kind(inputs.values())).eval()
    new = (torch.tensor([0, 2, 4, 5]), torch.randn(4, 5, dtype=torch.float64), True)
    expected = masked(model, {"body.1": 2}, *new)
    with torch.no_grad():
        assert_close(small(*new), expected, rtol=1e-10, atol=1e-12)


def test_example_inputs_must_hold_a_sample():
    with pytest.raises(PruningError, match="example inputs must hold at least one sample"):
        td.plan_pruning(chain(4, nn.Sigmoid()), 2, torch.randn(0, 5))


# ------------------------------------------------------------------------------------ the summary


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flops_count_recurrent_layers_and_attention(dtype):
    model = nn.Sequential(
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
        TailDropout(),
        nn.LSTM(16, 8, num_layers=2, bidirectional=True, batch_first=True),
    )
    model = model.to(dtype).eval()
    plan = td.plan_pruning(model, 4, torch.randn(2, 5, 16, dtype=dtype))
    projections, pairs, feed_forward = 4 * 16 * 16, 2 * 5 * 16, 2 * 16 * 32
    encoder = 10 * (projections + pairs + feed_forward)

    def lstm(n):
        return 10 * 2 * 4 * (8 * (n + 8) + 8 * (16 + 8))

    assert plan.before.flops == 2 * (encoder + lstm(16))
    assert plan.after.flops == 2 * (encoder + lstm(4))


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
    ]


def test_the_summary_says_what_stays_and_why():
    model = nn.Sequential(nn.Linear(5, 4), TailDropout(), nn.LayerNorm(4))
    assert td.plan_pruning(model, 2, X).summary().splitlines()[-1] == (
        "behind '1' stays: layer_norm in module '2' needs all features at once, or is not supported"
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


def test_the_record_is_plain_data():
    plan = td.plan_pruning(chain(4, nn.Sigmoid()), 2, X)
    record = plan.to_dict()
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "format": 1,
        "k": {"1": 2},
        "n": {"1": 4},
        "cuts": [
            ["0.weight", 0, 4, [0, 1]],
            ["0.bias", 0, 4, [0, 1]],
            ["3.weight", 1, 4, [0, 1]],
        ],
        "biases": ["3.bias"],
        "fits": [],
    }


# ------------------------------------------------------------------------------- the verification


def with_cuts(plan, change):
    return dataclasses.replace(plan, cuts=[change(cut) for cut in plan.cuts])


PLANTED = {
    "the first rows go, not the last": lambda p: with_cuts(
        p, lambda cut: dataclasses.replace(cut, keep=(2, 3))
    ),
    "wrong columns": lambda p: with_cuts(
        p, lambda cut: dataclasses.replace(cut, keep=(1, 0) if cut.dim else cut.keep)
    ),
    "no constant": lambda p: dataclasses.replace(p, folds=[]),
    "a constant that is off by a millionth": lambda p: dataclasses.replace(
        p, folds=[dataclasses.replace(f, constant=f.constant * (1 + 1e-6)) for f in p.folds]
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_plan_is_caught(name):
    model = chain(4, nn.Sigmoid())
    wrong = PLANTED[name](td.plan_pruning(model, 2, X))
    before = snapshot(model)
    with pytest.raises(PruningError, match=r"must compute what .* with k=\{'1': 2\}, but differs"):
        wrong.apply(model)
    assert_same(snapshot(model), before)


def test_a_wrong_analysis_is_caught(monkeypatch):
    plan_module = "taildropout.pruning.plan"
    honest = td.pruning.plan.analyse

    def lying(*args, **options):
        found = honest(*args, **options)
        cuts = [dataclasses.replace(cut, keep=(1, 2)) for cut in found.cuts]
        return dataclasses.replace(found, cuts=cuts)

    monkeypatch.setattr(f"{plan_module}.analyse", lying)
    with pytest.raises(PruningError, match="but differs by up to"):
        td.prune(chain(4), 2, X)


def test_inputs_that_hide_a_wrong_cut_are_not_relied_on():
    """On zeros, without biases, any two rows give the same: random inputs tell."""
    model = chain(4, bias=False)
    plan = td.plan_pruning(model, 2, torch.zeros(3, 5))
    wrong = with_cuts(plan, lambda cut: dataclasses.replace(cut, keep=(2, 3)))
    with pytest.raises(PruningError, match="but differs by up to"):
        wrong.apply(model)


def test_weights_that_changed_since_planning_are_caught():
    model = chain(4, nn.Sigmoid())
    plan = td.plan_pruning(model, 2, X)
    with torch.no_grad():
        model[-1].weight[:, 3] += 1
    with pytest.raises(
        PruningError, match="the weights have changed since plan_pruning, plan again"
    ):
        plan.apply(model)


def test_the_module_that_differs_first_is_named():
    model = nn.Sequential(nn.Linear(5, 4), TailDropout(), nn.Linear(4, 4), nn.Linear(4, 3))
    plan = td.plan_pruning(model, 2, X)
    wrong = dataclasses.replace(
        plan, cuts=[dataclasses.replace(cut, keep=(2, 3)) for cut in plan.cuts]
    )
    with pytest.raises(PruningError, match=r"k=\{'1': 2\}.* first in the output of module '2'"):
        wrong.apply(model)


class ForTwo(nn.Module):
    """Cut wrongly, it is right for batches of two samples."""

    def forward(self, x):
        return x if len(x) == 2 else 2 * x


def test_other_batch_sizes_are_verified(monkeypatch):
    model = nn.Sequential(*chain(4), ForTwo())
    plan = td.plan_pruning(model, 2, torch.zeros(2, 5))
    cut_copy = type(plan)._cut_copy

    def wrong(plan, model):
        small = cut_copy(plan, model)
        small[-1].forward = lambda x: x
        return small

    monkeypatch.setattr(type(plan), "_cut_copy", wrong)
    with pytest.raises(PruningError, match="differs by up to"):
        plan.apply(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verification_in_a_dtype_that_is_asked_for(dtype):
    seen = []
    model = chain(4)
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    plan = td.plan_pruning(model, 2, X)
    seen.clear()
    plan.apply(model, dtype=dtype)
    assert set(seen) == {dtype}


def test_a_cut_of_one_side_only_is_caught():
    model = chain(4)
    plan = td.plan_pruning(model, 2, X)
    wrong = dataclasses.replace(plan, cuts=plan.cuts[:2])
    with pytest.raises(PruningError, match=r"the pruned network does not run: .*shapes"):
        wrong.apply(model)


OTHERS = [
    (chain(5), r"the plan cuts '0.weight' of size 4 along dim 0, and .* shape \(5, 5\)"),
    (nn.Sequential(nn.Linear(5, 4)), "the plan cuts '3.weight' .* has none"),
]


@pytest.mark.parametrize(("other", "words"), OTHERS, ids=["width", "depth"])
def test_a_plan_for_another_model(other, words):
    plan = td.plan_pruning(chain(4, nn.Sigmoid()), 2, X)
    with pytest.raises(PruningError, match=words):
        plan.apply(other)


def test_one_plan_serves_a_model_trained_further():
    """Without constants nothing of the weights is in the plan."""
    model = chain(4, nn.Tanh()).double()
    plan = td.plan_pruning(model, 2, X.double())
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    assert_computes(plan.apply(model), model, {"1": 2}, (7, 5))


# --------------------------------------------------------------------------------------- the file


def fresh(dtype=torch.float32):
    """A model that is cut in Linear and BatchNorm and whose last Linear gets a bias."""
    return nn.Sequential(
        nn.Linear(5, 4),
        nn.BatchNorm1d(4),
        TailDropout(),
        nn.BatchNorm1d(4),
        nn.Sigmoid(),
        nn.Linear(4, 3, bias=False),
    ).to(dtype)


@pytest.fixture
def saved(tmp_path):
    """A pruned model, its plan, and its file."""
    model = as_trained(fresh())
    plan = td.plan_pruning(model, 2, X)
    small, path = plan.apply(model), tmp_path / "small.safetensors"
    td.save_pruned(small, plan, path)
    return small, plan, path


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_saved_network_comes_back_bit_for_bit(dtype, k, tmp_path):
    model, x = as_trained(fresh(dtype)), X.to(dtype)
    plan = td.plan_pruning(model, k, x)
    small, path = plan.apply(model).eval(), tmp_path / "small.safetensors"
    td.save_pruned(small, plan, path)
    shell = fresh(dtype).eval()
    loaded = td.load_pruned(shell, path)
    assert loaded is shell
    assert_same(dict(loaded.state_dict()), dict(small.state_dict()))
    assert ("5.bias" in loaded.state_dict()) == (k < 4)
    assert repr(loaded) == repr(small)
    assert_close(loaded(x), small(x), rtol=0, atol=0)


def test_no_features_can_be_saved(tmp_path):
    model, path = chain(4, nn.Sigmoid()), tmp_path / "small.safetensors"
    plan = td.plan_pruning(model, 0, X)
    small = plan.apply(model)
    td.save_pruned(small, plan, path)
    loaded = td.load_pruned(chain(4, nn.Sigmoid()), path)
    assert_same(dict(loaded.state_dict()), dict(small.state_dict()))


def test_several_layers_are_saved(tmp_path):
    model, path = as_trained(LeNet()), tmp_path / "small.safetensors"
    plan = td.plan_pruning(model, {"tail1": 3, "tail2": 1, "tail3": 2}, torch.randn(2, 1, 6, 6))
    small = plan.apply(model)
    td.save_pruned(small, plan, path)
    assert_same(dict(td.load_pruned(LeNet(), path).state_dict()), dict(small.state_dict()))


def test_what_is_saved_are_the_weights_now(saved):
    """A small network that was trained further, or that lies in memory in another order."""
    small, plan, path = saved
    with torch.no_grad():
        small[0].weight.normal_()
        small[-1].weight.data = torch.randn(2, 3).t()
    td.save_pruned(small, plan, str(path))
    assert_same(dict(td.load_pruned(fresh(), str(path)).state_dict()), dict(small.state_dict()))


def test_the_loaded_network_trains(saved):
    small, _, path = saved
    loaded = td.load_pruned(fresh(), path)
    loaded(torch.randn(8, 5)).square().sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in small.named_parameters()}


def test_the_model_that_is_loaded_into_keeps_its_dtype(saved):
    small, _, path = saved
    loaded = td.load_pruned(fresh(torch.float64), path)
    assert loaded[0].weight.dtype == loaded[-1].weight.dtype == torch.float64
    assert loaded[-1].bias.dtype == torch.float64
    assert_close(loaded[-1].bias, small[-1].bias.double(), rtol=0, atol=0)


def parse(data):
    """A safetensors file by hand: its header, and the bytes of its tensors."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def test_the_file_is_json_and_numbers(saved):
    small, plan, path = saved
    header, body = parse(path.read_bytes())
    record = json.loads(header.pop("__metadata__")["taildropout"])
    assert record["format"] == 1
    assert {key: record[key] for key in plan.to_dict()} == plan.to_dict()
    assert header.keys() == small.state_dict().keys()
    assert len(body) == sum(t.nbytes for t in small.state_dict().values())
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        dtype = {"F32": np.float32, "I64": np.int64}[entry["dtype"]]
        found = torch.tensor(np.frombuffer(body[start:end], dtype)).reshape(entry["shape"])
        assert_close(found, small.state_dict()[name], rtol=0, atol=0)


def rewrite(path, change):
    """Change the plan in a file, and nothing else in it."""
    header, body = parse(path.read_bytes())
    record = json.loads(header["__metadata__"]["taildropout"])
    header["__metadata__"]["taildropout"] = json.dumps(change(record))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


class Payload:
    """Deletes the folder's files when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.unlink, (Path(self.path),)


DAMAGES = {
    "truncated": (truncate, "not a whole safetensors file"),
    "a changed byte": (flip, "has been changed since it was written"),
    "garbage": (lambda p: p.write_bytes(b"garbage" * 99), "not a whole safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), "not a whole safetensors file"),
    "a pickle": (
        lambda p: p.write_bytes(pickle.dumps(Payload(p))),
        "not a whole safetensors file",
    ),
    "no plan": (
        lambda p: save_file(load_file(p), p),
        "was not written by save_pruned: it holds no plan",
    ),
    "newer": (
        lambda p: rewrite(p, lambda r: r | {"format": 2}),
        "has format 2, .* reads up to 1: update taildropout",
    ),
    "no format": (
        lambda p: rewrite(p, lambda r: {k: v for k, v in r.items() if k != "format"}),
        "holds a damaged plan: KeyError.*format",
    ),
    "a plan that is a list": (lambda p: rewrite(p, list), "holds a damaged plan"),
    "no cuts": (
        lambda p: rewrite(p, lambda r: {k: v for k, v in r.items() if k != "cuts"}),
        "holds a damaged plan",
    ),
    "cuts that are none": (
        lambda p: rewrite(p, lambda r: r | {"cuts": [["0.weight"]]}),
        "holds a damaged plan",
    ),
    "a cut out of range": (
        lambda p: rewrite(p, lambda r: r | {"cuts": [["0.weight", 0, 4, [0, 9]]]}),
        "holds a damaged plan",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_leaves_the_model_untouched(name, saved):
    *_, path = saved
    damage, words = DAMAGES[name]
    damage(path)
    model = fresh()
    before = snapshot(model)
    with pytest.raises(PruningError, match=words) as caught:
        td.load_pruned(model, path)
    assert str(path) in str(caught.value)
    assert path.exists()
    assert_same(snapshot(model), before)


def wider():
    return nn.Sequential(*fresh()[:-1], nn.Linear(4, 9, bias=False))


ANOTHER = {
    "width": (lambda: chain(5, nn.Sigmoid()), r"cuts '0.weight' of size 4 .* shape \(5, 5\)"),
    "names": (lambda: nn.Sequential(fresh()), "cuts '0.weight' of size 4 .* none"),
    "an uncut dim": (wider, "these tensors differ: 5.weight"),
    "more": (lambda: fresh().append(nn.Linear(3, 1)), "these tensors differ: 6.bias, 6.weight"),
}


@pytest.mark.parametrize("name", ANOTHER)
def test_a_file_of_another_model_leaves_the_model_untouched(name, saved):
    *_, path = saved
    build, words = ANOTHER[name]
    model = build()
    before = snapshot(model)
    with pytest.raises(
        PruningError, match="was pruned from another model than this one: .*" + words
    ):
        td.load_pruned(model, path)
    assert_same(snapshot(model), before)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        td.load_pruned(fresh(), tmp_path / "nowhere.safetensors")


def half_written(self, data):
    with self.open("wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError("no space left on device")


def not_replaced(self, target):
    raise OSError("no space left on device")


@pytest.mark.parametrize(
    ("method", "failing"), [("write_bytes", half_written), ("replace", not_replaced)]
)
def test_a_write_that_fails_leaves_the_old_file_and_no_other(method, failing, saved, monkeypatch):
    small, plan, path = saved
    before = path.read_bytes()
    with torch.no_grad():
        small[0].weight.zero_()
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, failing)
        with pytest.raises(OSError, match="no space left on device"):
            td.save_pruned(small, plan, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    td.save_pruned(small, plan, path)
    assert path.read_bytes() != before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
