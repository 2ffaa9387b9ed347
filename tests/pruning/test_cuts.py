"""Which cuts and folds are found, and what is refused in which words."""

import re

import pytest
import torch
from helpers.oracle import Net, assert_computes, assert_same, chain, convs, snapshot
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils.parametrizations import spectral_norm

import taildropout as td
from taildropout import PruningError, TailDropout
from taildropout.models.copies import tensors_by_name
from taildropout.pruning.cuts import Reading


def cuts(model, k, shape):
    """{tensor: {dim: the indices that stay}}"""
    found = {}
    for cut in Reading(model, torch.randn(shape)).find(k).cuts:
        assert cut.size == tensors_by_name(model)[cut.name].shape[cut.dim]
        found.setdefault(cut.name, {})[cut.dim] = list(cut.keep)
    return found


class First(nn.Module):
    """The first output of a module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


# --------------------------------------------------------------------------------------- what goes


@pytest.mark.parametrize("k", range(4))
def test_a_chain_loses_the_producers_rows_and_the_consumers_columns(k):
    keep = list(range(k))
    expected = {"0.weight": {0: keep}, "0.bias": {0: keep}, "3.weight": {1: keep}}
    assert cuts(chain(4, nn.ReLU()), {"1": k}, (2, 5)) == expected


@pytest.mark.parametrize("k", range(1, 8))
def test_any_number_of_channels_goes(k):
    """Also an odd one, for which torch compares sizes that it does not compare for others."""
    behind = [nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)]
    model = nn.Sequential(nn.Conv2d(2, 8, 3), TailDropout(dropout_dim=1), *behind)
    plan = td.plan_pruning(model, k, torch.randn(2, 2, 10, 10))
    assert [list(cut.keep) for cut in plan.cuts] == 3 * [list(range(k))]
    assert plan.stays == []


def test_nothing_goes_at_k_of_all_features():
    found = Reading(chain(4, nn.Sigmoid()), torch.randn(2, 5)).find({"1": 4})
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


# ------------------------------------------------------------------------------------- what stays


def kept(model, k, shape, *words):
    """What the plan says of what stays; the small network computes the same all the same."""
    model.double()
    x = torch.randn(shape, dtype=torch.float64)
    before = snapshot(model)
    plan = td.plan_pruning(model, k, x)
    small = plan.apply(model)
    assert_same(snapshot(model), before)
    ks = k if isinstance(k, dict) else dict.fromkeys(td.tail_dropouts(model), k)
    assert_computes(small, model, ks, shape)
    said = [f"{s.side} {s.layer}: {s.name} {s.reason}" for s in plan.stays]
    assert len(said) == len(words)
    for line, expected in zip(said, words, strict=True):
        assert re.fullmatch(expected, line), line
    return {cut.name for cut in plan.cuts}


SUBTRACTS = "subtracts the mean over all n features, zeros among them"
AT_ONCE = "needs all features at once, or is not supported"
NONE_OR_ALL = "computes all features or none"
NOT_CONSTANT = "reads them too, where they are not constant"
DIFFER = "makes them differ from sample to sample, and linear in module 'consumer' reads them"
NO_PLACE = "can't take in the constants that it reads there: .*"
PRODUCER, CONSUMER = {"0.weight", "0.bias"}, {"3.weight"}

IN_MODULES = {
    "layer norm": (
        chain(4, nn.LayerNorm(4)),
        PRODUCER,
        f"behind 1: layer_norm in module '2' {SUBTRACTS}",
    ),
    "softmax": (chain(4, nn.Softmax(-1)), PRODUCER, f"behind 1: softmax in module '2' {AT_ONCE}"),
    "log-softmax": (
        chain(4, nn.LogSoftmax(1)),
        PRODUCER,
        f"behind 1: log_softmax in module '2' {AT_ONCE}",
    ),
    "glu": (
        nn.Sequential(nn.Linear(5, 4), TailDropout(), nn.GLU(), nn.Linear(2, 3)),
        PRODUCER,
        "behind 1: glu in module '2' makes them differ .*, and linear in module '3' reads them",
    ),
    "layer norm before": (
        chain(4, before=[nn.LayerNorm(4)]),
        CONSUMER,
        f"in front of 2: layer_norm in module '1' {NONE_OR_ALL}",
    ),
    "rms norm before": (
        chain(4, before=[nn.RMSNorm(4)]),
        CONSUMER,
        f"in front of 2: rms_norm in module '1' {NOT_CONSTANT}",
    ),
    "softmax before": (
        chain(4, before=[nn.Softmax(-1)]),
        CONSUMER,
        f"in front of 2: softmax in module '1' {NONE_OR_ALL}",
    ),
    "at the input": (
        nn.Sequential(TailDropout(), nn.Linear(5, 4)),
        {"1.weight"},
        "in front of 0: the input '.*' of the model comes from outside",
    ),
    "at the output": (
        nn.Sequential(nn.Linear(5, 4), TailDropout(), nn.ReLU()),
        PRODUCER,
        "behind 1: the output of the model must keep its shape",
    ),
    "computed weights": (
        nn.Sequential(spectral_norm(nn.Linear(5, 4)), TailDropout(), nn.Linear(4, 3)),
        {"2.weight"},
        "in front of 1: mv in module '0.parametrizations.weight.0' .*",
    ),
    "a recurrent producer": (
        nn.Sequential(First(nn.GRU(5, 4)), TailDropout(), nn.Linear(4, 3)),
        {"2.weight"},
        f"in front of 1: gru in module '0.module' {NONE_OR_ALL}",
    ),
}


@pytest.mark.parametrize("name", IN_MODULES)
def test_modules_that_stay(name):
    model, cut, words = IN_MODULES[name]
    assert kept(model, 2, (3, 5), words) == cut


CONV, READER = {"0.weight", "0.bias"}, {"2.weight"}
IN_CONVS = {
    "padded behind sigmoid": (
        convs(nn.Sigmoid(), last={"padding": 1}),
        CONV,
        f"behind 1: conv2d in module '3' {NO_PLACE}",
    ),
    "padded 'same' behind sigmoid": (
        convs(nn.Sigmoid(), last={"kernel_size": 3, "padding": "same"}),
        CONV,
        f"behind 1: conv2d in module '3' {NO_PLACE}",
    ),
    "padded average behind sigmoid": (
        convs(nn.Sigmoid(), nn.AvgPool2d(2, padding=1)),
        CONV,
        "behind 1: avg_pool2d in module '3' makes them differ .*, and conv2d .* reads them",
    ),
    "group norm": (
        convs(nn.GroupNorm(2, 4)),
        CONV,
        f"behind 1: group_norm in module '2' {AT_ONCE}",
    ),
    "part of a channel": (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), TailDropout(), nn.Linear(144, 3)),
        {"0.weight", "0.bias", "3.weight"},
        "in front of 2: linear in module '3' reads them too, where they are not constant",
    ),
    "grouped producer": (
        convs(first={"groups": 2}),
        READER,
        "in front of 1: the input '.*' of the model comes from outside",
    ),
    "grouped consumer": (
        nn.Sequential(nn.Conv2d(2, 4, 3), TailDropout(dropout_dim=1), nn.Conv2d(4, 4, 3, groups=2)),
        CONV,
        "behind 1: the output of the model must keep its shape",
    ),
}


@pytest.mark.parametrize("name", IN_CONVS)
def test_convolutions_that_stay(name):
    model, cut, words = IN_CONVS[name]
    assert kept(model, 2, (2, 2, 8, 8), words) == cut


@pytest.mark.parametrize(
    "last",
    [nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), nn.ConvTranspose2d(4, 3, 3)],
    ids=["circular", "transposed"],
)
def test_convolutions_that_are_cut_on_both_sides(last):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), TailDropout(dropout_dim=1), last)
    assert kept(model, 2, (2, 2, 8, 8)) == CONV | READER


OWN = "in the model's own forward"


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


ROWS, COLUMNS = {"producer.weight", "producer.bias"}, {"consumer.weight"}
FORWARDS = {
    "residual": (
        residual,
        set(),
        [f"in front of tail: add {OWN} {DIFFER}", f"behind tail: add {OWN} {DIFFER}"],
    ),
    "residual behind": (
        residual_behind,
        ROWS,
        [f"behind tail: add {OWN} {DIFFER}"],
    ),
    "skip": (skip, COLUMNS, [f"in front of tail: sum {OWN} {NOT_CONSTANT}"]),
    "mean before": (centred, COLUMNS, [f"in front of tail: mean {OWN} {AT_ONCE}"]),
    "mean behind": (mean_behind, ROWS, [f"behind tail: mean {OWN} {AT_ONCE}"]),
    "softmax": (
        lambda m, x: m.consumer(m.tail(m.producer(x).softmax(-1))),
        COLUMNS,
        [f"in front of tail: softmax {OWN} {NONE_OR_ALL}"],
    ),
    "cumsum": (
        lambda m, x: m.consumer(m.tail(m.producer(x)).cumsum(-1)),
        ROWS,
        [f"behind tail: cumsum {OWN} {AT_ONCE}"],
    ),
    "einsum": (
        lambda m, x: torch.einsum("...i,oi->...o", m.tail(m.producer(x)), m.consumer.weight),
        ROWS,
        [f"behind tail: einsum {OWN} {AT_ONCE}"],
    ),
    "no bias is read": (
        lambda m, x: linear(m.tail(m.producer(x)).sigmoid(), m.consumer.weight),
        ROWS,
        [f"behind tail: linear {OWN} {NO_PLACE}"],
    ),
    "a view of sizes in the code": (
        lambda m, x: m.consumer(m.tail(m.producer(x)).view(-1, 4)),
        ROWS,
        [f"behind tail: view {OWN} has sizes in the model's code, which pruning would change"],
    ),
    "weights that are read elsewhere": (
        lambda m, x: m.consumer(m.tail(m.producer(x))) + m.consumer.weight.sum(),
        ROWS,
        [f"behind tail: sum {OWN} {NOT_CONSTANT}"],
    ),
    "weights that are used past the layer": (
        lambda m, x: m.consumer(m.tail(m.producer(x))) + m.consumer(m.producer(x)),
        set(),
        [
            f"in front of tail: linear in module 'consumer' {NOT_CONSTANT}",
            f"behind tail: linear in module 'consumer' {NOT_CONSTANT}",
        ],
    ),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_what_stays_in_modules_that_users_write(name):
    forward, cut, words = FORWARDS[name]
    assert kept(Net(forward), 2, (3, 5), *words) == cut


@pytest.mark.parametrize(
    "forward",
    [
        attention,
        lambda m, x: m.consumer(m.tail(m.producer(x)).flip(-1)),
        lambda m, x: m.consumer(m.tail(m.producer(x)) * m.gate(x) + 0),
    ],
    ids=["attention", "flip", "gate"],
)
def test_modules_that_users_write_cut_on_both_sides(forward):
    assert kept(Net(forward), 2, (3, 5)) == ROWS | COLUMNS


def test_tied_weights_stay_unless_all_uses_agree():
    model = nn.Sequential(nn.Linear(4, 4), TailDropout(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    outside = (
        "(the input '.*' of the model comes from outside|the output of the model must keep .*)"
    )
    assert kept(model, 2, (3, 4), f"in front of 1: {outside}", f"behind 1: {outside}") == set()


class ChannelsLast(nn.Module):
    """Flattened such that feature i is channel i % 4 at position i // 4, of 3."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.tail = TailDropout()
        self.consumer = nn.Linear(12, 3)

    def forward(self, x):
        return self.consumer(self.tail(self.conv(x).transpose(1, 2).flatten(1)))


@pytest.mark.parametrize(("k", "reasons"), [(8, 1), (6, 2)])
def test_prefixes_that_are_positions_and_not_channels(k, reasons):
    """The first positions of all channels: no channel can go."""
    (cut,) = kept(ChannelsLast(), k, (2, 2, 5), *["in front of tail: .*"] * reasons)
    assert cut == "consumer.weight"


def test_an_embedding_loses_columns():
    model = nn.Sequential(nn.Embedding(7, 4), TailDropout(), nn.Linear(4, 3))
    small = td.prune(model, 2, torch.tensor([1, 2]))
    assert small[0].weight.shape == (7, 2)
    assert small[0].embedding_dim == 2


# ---------------------------------------------------------------------------------------- refusals


FORWARDS_REFUSED = {
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


@pytest.mark.parametrize("name", FORWARDS_REFUSED)
def test_what_users_write_that_is_refused(name):
    forward, words = FORWARDS_REFUSED[name]
    model = Net(forward)
    before = snapshot(model)
    with pytest.raises(PruningError, match=words):
        td.prune(model, 2, torch.zeros(3, 5))
    assert_same(snapshot(model), before)
