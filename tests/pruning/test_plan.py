"""The promise of pruning, what the small network is, the original, and the arguments."""

import copy

import numpy as np
import pytest
import torch
from helpers.oracle import (
    LeNet,
    Net,
    as_trained,
    assert_computes,
    assert_prunes,
    assert_same,
    chain,
    convs,
    masked,
    snapshot,
    two_layers,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import relu
from torch.testing import assert_close

import taildropout as td
from taildropout import PruningError, TailDropout

pytestmark = pytest.mark.slow  # many alike

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


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_elementwise_activation_before_and_behind_the_layer(activation):
    model = chain(4, copy.deepcopy(activation), before=[copy.deepcopy(activation)])
    for k in (0, 1, 3):
        assert_prunes(model, k, (3, 5), (1, 5), (7, 5))


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("behind", "k", "error", "words"),
    [
        (Branch(), 2, PruningError, "exporting it failed"),
        (nn.Sigmoid(), 5, ValueError, "k must be at most the number of features n=4"),
    ],
    ids=["analysis", "k"],
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


class OfFour(nn.Module):
    def forward(self, x):
        if x.shape[-1] != 4:
            raise ValueError("must have 4 features")
        return x


def test_a_module_that_insists_on_its_width_keeps_it():
    small = assert_prunes(chain(4, OfFour()), 2, (3, 5))
    assert small[-1].weight.shape == (3, 4)
    plan = td.plan_pruning(chain(4, OfFour()), 2, torch.randn(3, 5))
    assert "has sizes in the model's code" in plan.summary()


class CallsOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.dropout = nn.Linear(5, 8), td.TailDropout()
        self.never, self.last = td.TailDropout(), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.dropout(self.first(x)))


@pytest.mark.parametrize("k", [0.5, {"*": 4}, {"dropout": 4}])
def test_a_layer_that_is_never_called_is_warned_of_and_left_out(k):
    with pytest.warns(UserWarning, match=r"never calls its TailDropout layers \['never'\]"):
        plan = td.plan_pruning(CallsOne(), k, torch.randn(2, 5))
    assert plan.k == {"dropout": 4}


@pytest.mark.parametrize("k", [{"never": 4}, {"never": 0.5}])
def test_a_layer_that_is_never_called_is_not_cut_by_its_name(k):
    with pytest.raises(PruningError, match=r"'never' must be called .* got no call"):
        td.plan_pruning(CallsOne(), k, torch.randn(2, 5))


def test_a_network_may_be_cut_inside_at_width():
    model, x = nn.Sequential(nn.Linear(4, 8), TailDropout(), nn.Linear(8, 3)), torch.randn(2, 4)
    with td.at_width(model, 0.5):
        small, expected = td.prune(model, 0.5, x), model(x)
    assert_close(small.eval()(x), expected)
    assert (small[0].out_features, small[1].extra_repr().count("width")) == (4, 0)


def test_inputs_that_do_not_fit_are_named_in_their_own_sizes():
    model = nn.Sequential(nn.Linear(12, 8), TailDropout(), nn.Linear(8, 3))
    words = (
        r"must run on its example inputs, but with those of \(3, 11\) it raised RuntimeError: .*"
        r"3x11 and 12x8.*: pass inputs as the model takes them"
    )
    for read in (td.places, lambda model, x: td.plan_pruning(model, 2, x)):
        with pytest.raises(PruningError, match=words):
            read(model, torch.randn(3, 11))
