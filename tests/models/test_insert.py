import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import taildropout as td
from taildropout import TailDropout, TailMLP, tail_dropouts


def test_layers_are_found_by_their_qualified_names_in_order():
    first, second, third = TailDropout(), TailDropout(0.1), TailDropout(0.2)
    model = nn.Sequential(first, nn.Sequential(nn.ReLU(), second), nn.ModuleDict({"x": third}))
    assert list(tail_dropouts(model).items()) == [("0", first), ("1.1", second), ("2.x", third)]


def test_a_model_that_is_a_layer_has_the_empty_name():
    layer = TailDropout()
    assert tail_dropouts(layer) == {"": layer}


def test_the_layer_of_a_tail_mlp_is_found():
    mlp = TailMLP(3, 4)
    assert tail_dropouts(nn.Sequential(mlp)) == {"0.dropout": mlp.dropout}


def test_a_model_without_layers_has_none():
    assert tail_dropouts(nn.Sequential(nn.Dropout(), nn.Linear(2, 2))) == {}


# ------------------------------------------------------------------------------------------ insert


class Block(nn.Module):
    """A model of someone else: its code names its modules, so none can be put between them."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 8)
        self.stack = nn.Sequential(nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.out = nn.Linear(8, 3)
        self.parts = nn.ModuleList([nn.Linear(3, 3)])

    def forward(self, x):
        return self.parts[0](self.out(self.stack(self.inner(x))))


def by_hand(model, x, at, k):
    """The model's output where the features behind `at` have been cut to k by hand."""
    for name in ("inner", "stack", "out"):
        x = getattr(model, name)(x)
        if name == at:
            x = torch.where(torch.arange(x.shape[-1]) < k[:, None], x, 0)
    return model.parts[0](x)


@pytest.mark.parametrize("at", ["inner", "stack", "out"])
def test_an_inserted_layer_applies_to_the_output_of_its_module_once(at):
    """A Sequential runs its children: one that was added must not run a second time."""
    model, x = Block(), torch.randn(64, 5)
    plain = copy.deepcopy(model)
    layer = td.insert(model, at, TailDropout(0.5))
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    output = model(x)
    assert calls == [1]
    assert_close(output, by_hand(plain, x, at, layer.drawn_k))
    assert layer.drawn_k.unique().numel() > 1
    assert_close(model.eval()(x), plain(x), rtol=0, atol=0)
    with layer.using_k(1):
        assert_close(model(x), by_hand(plain, x, at, torch.full((64,), 1)))


@pytest.mark.parametrize("at", ["", "inner", "stack", "stack.1", "parts.0"])
def test_an_inserted_layer_has_a_name_and_leaves_the_state_dict_as_it_is(at):
    model = Block()
    keys = list(model.state_dict())
    layer = td.insert(model, at, TailDropout())
    assert tail_dropouts(model) == {f"{at}.tail_dropout".removeprefix("."): layer}
    assert list(model.state_dict()) == keys
    model.load_state_dict(Block().state_dict())


@pytest.mark.parametrize("at", ["inner", "stack"])
def test_an_inserted_layer_follows_the_modes_of_its_model(at):
    model = Block()
    layer = td.insert(model.eval(), at, TailDropout())
    assert not layer.training  # as what is around it
    model.train()
    assert layer.training
    model.eval()
    assert not layer.training


def test_an_inserted_layer_keeps_the_k_that_is_set():
    model, layer = Block(), TailDropout()
    layer.set_k(3)
    td.insert(model, "inner", layer)
    assert layer.k == 3


@pytest.mark.parametrize("at", ["inner", "stack"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_a_layer_of_its_own(at, duplicate):
    model, x = Block(), torch.randn(4, 5)
    layer = td.insert(model, at, TailDropout())
    twin = duplicate(model)
    (name,) = tail_dropouts(twin)
    expected = model.eval()(x)
    tail_dropouts(twin)[name].set_k(0)
    assert tail_dropouts(twin)[name] is not layer
    assert_close(model(x), expected, rtol=0, atol=0)
    assert_close(twin(x), by_hand(twin, x, at, torch.zeros(4)))


def test_several_layers_behind_one_module_apply_in_the_order_of_insertion():
    model, x = Block(), torch.randn(4, 5)
    first = td.insert(model, "inner", TailDropout())
    second = td.insert(model, "inner", TailDropout(0.1))
    assert list(tail_dropouts(model).values()) == [first, second]
    seen = []
    for layer in (first, second):
        layer.register_forward_hook(lambda layer, *_: seen.append(layer))
    model(x)
    assert seen == [first, second]


def test_of_a_recurrent_module_the_first_output_goes_through_the_layer():
    model, x = nn.GRU(5, 8, batch_first=True), torch.randn(2, 4, 5)
    outputs, state = model(x)
    layer = td.insert(model, "", TailDropout())
    with layer.using_k(3):
        cut, same = model(x)
    assert_close(cut, torch.cat([outputs[..., :3], torch.zeros(2, 4, 5)], dim=-1), rtol=0, atol=0)
    assert_close(same, state, rtol=0, atol=0)


class Dictionary(nn.Module):
    def forward(self, x):
        return {"x": x}


def test_an_output_that_is_no_tensor_is_refused_in_the_call():
    model = nn.Sequential(Dictionary())
    td.insert(model, "0", TailDropout())
    with pytest.raises(TypeError, match="dict"):
        model(torch.ones(1, 2))


@pytest.mark.parametrize("at", ["nowhere", "inner.weight", "parts.1", "tail_dropout"])
def test_a_name_that_no_module_has(at):
    model = Block()
    before = repr(model)
    with pytest.raises(ValueError, match=f"name must be that of a module of the model, got '{at}'"):
        td.insert(model, at, TailDropout())
    assert repr(model) == before


def test_a_module_that_is_never_called():
    with pytest.raises(ValueError, match="'parts' is a ModuleList, which has no output"):
        td.insert(Block(), "parts", TailDropout())


def test_a_layer_is_inserted_once():
    model = Block()
    layer = td.insert(model, "inner", TailDropout())
    with pytest.raises(ValueError, match="each layer can be inserted once"):
        td.insert(model, "out", layer)


@pytest.mark.parametrize("layer", [nn.Dropout(), TailDropout, 0.5])
def test_what_is_inserted_is_a_layer(layer):
    with pytest.raises(TypeError, match="layer must be a TailDropout, got"):
        td.insert(Block(), "inner", layer)


# ------------------------------------------------------------------------------------------ remove


@pytest.mark.parametrize("own_name", [False, True])
@pytest.mark.parametrize("at", ["", "inner", "stack", "stack.1"])
def test_a_layer_that_is_removed_leaves_the_model_as_it_was(at, own_name):
    model, x = Block(), torch.randn(4, 5)
    before, hooks, expected = repr(model), hook_counts(model), model(x)
    layer = td.insert(model, at, TailDropout())
    name = f"{at}.tail_dropout".removeprefix(".") if own_name else at
    assert td.remove(model, name) is layer
    assert tail_dropouts(model) == {}
    assert repr(model) == before
    assert hook_counts(model) == hooks
    assert_close(model.train()(x), expected, rtol=0, atol=0)
    td.insert(model, at, layer)  # which is free again


def hook_counts(model):
    return {name: len(module._forward_hooks) for name, module in model.named_modules()}


def test_only_the_layer_that_is_named_is_removed():
    model, x = Block(), torch.randn(4, 5)
    td.insert(model, "inner", TailDropout())
    kept = td.insert(model, "inner", TailDropout())
    other = model.inner.register_forward_hook(lambda module, inputs, output: None)
    first, second = tail_dropouts(model)
    td.remove(model, first)
    assert tail_dropouts(model) == {second: kept}
    assert other.id in model.inner._forward_hooks
    with kept.using_k(2):
        assert_close(model(x), by_hand(model, x, "inner", torch.full((4,), 2)))


@pytest.mark.parametrize("at", ["inner", "stack"])
def test_of_several_layers_behind_a_module_the_last_is_removed_first(at):
    model = Block()
    layers = [td.insert(model, at, TailDropout()) for _ in range(3)]
    assert [td.remove(model, at) for _ in range(3)] == layers[::-1]
    assert tail_dropouts(model) == {}


def test_a_layer_behind_a_layer_is_removed():
    model = nn.Sequential(TailDropout(), nn.Linear(2, 2))
    layer = td.insert(model, "0", TailDropout())
    assert td.remove(model, "0") is layer
    assert tail_dropouts(model) == {"0": model[0]}


class OwnLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.tail_dropout = TailDropout()

    def forward(self, x):
        return self.tail_dropout(x)


@pytest.mark.parametrize("name", ["", "tail_dropout"])
def test_a_layer_that_the_model_calls_by_this_name_is_not_removed(name):
    model = OwnLayer()
    with pytest.raises(ValueError, match=f"name must be that of an inserted layer, got '{name}'"):
        td.remove(model, name)
    assert list(tail_dropouts(model)) == ["tail_dropout"]


def test_a_layer_is_removed_from_a_copy():
    model, x = Block(), torch.randn(4, 5)
    layer = td.insert(model, "inner", TailDropout())
    twin = copy.deepcopy(model)
    td.remove(twin, "inner.tail_dropout")
    assert tail_dropouts(model) == {"inner.tail_dropout": layer}
    with layer.using_k(0):
        assert_close(model(x), by_hand(model, x, "inner", torch.zeros(4)))
    assert_close(twin(x), model.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["nowhere", "inner", "0", "inner.tail_dropout"])
def test_only_inserted_layers_are_removed(name):
    model = nn.Sequential(TailDropout(), Block())  # the layer '0' is the user's own
    with pytest.raises(ValueError, match=f"name must be that of an inserted layer, got '{name}'"):
        td.remove(model, name)
    assert list(tail_dropouts(model)) == ["0"]


# ------------------------------------------------------------------------------------ replacement


class Dropouts(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.AlphaDropout(0.4))
        self.last = nn.Dropout(0.2)
        self.same = self.last

    def forward(self, x):
        return self.same(self.last(self.mlp(self.attention(x))))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", ["attention.1", "mlp.1", "last", "same"]),
        ("*.1", ["attention.1", "mlp.1"]),
        ("mlp.*", ["mlp.1"]),
        ("[al]*", ["attention.1", "last"]),
        ("m?p.1", ["mlp.1"]),
    ],
)
def test_dropouts_whose_names_match_are_replaced(pattern, names):
    model = Dropouts()
    ps = {name: model.get_submodule(name).p for name in names}
    assert sorted(td.replace_dropout(model, pattern)) == sorted(names)
    for name, p in ps.items():
        assert type(model.get_submodule(name)) is TailDropout
        assert model.get_submodule(name).p == p
    left = [
        name for name, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Dropout
    ]
    assert sorted([*left, *names]) == ["attention.1", "last", "mlp.1", "same"]
    assert type(model.mlp[2]) is nn.AlphaDropout


def test_one_dropout_with_two_names_becomes_one_layer():
    model = Dropouts()
    td.replace_dropout(model)
    assert model.same is model.last


def test_options_are_those_of_the_layer():
    model = Dropouts().eval()
    td.replace_dropout(model, "mlp.1", batch_dim=(0, 1), dropout_dim=2, stratified=False)
    layer = model.mlp[1]
    assert (layer.batch_dim, layer.dropout_dim, layer.stratified) == ((0, 1), 2, False)
    assert not layer.training
    td.replace_dropout(model, "attention.1", p=0.9)
    assert model.attention[1].p == 0.9


def test_what_is_replaced_leaves_the_state_dict_and_the_order_as_they_are():
    model, x = Dropouts().eval(), torch.randn(3, 4)
    keys, names, expected = list(model.state_dict()), list(dict(model.named_modules())), model(x)
    td.replace_dropout(model)
    assert list(model.state_dict()) == keys
    assert list(dict(model.named_modules())) == names
    assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("pattern", ["nowhere", "mlp", "mlp.2", "MLP.1", ""])
def test_a_pattern_that_matches_no_dropout(pattern):
    with pytest.raises(ValueError, match=f"pattern must match .* got '{pattern}'"):
        td.replace_dropout(Dropouts(), pattern)


def test_bad_options_replace_nothing():
    model = Dropouts()
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 2"):
        td.replace_dropout(model, p=2)
    assert tail_dropouts(model) == {}
