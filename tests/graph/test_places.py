"""Which places the dataflow proves to be ones, in networks that are made for one question each."""

import pytest
import torch
from helpers.zoo.case import Weight, Wired, with_random_weights
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

import taildropout as td
from taildropout import TailDropout
from taildropout.graph.places import find_places


def found_in(model, *shape):
    """`"input of b, ...": (n, multiple_of, kind)`, and the reasons elsewhere."""
    found, others = find_places(model, torch.randn(*shape))
    return {
        ", ".join(map(str, one.positions)): (one.n, one.multiple_of, one.kind) for one in found
    }, others


def net(function, **modules):
    return Wired(function, **modules)


def linear(rows, columns):
    return nn.Linear(columns, rows)


def test_what_one_module_reads_gets_a_layer_at_its_input():
    model = nn.Sequential(nn.Linear(5, 12), nn.Sigmoid(), nn.Linear(12, 8), nn.Linear(8, 3))
    found, others = found_in(model, 2, 5)
    assert found == {"input of 2": (12, 1, "hidden"), "input of 3": (8, 1, "hidden")}
    assert others == {
        "input of 0": "the input 'input' of the model comes from outside",
        "output of 3": "the output of the model must keep its shape",
    }


def test_what_several_read_gets_one_where_it_is_written():
    model = net(
        lambda m, x: m.b(m.a(x).relu()) + m.c(m.a(x).relu()),
        a=linear(6, 5),
        b=linear(3, 6),
        c=linear(3, 6),
    )
    found, _ = found_in(model, 2, 5)
    assert found == {"output of a": (6, 1, "hidden")}


def test_a_gate_and_what_it_gates_are_one_place():
    model = net(
        lambda m, x: m.down(m.gate(x).sigmoid() * m.up(x)),
        gate=linear(6, 5),
        up=linear(6, 5),
        down=linear(3, 6),
    )
    (one,), _ = find_places(model, torch.randn(2, 5))
    assert (str(one.positions[0]), one.n) == ("input of down", 6)
    assert one.parameters == 5 * (6 + 6 + 3)  # of 6 features, 5 go from each of the three


def test_channels_that_are_flattened_go_with_all_their_positions():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6 * 9, 3)
    )
    found, _ = found_in(model, 2, 1, 7, 7)
    assert found == {"input of 2": (4, 1, "channels"), "input of 4": (54, 9, "channels")}


def test_the_parts_of_a_concatenation_are_places_by_themselves():
    model = net(
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)),
        a=linear(6, 5),
        b=linear(6, 5),
        c=linear(3, 12),
    )
    found, _ = found_in(model, 2, 5)
    assert found == {"output of a": (6, 1, "hidden"), "output of b": (6, 1, "hidden")}


def attention(m, x):
    def heads(y, size=4):
        return y.unflatten(-1, (-1, size)).transpose(1, 2)

    keys, values = (heads(y).repeat_interleave(m.share, 1) for y in (m.k(x), m.v(x)))
    return m.o(scaled_dot_product_attention(heads(m.q(x)), keys, values).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("share", [1, 3])
def test_heads_go_with_all_that_share_their_keys(share):
    model = net(
        attention,
        q=linear(24, 5),
        k=linear(24 // share, 5),
        v=linear(24 // share, 5),
        o=linear(3, 24),
    )
    model.share = share
    found, others = found_in(model, 2, 7, 5)
    assert found == {"input of o": (24, 4 * share, "heads")}
    assert len(others) == 2  # what goes in, and what comes out


def shared_attention(m, x):
    q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (m.q(x), m.k(x), m.v(x)))
    heads = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return m.o(heads.transpose(1, 2).flatten(2))


def test_heads_go_with_all_that_share_their_keys_in_torchs_own_attention():
    model = net(
        shared_attention, q=linear(24, 5), k=linear(8, 5), v=linear(8, 5), o=linear(3, 24)
    ).double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    (place,) = td.places(model, x)
    assert (place.name, place.at, place.n, place.multiple_of) == ("o", "input", 24, 12)
    td.nest(model, x)
    small = td.prune(model, 0.5, x)
    with td.at_width(model, 0.5):
        assert_close(small(x), model.eval()(x), rtol=1e-10, atol=1e-12)


def test_a_new_network_promises_no_more_than_a_trained_one():
    """BatchNorm starts with biases of zero: behind it the tail is zero then, and not later."""
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1)
    )
    both, _ = find_places(model, torch.randn(2, 1, 7, 7))
    trained, _ = find_places(with_random_weights(model), torch.randn(2, 1, 7, 7))
    assert [one.positions for one in both] == [one.positions for one in trained]
    assert str(both[0].positions[0]) == "input of 3"


class Norm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), 1e-6

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


# Statistics over a batch are those of whole samples where the layers stand behind them.
STREAMS = {
    Norm: ["output of a", "output of down"],
    nn.BatchNorm1d: ["output of norm", "output of last"],
}


@pytest.mark.parametrize("norm", STREAMS)
def test_a_stream_that_several_write_to_and_read_is_one_place(norm):
    def forward(m, x):
        x = m.a(x)
        x = x + m.down(m.up(m.norm(x)).relu())
        return m.head(m.last(x))

    model = net(
        forward,
        a=linear(6, 5),
        norm=norm(6),
        up=linear(8, 6),
        down=linear(6, 8),
        last=norm(6),
        head=linear(3, 6),
    )
    (stream, hidden), _ = find_places(model, torch.randn(4, 5))
    assert (stream.n, stream.kind) == (6, "stream")
    assert [str(p) for p in stream.positions] == STREAMS[norm]
    assert [str(p) for p in hidden.positions] == ["input of down"]


def test_why_there_is_no_other_place():
    model = net(
        lambda m, x: m.c(m.norm(m.b(m.lstm(m.a(x))[0]))),
        a=linear(6, 5),
        lstm=nn.LSTM(6, 8, batch_first=True),
        b=linear(7, 8),
        norm=nn.LayerNorm(7),
        c=linear(3, 7),
    )
    found, others = found_in(model, 2, 4, 5)
    assert found == {"input of lstm": (6, 1, "hidden")}
    assert "lstm in module 'lstm' computes all features or none" in others["output of lstm"]
    assert "subtracts the mean over all n features" in others["output of b"]
    assert "layer_norm in module 'norm' computes all features" in others["output of norm"]


def test_a_layer_that_is_there_already_keeps_its_features():
    model = nn.Sequential(nn.Linear(5, 6), TailDropout(), nn.Linear(6, 4), nn.Linear(4, 3))
    found, others = found_in(model, 2, 5)
    assert list(found) == ["input of 3"]
    assert others["output of 0"] == "layer '1' chooses their width already"


def test_what_is_computed_as_a_function_is_no_place_and_says_so():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.unused = linear(6, 5), linear(3, 6), linear(2, 2)

        def forward(self, x):
            return nn.functional.linear(self.a(x).relu(), self.b.weight)

    _, others = found_in(net(lambda m, x: m.inner(x), inner=Functional()), 2, 5)
    assert "Functional computes it as a function, and a layer" in others["input of inner.b"]
    assert not any("unused" in place for place in others)
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    _, others = found_in(net(lambda m, x: m.attention(x, x, x)[0], attention=attention), 2, 7, 6)
    assert "MultiheadAttention computes it as a function" in others["input of attention.out_proj"]
    assert "write the attention with Linear modules" in others["input of attention.out_proj"]


def test_where_the_samples_lie():
    def forward(m, x):
        windows = m.a(x.unflatten(1, (-1, 2)).flatten(0, 1))  # two of each sample's tokens
        return m.b(windows.relu()).flatten(0, 1), m.d(m.c(x.transpose(0, 1)).relu())

    model = net(forward, a=linear(6, 5), b=linear(3, 6), c=linear(7, 5), d=linear(3, 7))
    (first, second), _ = find_places(model, torch.randn(3, 8, 5))
    ((of_windows,), (of_time,)) = first.positions, second.positions
    assert (of_windows.batch_dim, of_windows.one_row) == (0, False)
    assert (of_time.batch_dim, of_time.one_row) == (1, True)


def test_the_model_is_left_as_it_is():
    model = net(lambda m, x: m.b(m.a(x) * m.scale.value), a=linear(6, 5), b=linear(3, 6))
    model.scale = Weight(6)
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    x, random = torch.randn(2, 5), torch.get_rng_state()
    find_places(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert td.tail_dropouts(model) == {}
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    after = model.state_dict(keep_vars=True)
    assert {name: id(t) for name, t in after.items()} == {n: i for n, (i, _) in before.items()}
    assert all(torch.equal(after[name], t) for name, (_, t) in before.items())
    assert model.training
