"""Where a width can be chosen in real architectures, and what a nested one is pruned to."""

import copy

import pytest
import torch
from helpers.architectures import ARCHITECTURES, mlp
from helpers.oracle import assert_same, snapshot
from helpers.zoo.case import Wired
from torch import nn
from torch.testing import assert_close

import taildropout as td
from taildropout import TailDropout, lengths
from taildropout.models.copies import without_cache
from taildropout.models.inputs import call
from taildropout.pruning.precision import InFloat64

FAST = ("MLP", "LSTM tagger", "ConvNeXt")
LONG = ("T5", "Swin")  # up to seven paths, each of which is exported
NAMES = [
    pytest.param(
        name,
        marks=[
            *([] if name in FAST else [pytest.mark.slow]),
            *([pytest.mark.long] if name in LONG else []),
        ],
    )
    for name in ARCHITECTURES
]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_is_nested_and_pruned_exactly(name):
    architecture = ARCHITECTURES[name]
    model = without_cache(architecture.make())
    example = architecture.inputs(*architecture.sizes[0])
    before, state = snapshot(model), model.state_dict()

    nested = td.nest(model, example, streams=architecture.streams)
    found = [(p.name, p.at, p.n, p.multiple_of, p.kind) for p in nested.places]
    assert found == architecture.places
    several = {p.name: len(p.positions) for p in nested.places if len(p.positions) > 1}
    assert several == architecture.positions
    for place, words in architecture.reasons.items():
        assert words in nested.places.others[place]
    copy.deepcopy(model).load_state_dict(state)
    architecture.build().load_state_dict(model.state_dict())

    plan = td.plan_pruning(model, 0.6, example)
    for width in (0.6, 0.25):
        smaller = plan.at(width)
        assert (smaller.stays, smaller.fits) == ([], [])
        small = smaller.apply(model)
        assert small.state_dict().keys() == state.keys()
        for size in architecture.sizes:
            inputs = architecture.inputs(*size)
            with InFloat64(), td.at_width(model, width):
                assert_close(call(small, inputs), call(model, inputs), rtol=1e-9, atol=1e-9)

    nested.remove()
    assert_same(snapshot(model) | {"rng": None}, before | {"rng": None})


# ------------------------------------------------------------------------------ in training


class Heads(nn.Module):
    """Attention of four heads of 3, and an MLP of 20."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(6, 36), nn.Linear(12, 6)
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 6)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 3)).permute(2, 0, 3, 1, 4).unbind()
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(heads.transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


X = torch.zeros(2, 5, 6)


def test_all_layers_have_one_width_for_each_sample():
    model = Heads()
    heads, hidden = td.nest(model, X).layers.values()
    model(torch.randn(500, 5, 6))
    assert set(heads.drawn_k.tolist()) == {3, 6, 9, 12}
    assert set(hidden.drawn_k.tolist()) == set(range(2, 21))  # 2 is 1/16 of 20, rounded up
    larger = hidden.drawn_k[:, None] > hidden.drawn_k
    assert (heads.drawn_k[:, None] >= heads.drawn_k.expand_as(larger))[larger].all()
    for layer, n in ((heads, 12), (hidden, 20)):
        assert (layer.drawn_k == n).float().mean() >= 0.2
        assert (layer.drawn_k == layer.drawn_k.min()).float().mean() >= 0.2


def test_no_width_under_the_smallest():
    model = Heads()
    nested = td.nest(model, X, min_width=0.4, lengths=lengths.Uniform())
    model(torch.randn(500, 5, 6))
    heads, hidden = nested.layers.values()
    assert (int(heads.drawn_k.min()), int(hidden.drawn_k.min())) == (6, 8)
    assert (hidden.drawn_k == 8).float().mean() == pytest.approx(8 / 20, abs=0.01)


def test_eval_mode_changes_nothing():
    model, x = Heads().eval(), torch.randn(2, 5, 6)
    expected = model(x)
    td.nest(model, X)
    assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("multiple_of", "expected"), [(1, [3, 1]), (8, [12, 4]), (2, [6, 2])])
def test_multiples_that_hardware_likes_come_on_top_of_heads(multiple_of, expected):
    """As far as they divide: 20 features have groups of 4, and no 8; 12 have one group of 12."""
    nested = td.nest(Heads(), X, multiple_of=multiple_of)
    assert [p.multiple_of for p in nested.places] == [m for m in expected if m < 12]
    assert [layer.multiple_of for layer in nested.layers.values()] == [
        m for m in expected if m < 12
    ]


@pytest.mark.parametrize("where", ["do*", "re:do.n"])
def test_places_are_picked_by_name(where):
    assert [p.name for p in td.places(Heads(), X, where=where)] == ["down"]
    assert list(td.nest(Heads(), X, where=where).layers) == ["down.tail_dropout"]


def test_a_stream_is_nested_only_if_asked_for():
    def forward(m, x):
        x = m.a(x)
        return m.c(x + m.b(x))

    model = Wired(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 3))
    x = torch.zeros(2, 5)
    assert len(td.places(model, x)) == 0
    with pytest.raises(ValueError, match=r"has none[\s\S]*not the output of a: and 1 more module"):
        td.nest(model, x)
    nested = td.nest(model, x, streams=True)
    assert list(nested.layers) == ["a.tail_dropout", "b.tail_dropout"]


def test_windows_of_one_sample_have_its_width():
    model = nn.Sequential(
        nn.Unflatten(1, (-1, 2)), nn.Flatten(0, 1), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    (layer,) = td.nest(model, torch.zeros(3, 6, 5)).layers.values()
    model(torch.randn(3, 6, 5))
    by_sample = layer.drawn_k.view(3, 3)
    assert torch.equal(by_sample, by_sample[:, :1].expand(3, 3))


def test_layers_of_the_model_keep_their_own_draws():
    model = nn.Sequential(mlp(), TailDropout(0.5))
    nested = td.nest(model, torch.zeros(2, 5))
    assert list(nested.layers) == ["0.2.tail_dropout", "0.4.tail_dropout"]
    nested.remove()
    assert list(td.tail_dropouts(model)) == ["1"]


class HardCoded(Heads):
    """The number of heads is written in the code; the features of the MLP are not."""

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 3).permute(2, 0, 3, 1, 4).unbind()
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(heads.transpose(1, 2).reshape(*x.shape[:2], 12))
        return x + self.down(self.up(x).relu())


def test_sizes_in_the_code_are_seen_once_it_is_cut():
    places = td.places(HardCoded(), X)
    assert [p.name for p in places] == ["down"]
    assert "has sizes in the model's code" in places.others["input of o"]


def test_places_print_as_a_table():
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4)) for _ in "12")
    )
    assert str(td.places(model, torch.zeros(2, 4))).splitlines() == [
        "module  at     kind    features  multiple of  parameters",
        "1.0     input  hidden  4         1            39",
        "not the input of 0.0: the input 'input' of the model comes from outside",
        "not the output of 0.0 and 1 more: layer_norm in module '0.1' subtracts the mean over all n "
        "features, zeros among them",
        "not the output of 0.1 and 1 more: layer_norm in module '0.1' computes all features or none",
        "not the output of 1.2: the output of the model must keep its shape",
    ]


@pytest.mark.slow
@torch.no_grad()
def test_the_mlp_of_torchs_transformer_is_a_place_also_on_its_fast_path():
    """Which makes a nested tensor of a padded one."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x, padding=None):
            return self.encoder(x, src_key_padding_mask=padding)

    model = Padded()
    x, padding = torch.randn(3, 7, 8), torch.arange(7) >= torch.tensor([[7], [4], [5]])
    (first, second), _ = td.nest(model, x).places, model.eval()
    assert (first.name, second.n) == ("encoder.layers.0.linear2", 12)
    with td.at_width(model, 0.5), torch.enable_grad():
        expected = model(x), model(x, padding)  # with gradients it takes no fast path
    with td.at_width(model, 0.5):
        small = td.prune(model, 0.5, x)
        for run in (model, small, td.finalize(small)):
            assert_close(run(x), expected[0])
            assert_close(run(x, padding)[~padding], expected[1][~padding])
    assert (model(x) - expected[0]).abs().max() > 0.01


def test_a_model_that_is_nested_already_says_so():
    model = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(4, 4), nn.ReLU())))
    nested = td.nest(model, torch.zeros(2, 4))
    words = (
        r"is nested already, by the layers '2.tail_dropout', '4.tail_dropout', '6.tail_dropout' and "
        r"1 more, which .* take these out first: call remove\(\) .* or td.remove\(model, name\)"
    )
    with pytest.raises(ValueError, match=words):
        td.nest(model, torch.zeros(2, 4))
    nested.remove()
    assert len(td.nest(model, torch.zeros(2, 4)).layers) == 4


def test_layers_by_hand_at_all_places_are_named():
    model = nn.Sequential(nn.Linear(4, 6), TailDropout(), nn.Linear(6, 3))
    words = r"its own layers '1' choose the widths already: call td.draw_together\(model\)"
    with pytest.raises(ValueError, match=words):
        td.nest(model, torch.zeros(2, 4))


@pytest.mark.parametrize("width", [0, 1.5, -0.1])
def test_the_smallest_width_is_a_fraction(width):
    with pytest.raises(ValueError, match="min_width must be a fraction"):
        td.nest(Heads(), X, min_width=width)


def test_a_model_without_a_place_is_refused_in_words():
    with pytest.raises(ValueError, match="has none\nnot the input of"):
        td.nest(nn.Linear(4, 3), torch.zeros(2, 4))
