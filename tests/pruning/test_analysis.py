"""Which cuts and folds are found, and what is refused in which words."""

import pytest
import torch
from oracle import Net, as_trained, assert_same, chain, convs, snapshot
from torch import nn
from torch.nn.functional import dropout, linear
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close

import taildropout as td
from taildropout import PruningError, TailDropout
from taildropout.pruning.analysis import analyse, structural_copy, tensors_by_name


def cuts(model, k, shape):
    """{tensor: {dim: the indices that stay}}"""
    found = {}
    for cut in analyse(model, k, torch.randn(shape)).cuts:
        assert cut.size == tensors_by_name(model)[cut.name].shape[cut.dim]
        found.setdefault(cut.name, {})[cut.dim] = list(cut.keep)
    return found


def folds(model, k, shape):
    return {fold.name: fold.constant for fold in analyse(model, k, torch.randn(shape)).folds}


# --------------------------------------------------------------------------------------- what goes


@pytest.mark.parametrize("k", range(4))
def test_a_chain_loses_the_producers_rows_and_the_consumers_columns(k):
    keep = list(range(k))
    expected = {"0.weight": {0: keep}, "0.bias": {0: keep}, "3.weight": {1: keep}}
    assert cuts(chain(4, nn.ReLU()), {"1": k}, (2, 5)) == expected


def test_nothing_goes_at_k_of_all_features():
    found = analyse(chain(4, nn.Sigmoid()), {"1": 4}, torch.randn(2, 5))
    assert (found.k, found.n, found.cuts, found.folds) == ({"1": 4}, {"1": 4}, [], [])


def test_parameters_on_the_way_lose_entries():
    model = chain(4, nn.PReLU(4), nn.PReLU(), before=[nn.BatchNorm1d(4), nn.Tanh()], bias=False)
    assert cuts(model, {"3": 1}, (2, 5)) == {
        "0.weight": {0: [0]},
        **{f"1.{name}": {0: [0]} for name in ("weight", "bias", "running_mean", "running_var")},
        "4.weight": {0: [0]},
        "6.weight": {1: [0]},
    }


def test_parameters_that_users_write_lose_entries():
    def forward(m, x):
        return m.consumer(m.tail(m.producer(x) * m.scale) + m.shift - m.mean)

    assert cuts(Net(forward), {"tail": 3}, (2, 5)) == {
        "producer.weight": {0: [0, 1, 2]},
        "producer.bias": {0: [0, 1, 2]},
        "scale": {0: [0, 1, 2]},
        "shift": {1: [0, 1, 2]},
        "mean": {0: [0, 1, 2]},
        "consumer.weight": {1: [0, 1, 2]},
    }


def test_a_linear_behind_a_flattened_convolution_loses_whole_channels():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), TailDropout(dropout_dim=1), nn.Flatten(), nn.Linear(4 * 9, 3)
    )
    assert cuts(model, {"1": 2}, (2, 2, 5, 5)) == {
        "0.weight": {0: [0, 1]},
        "0.bias": {0: [0, 1]},
        "3.weight": {1: list(range(18))},
    }


def test_a_linear_between_two_layers_loses_rows_and_columns():
    model = nn.Sequential(
        nn.Linear(5, 4), TailDropout(), nn.Linear(4, 6), TailDropout(), nn.Linear(6, 2)
    )
    assert cuts(model, {"1": 1, "3": 2}, (2, 5)) == {
        "0.weight": {0: [0]},
        "0.bias": {0: [0]},
        "2.weight": {1: [0], 0: [0, 1]},
        "2.bias": {0: [0, 1]},
        "4.weight": {1: [0, 1]},
    }
    assert cuts(model, {"3": 2}, (2, 5)) == {
        "2.weight": {0: [0, 1]},
        "2.bias": {0: [0, 1]},
        "4.weight": {1: [0, 1]},
    }


def test_layers_in_a_row_keep_what_both_keep():
    model = nn.Sequential(nn.Linear(5, 4), TailDropout(), TailDropout(), nn.Linear(4, 3))
    for k in ({"1": 1, "2": 3}, {"1": 3, "2": 1}):
        assert cuts(model, k, (2, 5))["0.weight"] == {0: [0]}
        assert cuts(model, k, (2, 5))["3.weight"] == {1: [0]}


# ----------------------------------------------------------------------------------- the constants


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
    found = analyse(model, {"1": 1}, torch.randn(2, 5, dtype=torch.float64)).folds
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


# ---------------------------------------------------------------------------------------- refusals


def refused(model, k, shape, words):
    """Refused by `prune` in these words, and the model is left as it was."""
    before = snapshot(model)
    x = torch.zeros(shape)
    with pytest.raises(PruningError, match=words):
        td.prune(model, k, x)
    assert_same(snapshot(model), before)


READ_BY = r"the features of layer '{}' are read by {}, which mixes features or is not supported"
COME_FROM = r"the features of layer '{}' come from {}, which can't compute some of them only"
PLACES = "^{} turns the zeros of the tail into values that differ from place to place"

IN_MODULES = {
    "layer norm behind": (chain(4, nn.LayerNorm(4)), READ_BY.format(1, "layer_norm in module '2'")),
    "softmax behind": (chain(4, nn.Softmax(-1)), READ_BY.format(1, "softmax in module '2'")),
    "log-softmax behind": (
        chain(4, nn.LogSoftmax(1)),
        READ_BY.format(1, "log_softmax in module '2'"),
    ),
    "glu behind": (
        nn.Sequential(nn.Linear(5, 4), TailDropout(), nn.GLU(), nn.Linear(2, 3)),
        READ_BY.format(1, "glu in module '2'"),
    ),
    "layer norm before": (
        chain(4, before=[nn.LayerNorm(4)]),
        COME_FROM.format(2, "layer_norm in module '1'"),
    ),
    "softmax before": (
        chain(4, before=[nn.Softmax(-1)]),
        COME_FROM.format(2, "softmax in module '1'"),
    ),
    "at the input": (
        nn.Sequential(TailDropout(), nn.Linear(5, 4)),
        COME_FROM.format(0, "the input '.*' of the model"),
    ),
    "at the output": (
        nn.Sequential(nn.Linear(5, 4), TailDropout(), nn.ReLU()),
        "the features of layer '1' reach the output of the model, whose shape would change",
    ),
    "computed weights": (
        nn.Sequential(weight_norm(nn.Linear(5, 4)), TailDropout(), nn.Linear(4, 3)),
        "linear in module '0' must read its weights directly from parameters",
    ),
}


@pytest.mark.parametrize("name", IN_MODULES)
def test_modules_that_are_in_the_way(name):
    model, words = IN_MODULES[name]
    refused(model, 2, (3, 5), words)


IN_CONVS = {
    "padded behind sigmoid": (
        convs(nn.Sigmoid(), last={"padding": 1}),
        PLACES.format(r"conv2d in module '3'"),
    ),
    "padded 'same' behind sigmoid": (
        convs(nn.Sigmoid(), last={"kernel_size": 3, "padding": "same"}),
        PLACES.format(r"conv2d in module '3'"),
    ),
    "padded average behind sigmoid": (
        convs(nn.Sigmoid(), nn.AvgPool2d(2, padding=1)),
        PLACES.format(r"avg_pool2d in module '3'"),
    ),
    "circular padding": (
        convs(last={"padding": 1, "padding_mode": "circular"}),
        READ_BY.format(1, "pad in module '2'"),
    ),
    "group norm": (convs(nn.GroupNorm(2, 4)), READ_BY.format(1, ".*norm.* in module '2'")),
    "grouped consumer": (
        nn.Sequential(nn.Conv2d(2, 4, 3), TailDropout(dropout_dim=1), nn.Conv2d(4, 4, 3, groups=2)),
        READ_BY.format(1, "conv2d in module '2'"),
    ),
    "grouped producer": (convs(first={"groups": 2}), COME_FROM.format(1, "conv2d in module '0'")),
    "transposed": (
        nn.Sequential(nn.Conv2d(2, 4, 3), TailDropout(dropout_dim=1), nn.ConvTranspose2d(4, 4, 3)),
        READ_BY.format(1, "conv_transpose2d in module '2'"),
    ),
    "part of a channel": (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), TailDropout(), nn.Linear(144, 3)),
        "the first k features of layer '2' are not whole features of what .* in module '1' reads",
    ),
}


@pytest.mark.parametrize("name", IN_CONVS)
def test_convolutions_that_are_in_the_way(name):
    model, words = IN_CONVS[name]
    refused(model, 2, (2, 2, 8, 8), words)


OWN = "in the model's own forward"
PAST = "the features that linear in module 'producer' computes for layer 'tail' are also read by {}"
MEET = f"the features of layer 'tail' meet other values in add {OWN}"


def residual(m, x):
    h = m.producer(x)
    return m.consumer(h + m.tail(h))


def skip(m, x):
    h = m.producer(x)
    return m.consumer(m.tail(h)) + h.sum(-1, keepdim=True)


def residual_behind(m, x):
    h = m.tail(m.producer(x))
    return m.consumer(h + m.other(x))


def centred(m, x):
    h = m.producer(x)
    return m.consumer(m.tail(h - h.mean(-1, keepdim=True)))


def mean_behind(m, x):
    h = m.tail(m.producer(x))
    return m.consumer(h * h.mean(-1, keepdim=True))


def attention(m, x):
    h = m.tail(m.producer(x))
    return m.consumer((h @ h.T).softmax(-1) @ h)


FORWARDS = {
    "residual": (residual, MEET),
    "residual behind": (residual_behind, MEET),
    "skip": (skip, PAST.format(f"sum {OWN}")),
    "mean before": (centred, PAST.format(f"mean {OWN}")),
    "mean behind": (mean_behind, READ_BY.format("tail", f"mean {OWN}")),
    "attention": (attention, READ_BY.format("tail", f".* {OWN}")),
    "softmax": (
        lambda m, x: m.consumer(m.tail(m.producer(x).softmax(-1))),
        COME_FROM.format("tail", f"softmax {OWN}"),
    ),
    "cumsum": (
        lambda m, x: m.consumer(m.tail(m.producer(x)).cumsum(-1)),
        READ_BY.format("tail", f"cumsum {OWN}"),
    ),
    "flip": (
        lambda m, x: m.consumer(m.tail(m.producer(x)).flip(-1)),
        READ_BY.format("tail", f"flip {OWN}"),
    ),
    "cat": (
        lambda m, x: m.consumer(torch.cat([m.tail(m.producer(x)), x], -1)[:, :4]),
        READ_BY.format("tail", f"cat {OWN}"),
    ),
    "always dropout": (
        lambda m, x: m.consumer(dropout(m.tail(m.producer(x)), 0.5, True)),
        READ_BY.format("tail", f".*dropout {OWN}"),
    ),
    "einsum": (
        lambda m, x: torch.einsum("bi,oi->bo", m.tail(m.producer(x)), m.consumer.weight),
        READ_BY.format("tail", f"einsum {OWN}"),
    ),
    "no place for a bias": (
        lambda m, x: linear(m.tail(m.producer(x)) + 1, m.gate.weight[:, :4]),
        f"linear {OWN} must read its weights directly from parameters",
    ),
    "no bias is read": (
        lambda m, x: linear(m.tail(m.producer(x)).sigmoid(), m.consumer.weight),
        f"linear {OWN} needs a bias to take in the constant .* 'consumer.weight' does not belong",
    ),
    "weights that are read elsewhere": (
        lambda m, x: m.consumer(m.tail(m.producer(x))) + m.consumer.weight.sum(),
        f"'consumer.weight' would be cut, but is also read by sum {OWN}",
    ),
    "a hard-coded view": (
        lambda m, x: m.consumer(m.tail(m.producer(x)).view(-1, 4)),
        r"the pruned network does not run: .* spell out a size .* as in x\.view\(-1, 3136\): .*"
        r"x\.flatten\(1\)",
    ),
    "data-dependent control flow": (
        lambda m, x: m.consumer(m.tail(m.producer(x))) if x.sum() > 0 else x,
        "must be exportable by torch.export, .* exporting it failed: .*data-dependent",
    ),
    "two widths": (
        lambda m, x: m.consumer(m.tail(m.producer(x))) + m.tail(x).sum(),
        r"layer 'tail' must be called with one number of features, got \[4, 5\]",
    ),
    "not called": (
        lambda m, x: m.consumer(m.producer(x)),
        "layer 'tail' must be called with one number of features, got no call",
    ),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_what_users_write_that_is_in_the_way(name):
    forward, words = FORWARDS[name]
    refused(Net(forward), 2, (3, 5), words)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(5, 4)
        self.tail = TailDropout(batch_dim=1)
        self.consumer = nn.Linear(4, 3)

    def forward(self, x):
        return self.consumer(self.tail(self.gru(x)[0]))


def test_a_recurrent_producer():
    words = COME_FROM.format("tail", "gru in module 'gru'")
    refused(Recurrent(), 2, (3, 2, 5), words)


def test_an_embedding_as_producer():
    model = nn.Sequential(nn.Embedding(7, 4), TailDropout(), nn.Linear(4, 3))
    with pytest.raises(PruningError, match=COME_FROM.format(1, "embedding in module '0'")):
        td.prune(model, 2, torch.tensor([1, 2]))


class ChannelsLast(nn.Module):
    """Flattened such that feature i is channel i % 4 at position i // 4, of 3."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.tail = TailDropout()
        self.consumer = nn.Linear(12, 3)

    def forward(self, x):
        return self.consumer(self.tail(self.conv(x).transpose(1, 2).flatten(1)))


@pytest.mark.parametrize(
    ("k", "words"),
    [
        (8, COME_FROM.format("tail", "conv1d in module 'conv'")),  # two whole positions stay
        (6, "the first k features of layer 'tail' are not whole features"),
    ],
)
def test_prefixes_that_are_positions_and_not_channels(k, words):
    refused(ChannelsLast(), k, (2, 2, 5), words)


def test_tied_weights():
    model = nn.Sequential(nn.Linear(4, 4), TailDropout(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    words = r"must read its weights directly .* tied ones, got 0\.weight = 2\.weight"
    refused(model, 2, (3, 4), words)


def test_weights_that_are_also_used_past_the_layer():
    def forward(m, x):
        return m.consumer(m.tail(m.producer(x))) + m.consumer(m.producer(x))

    words = "'(producer|consumer).(weight|bias)' would be cut, but is also read by linear in module"
    refused(Net(forward), 2, (3, 5), words)


def test_the_layer_that_is_named_is_the_one_in_the_way():
    model = nn.Sequential(
        nn.Linear(5, 4),
        TailDropout(),
        nn.Linear(4, 4),
        nn.Sequential(TailDropout(), nn.LayerNorm(4)),
        nn.Linear(4, 2),
    )
    refused(model, {"1": 2, "3.0": 2}, (3, 5), READ_BY.format("3.0", "layer_norm in module '3.1'"))
    assert set(cuts(model, {"1": 2}, (3, 5))) == {"0.weight", "0.bias", "2.weight"}


# ------------------------------------------------------------------------------------------ copies


def test_a_structural_copy_shares_tensors_but_no_modules():
    model = Net(residual)
    copied = structural_copy(model)
    ours, theirs = tensors_by_name(model), tensors_by_name(copied)
    assert list(ours) == list(theirs)
    assert "mean" in ours
    assert all(theirs[name] is tensor for name, tensor in ours.items())
    assert not set(map(id, model.modules())) & set(map(id, copied.modules()))


def test_tied_tensors_have_all_their_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(tensors_by_name(model)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
