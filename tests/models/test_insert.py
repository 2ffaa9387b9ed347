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


# -------------------------------------------------------------------------------- at the input


@pytest.mark.parametrize("at", ["", "inner", "stack.0", "out", "parts.0"])
def test_a_layer_at_the_input_cuts_what_the_module_reads(at):
    model, x = Block(), torch.randn(6, 5)
    plain, seen = copy.deepcopy(model), []
    plain.get_submodule(at).register_forward_pre_hook(
        lambda module, args: (torch.where(torch.arange(args[0].shape[-1]) < 2, args[0], 0),)
    )
    layer = td.insert(model, at, TailDropout(), at="input")
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[-1]))
    keys = list(plain.state_dict())
    assert list(model.state_dict()) == keys
    with td.at_width(model, 2):
        assert_close(model(x), plain(x), rtol=0, atol=0)
    assert len(seen) == 1
    assert td.remove(model, at) is layer
    assert not model.get_submodule(at)._forward_pre_hooks_with_kwargs
    assert_close(model(x), Block.forward(model, x), rtol=0, atol=0)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attends()

    def forward(self, x):
        return self.attention(hidden=x, scale=2)


class Attends(nn.Module):
    def forward(self, hidden, scale):
        return hidden * scale


def test_an_input_that_is_given_by_its_name_goes_through_the_layer():
    model, x = Keywords(), torch.ones(1, 3)
    td.insert(model, "attention", TailDropout(), at="input").set_k(1)
    assert model(x).tolist() == [[2, 0, 0]]


def test_layers_at_the_input_and_at_the_output_are_two():
    model, x = nn.Sequential(nn.Identity()), torch.ones(1, 3)
    first = td.insert(model, "0", TailDropout(), at="input")
    second = td.insert(model, "0", TailDropout())
    with first.using_k(2), second.using_k(1):
        assert model(x).tolist() == [[1, 0, 0]]
    assert td.remove(model, "0") is second
    with first.using_k(2):
        assert model(x).tolist() == [[1, 1, 0]]
    assert td.remove(model, "0") is first


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_a_layer_of_its_own_at_the_input(duplicate):
    model, x = Block().eval(), torch.randn(3, 5)
    layer = td.insert(model, "out", TailDropout(), at="input")
    copied = duplicate(model)
    with layer.using_k(0):
        assert_close(model(x), model.parts[0](model.out.bias).expand(3, 3))
        assert_close(copied(x), Block.forward(copied, x), rtol=0, atol=0)
    td.remove(copied, "out")
    assert list(td.tail_dropouts(model).values()) == [layer]
    assert td.tail_dropouts(copied) == {}


def test_a_sequential_would_run_a_layer_at_its_end():
    with pytest.raises(ValueError, match=r"'stack' is a Sequential, .* name its first child"):
        td.insert(Block(), "stack", TailDropout(), at="input")


def test_at_is_one_of_two_words():
    with pytest.raises(ValueError, match='at must be "output" or "input", got \'front\''):
        td.insert(Block(), "inner", TailDropout(), at="front")


@pytest.mark.parametrize("inputs", [(), ("text",), ([torch.ones(2)],)])
def test_an_input_that_is_no_tensor_is_refused_in_the_call(inputs):
    class AnyInput(nn.Module):
        def forward(self, x=None):
            return x

    model = nn.ModuleDict({"any": AnyInput()})
    td.insert(model, "any", TailDropout(), at="input")
    with pytest.raises(TypeError, match="the first input of AnyInput must be a tensor"):
        model["any"](*inputs)


# ------------------------------------------------------------------------------------ insert_each


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.shared = self.blocks[0].inner

    def forward(self, x):
        return sum(block(x) for block in self.blocks)


OUTS = ["blocks.0.out", "blocks.1.out", "blocks.2.out"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("blocks.*.out", OUTS),
        (r"re:blocks\.[02]\.out", [OUTS[0], OUTS[2]]),
        (OUTS[1:], OUTS[1:]),
        (lambda module, name: isinstance(module, nn.Linear) and module.in_features == 5,
         ["blocks.0.inner", "blocks.1.inner", "blocks.2.inner"]),
        ("*inner", ["blocks.0.inner", "blocks.1.inner", "blocks.2.inner"]),  # shared is the first
    ],
)  # fmt: skip
@pytest.mark.parametrize("at", ["output", "input"])
def test_each_module_that_matches_gets_a_copy(pattern, names, at):
    model, layer = Stack(), TailDropout(0.3, multiple_of=2)
    layers = td.insert_each(model, pattern, layer, at=at)
    assert list(layers.values()) == list(td.tail_dropouts(model).values())
    assert list(layers) == names
    for name, inserted in layers.items():
        assert inserted is not layer
        assert inserted is model.get_submodule(name).tail_dropout
        assert repr(inserted) == repr(layer)
    for name in layers:
        td.remove(model, name)
    assert td.tail_dropouts(model) == {}


def test_a_layer_answers_to_the_name_of_its_module():
    model, x = Stack().eval(), torch.randn(4, 5)
    td.insert_each(model, "blocks.*.out", TailDropout(), at="input")
    with td.at_width(model, {"blocks.1.out": 2}):
        given = model(x)
    with td.at_width(model, {"blocks.1.out.tail_dropout": 2}):
        assert_close(model(x), given, rtol=0, atol=0)
    small = td.prune(model, {"blocks.1.out": 2}, x)
    assert small.blocks[1].stack[1].out_features == 2
    curve = td.scree(model, nn.MSELoss(), [(x, torch.randn(4, 3))], layer="blocks.0.out",
                     ks=[0, 8], progress=False)  # fmt: skip
    assert curve.layer == "blocks.0.out.tail_dropout"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nowhere", "none fits 'nowhere'"),
        ([], r"none fits \[\]"),
        (["blocks.0.out", "blocks.9.out"], "must be that of a module of the model, got 'blocks.9"),
        (["blocks.0.out", "blocks"], "'blocks' is a ModuleList"),
    ],
)
def test_a_layer_is_inserted_everywhere_or_nowhere(pattern, message):
    model = Stack()
    with pytest.raises(ValueError, match=message):
        td.insert_each(model, pattern, TailDropout())
    assert td.tail_dropouts(model) == {}


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


def test_what_can_not_be_inserted_everywhere_is_inserted_nowhere():
    model = Stack()
    with pytest.raises(ValueError, match="is a Sequential, which would run the layer at its end"):
        td.insert_each(model, "blocks.*", TailDropout(), at="input")
    assert td.tail_dropouts(model) == {}
