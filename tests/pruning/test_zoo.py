"""Whole architectures and the structures that they consist of: pruned exactly, and to what."""

import copy
import functools
import inspect
import io
import pickle
from dataclasses import dataclass

import onnxruntime
import pytest
import torch
from helpers.oracle import assert_same, assert_same_outputs, masked, snapshot
from helpers.zoo import ANY, NETWORKS, PARTS, Case, floats, linear, recurrent, sequence, wired
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import taildropout as td
from taildropout import TailDropout
from taildropout.models.copies import tensors_by_name
from taildropout.models.inputs import call

ZOO = {**NETWORKS, **PARTS}
PLACES = ["one", "half", "all but one", "all"]
EVERY = [(name, place) for name in ZOO for place in PLACES]
NONE = [(name, "none") for name in ZOO]
LEFT = [(name, "none") for name, case in ZOO.items() if case.zero]


@dataclass(frozen=True)
class Pruned:
    case: Case
    model: nn.Module
    ks: dict[str, int]
    plan: td.PrunePlan
    small: nn.Module
    before: dict[str, object]
    after: dict[str, object]


@functools.cache
def pruned(name: str, place: str) -> Pruned:
    """A network of the zoo, and what was made of it. For reading only."""
    torch.manual_seed(sum(map(ord, name + place)))
    case = ZOO[name]
    model, ks = case.make(), case.ks(place)
    inputs = case.inputs(2)
    before = snapshot(model)
    plan = td.plan_pruning(model, ks, inputs)
    small = plan.apply(model)
    return Pruned(case, model, ks, plan, small, before, snapshot(model))


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in tensors_by_name(model).items()}


# ------------------------------------------------------------------------------------ the promise


@pytest.mark.parametrize(("name", "place"), EVERY + NONE)
def test_the_small_network_computes_what_the_masked_one_does(name, place):
    p = pruned(name, place)
    for samples in (2, 5):
        assert_same_outputs(p.small, p.model, p.ks, *p.case.inputs(samples))


@pytest.mark.parametrize(("name", "place"), EVERY + LEFT)
def test_exactly_these_weights_are_smaller(name, place):
    p = pruned(name, place)
    stated = p.case.shapes(*p.ks.values())
    whole, found = shapes(p.model), shapes(p.small)
    settled = {tensor for tensor in {**whole, **found, **stated} if stated.get(tensor, ()) != ANY}
    expected = {t: stated.get(t, whole.get(t)) for t in settled}
    assert {t: found.get(t) for t in settled} == expected


@pytest.mark.parametrize(("name", "place"), EVERY + NONE)
def test_the_original_is_bit_for_bit_untouched(name, place):
    p = pruned(name, place)
    assert_same(p.after, p.before)


@pytest.mark.parametrize(("name", "place"), EVERY + NONE)
def test_the_costs_are_those_of_the_small_network(name, place):
    p = pruned(name, place)
    for cost, model in ((p.plan.before, p.model), (p.plan.after, p.small)):
        assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert f"{p.plan.after.parameters:,}" in p.plan.summary()


@pytest.mark.parametrize("name", ZOO)
def test_what_stays_is_named_with_a_reason(name):
    p = pruned(name, "half")
    told = [f"{stay.name}: {stay.reason}".lower() for stay in p.plan.stays]
    assert all(stay.name and stay.reason for stay in p.plan.stays)
    for word in p.case.stays:
        assert any(word in line for line in told), told
    for stay in p.plan.stays:
        assert stay.name in p.plan.summary()
        assert stay.reason in p.plan.summary()


WHOLLY = [
    name
    for name, case in ZOO.items()
    if not case.stays and ANY not in case.shapes(*case.n).values()
]


@pytest.mark.parametrize("name", WHOLLY)
def test_nothing_stays_where_everything_goes(name):
    assert list(pruned(name, "half").plan.stays) == []


# ------------------------------------------------------------------- the small network afterwards


# Here a feature goes because its partner is in the tail: what is left is no prefix.
PREFIXES = [name for name in ZOO if name != "the layer before a chunk"]


@pytest.mark.parametrize("name", PREFIXES)
def test_prefixes_of_the_small_network_are_those_of_the_large_one(name):
    """A smaller k set afterwards: what is left of a layer still orders its features."""
    p = pruned(name, "all but one")
    smaller = {layer: max(1, k - 2) for layer, k in p.ks.items()}
    inputs = p.case.inputs(3)
    expected = masked(p.model, smaller, *inputs)
    assert_close(masked(p.small, smaller, *inputs), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", PREFIXES)
def test_a_small_network_can_be_pruned_again(name):
    p = pruned(name, "all but one")
    smaller = {layer: max(1, k // 2) for layer, k in p.ks.items()}
    again = td.prune(p.small, smaller, p.case.inputs(2))
    assert_same_outputs(again, p.model, smaller, *p.case.inputs(5))
    at_once = td.prune(p.model, smaller, p.case.inputs(2))
    assert shapes(again) == shapes(at_once)


@pytest.mark.parametrize("name", ZOO)
def test_a_saved_network_comes_back_in_a_fresh_one(name, tmp_path):
    p = pruned(name, "half")
    path = tmp_path / "small.safetensors"
    td.save_pruned(p.small, p.plan, path)
    loaded = td.load_pruned(p.case.make(), path).eval()
    assert_same(dict(loaded.state_dict()), dict(p.small.state_dict()))
    assert repr(loaded) == repr(copy.deepcopy(p.small).eval())
    inputs = p.case.inputs(3)
    with torch.no_grad():
        expected = copy.deepcopy(p.small)(*inputs)
        assert_close(loaded(*inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["tied weights that lose the same features", "GPT-2", "T5"])
def test_tied_weights_stay_tied(name, tmp_path):
    p = pruned(name, "half")
    path = tmp_path / "small.safetensors"
    td.save_pruned(p.small, p.plan, path)
    loaded = td.load_pruned(p.case.make(), path)
    assert ties(p.model)
    assert ties(p.small) == ties(copy.deepcopy(p.small)) == ties(loaded) == ties(p.model)


def ties(model):
    """The names that mean one tensor."""
    names = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return sorted(group for group in names.values() if len(group) > 1)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_and_stand_alone(name, duplicate):
    p = pruned(name, "half")
    twin = duplicate(p.small)
    inputs = p.case.inputs(3)
    with torch.no_grad():
        expected = p.small(*inputs)
        assert_close(twin(*inputs), expected, rtol=0, atol=0)
        for parameter in twin.parameters():
            parameter.zero_()
        for layer in td.tail_dropouts(twin).values():
            layer.set_k(0)
        assert_close(p.small(*inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_of_the_small_network_learns(name):
    """Those that learn in the large one do in the small one, in training mode."""
    p = pruned(name, "half")
    new = shapes(p.small).keys() - shapes(p.model).keys()  # biases that take in constants
    learning = []
    for model in (p.model, p.small):
        model = copy.deepcopy(model).train()
        outputs = tree_leaves(call(model, p.case.inputs(4)))
        sum(out.square().sum() for out in outputs if out.is_floating_point()).backward()
        learning.append({name for name, t in model.named_parameters() if t.grad is not None})
        assert all(t.grad is None or t.grad.isfinite().all() for t in model.parameters())
    assert learning[0] | new == learning[1]


# ------------------------------------------------------ p after pruning, whichever sides were cut

SIDES = {
    "both": (sequence(linear(16, 5), TailDropout, linear(3, 16)), (5,), 1),
    "the consumer only": (
        sequence(recurrent(nn.GRU, 5, 16), TailDropout, linear(3, 16)),
        (1, 5),
        1,
    ),
    "the producer only": (
        wired(lambda m, x: x + m.tail(m.inner(x)), inner=linear(16, 16), tail=TailDropout),
        (16,),
        "tail",
    ),
}


@pytest.mark.parametrize("side", SIDES)
def test_p_is_the_same_fraction_of_what_is_left(side, assert_drawn_from):
    build, shape, _ = SIDES[side]
    model = build().double()
    small = td.prune(model, 6, floats(2, *shape)).train()
    (layer,) = td.tail_dropouts(small).values()
    layer.stratified = False
    small(floats(4000, *shape))
    assert_drawn_from(layer.drawn_k.flatten(), td.lengths.Exponential(0.5).pmf(6))


@pytest.mark.parametrize("side", SIDES)
def test_training_drops_a_tail_of_what_is_left(side):
    """In training the small network is, sample by sample, the large one at the k drawn."""
    build, shape, _ = SIDES[side]
    model = build().double()
    small = td.prune(model, 6, floats(2, *shape)).train()
    inputs = floats(32, *shape)
    actual = small(inputs)
    (layer,) = td.tail_dropouts(small).values()
    (large,) = td.tail_dropouts(model).values()
    with large.using_k(layer.drawn_k):
        assert_close(actual, model(inputs), rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------------ compile, export, ONNX

# Both sides cut, the consumer only, the producer only, constants folded, heads.
DEPLOYED = [
    "U-Net",
    "ResNet",
    "LayerNorm before",
    "residual branch",
    "concatenation of constants",
    "attention",
]


@pytest.mark.parametrize("name", DEPLOYED)
def test_the_small_network_compiles(name, fresh_compiler):
    p = pruned(name, "half")
    inputs = p.case.inputs(3)
    with torch.no_grad():
        compiled = torch.compile(copy.deepcopy(p.small), fullgraph=True, backend="aot_eager")
        assert_close(compiled(*inputs), masked(p.model, p.ks, *inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", DEPLOYED)
def test_the_small_network_exports(name):
    p = pruned(name, "half")
    program = torch.export.export(copy.deepcopy(p.small), p.case.inputs(3), strict=False)
    inputs = p.case.inputs(3)
    actual = program.module()(*inputs)
    assert_close(actual, masked(p.model, p.ks, *inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["U-Net", "residual branch", "concatenation of constants", "BERT"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_small_network_runs_in_onnxruntime(name):
    p = pruned(name, "half")
    small = copy.deepcopy(p.small).float()
    inputs = tuple(t.float() if t.is_floating_point() else t for t in p.case.inputs(3))
    file = io.BytesIO()
    torch.onnx.export(small, inputs, dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    feed = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
    actual = [torch.from_numpy(array) for array in session.run(None, feed)]
    expected = tree_leaves(masked(copy.deepcopy(p.model).float(), p.ks, *inputs))
    assert_close(actual, expected, rtol=1e-4, atol=1e-4)


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


def test_every_case_states_its_own_width():
    """The numbers that the shapes are worked out from are those of the models."""
    for case in ZOO.values():
        assert len(inspect.signature(case.shapes).parameters) in (1, len(case.n))
        model = case.make()
        widths = {name: [] for name in td.tail_dropouts(model)}
        for name, layer in td.tail_dropouts(model).items():
            layer.register_forward_hook(functools.partial(note_width, widths[name]))
        model(*case.inputs(2))
        assert [set(seen) for seen in widths.values()] == [{n} for n in case.n]


def note_width(widths, layer, inputs, output):
    widths.append(output.shape[layer.dropout_dim])
