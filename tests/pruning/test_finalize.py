"""A network without the library computes the same, and needs no library to be loaded."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from helpers.oracle import (
    LeNet,
    Net,
    as_trained,
    assert_same,
    assert_same_outputs,
    chain,
    masked,
    snapshot,
)
from helpers.zoo import branches, convolutional_networks, norms, other_networks
from helpers.zoo import transformer_networks as transformers
from helpers.zoo.checks import pruned
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

import taildropout as td
from taildropout import TailDropout, TailMLP

X = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def modules_of_the_library(model):
    kinds = [type(module) for module in model.modules()]
    return [kind for kind in kinds if kind.__module__.startswith("taildropout")]


def assert_plain(final, model):
    """No trace of the library, all keys as they were, and the same outputs in both modes."""
    assert modules_of_the_library(final) == []
    assert b"taildropout" not in pickle.dumps(final)
    assert_same(dict(final.state_dict()), dict(model.state_dict()))
    assert list(final.state_dict()) == list(model.state_dict())


# ------------------------------------------------------------------------------- what layers become


def test_a_layer_becomes_an_identity():
    model = chain(6, nn.Sigmoid()).double()
    small = td.prune(model, 4, X)
    before = snapshot(small)
    final = td.finalize(small)
    assert_same(snapshot(small), before)
    assert type(final[1]) is nn.Identity
    assert_plain(final, small)
    assert_same_outputs(final, model, {"1": 4}, X)


def test_the_copy_has_tensors_of_its_own():
    small = td.prune(chain(6).double(), 4, X)
    final = td.finalize(small)
    assert not {t.data_ptr() for t in final.parameters()} & {
        t.data_ptr() for t in small.parameters()
    }


def test_nothing_is_dropped_in_training():
    small = td.prune(chain(6).double(), 4, X).train()
    final = td.finalize(small)
    assert final.training
    assert all(module.training for module in final.modules())
    assert_close(final(X), td.finalize(small).eval()(X), rtol=0, atol=0)
    assert not td.finalize(small.eval()).training


def test_a_whole_network_that_was_not_pruned():
    model = as_trained(LeNet()).double().eval()
    final = td.finalize(model)
    assert_plain(final, model)
    assert [type(m) for m in (final.tail1, final.tail2, final.tail3)] == [nn.Identity] * 3
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    assert_close(final(x), model(x), rtol=0, atol=0)


def test_a_layer_alone():
    assert type(td.finalize(TailDropout())) is nn.Identity


def test_one_layer_in_two_places_becomes_one_module():
    layer = TailDropout()
    model = nn.Sequential(nn.Linear(5, 4), layer, nn.Linear(4, 4), layer, nn.Linear(4, 2))
    final = td.finalize(model)
    assert type(final[1]) is nn.Identity
    assert final[1] is final[3]


def test_layers_in_containers():
    model = nn.Module()
    model.list = nn.ModuleList([nn.Linear(2, 2), TailDropout()])
    model.dict = nn.ModuleDict({"tail": TailDropout(), "no": nn.Linear(2, 2)})
    final = td.finalize(model)
    assert_plain(final, model)
    assert list(final.dict) == ["tail", "no"]


def test_an_inserted_layer_goes_with_its_hook():
    model = chain(6, nn.Tanh()).double()
    del model[1]
    td.insert(model, "0", TailDropout())
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    small = td.prune(model, 4, X)
    final = td.finalize(small)
    assert list(final[0].children()) == []
    seen.clear()
    assert_same_outputs(final, model, {"0.tail_dropout": 4}, X)
    assert seen == [(3, 4), (3, 6)]  # the user's hook is still there
    assert len(final[0]._forward_hooks) == 1
    assert len(model[0]._forward_hooks) == len(small[0]._forward_hooks) == 2


def test_a_layer_inserted_into_a_sequential():
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 6)), nn.Linear(6, 2)).double()
    td.insert(model, "0", TailDropout())
    final = td.finalize(td.prune(model, 4, X))
    assert modules_of_the_library(final) == []
    assert_same_outputs(final, model, {"0.tail_dropout": 4}, X)


def test_a_users_hook_on_a_layer_stays():
    seen = []
    model = chain(6).double()
    handle = model[1].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    td.finalize(td.prune(model, 4, X))(X)
    assert seen[-1] is nn.Identity
    handle.remove()


# ------------------------------------------------------------------------------------------ TailMLP


@pytest.mark.parametrize(
    "activation",
    [nn.GELU, nn.PReLU, functional.silu, torch.tanh],
    ids=["GELU", "PReLU", "silu", "tanh"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_tail_mlp_becomes_a_sequential_with_its_keys(activation, bias):
    mlp = TailMLP(5, 8, 4, activation=activation, bias=bias)
    model = nn.Sequential(mlp, nn.Linear(4, 2)).double()
    small = td.prune(model, 3, X)
    final = td.finalize(small)
    assert type(final[0]) is nn.Sequential
    assert [name for name, _ in final[0].named_children()] == ["fc1", "activation", "fc2"]
    assert_plain(final, small)
    assert_same_outputs(final, model, {"0.dropout": 3}, X)


@pytest.mark.parametrize("activation", [nn.PReLU, functional.silu], ids=["PReLU", "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gated_tail_mlp_becomes_a_module_of_torch_with_its_keys(activation, bias):
    mlp = TailMLP(5, 8, 4, activation=activation, bias=bias, gated=True)
    model = nn.Sequential(mlp, nn.Linear(4, 2)).double()
    small = td.prune(model, 3, X)
    final = td.finalize(small)
    assert isinstance(final[0], torch.fx.GraphModule)
    assert [module.weight.shape for module in (final[0].gate, final[0].up)] == [(3, 5), (3, 5)]
    assert_plain(final, small)
    assert_same_outputs(final, model, {"0.dropout": 3}, X)


def test_an_activation_that_is_a_function_of_ones_own():
    model = nn.Sequential(TailMLP(5, 8, activation=lambda x: x.relu()))
    with pytest.raises(ValueError, match=r"activation of TailMLP '0' must be a module .* got <fun"):
        td.finalize(model)


# ----------------------------------------------------------------------- layers that slice or fill


def slicing(m, x):
    return m.consumer(m.tail(m.producer(x).softmax(-1)))


def filling(m, x):
    return m.consumer(m.tail(m.producer(x)).softmax(-1))


def slicing_and_filling(m, x):
    return m.tail(m.producer(x).softmax(-1)).softmax(-1)


# What the layer stands between, and how many of 6 features arrive and go on at k = 2.
FITTED = {
    "slices": (slicing, (6, 2)),
    "adds zeros": (filling, (2, 6)),
    "both": (slicing_and_filling, (6, 6)),
}


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("k", [0, 2, 5])
def test_features_are_sliced_and_filled_up_as_before(name, k):
    forward, (arrives, leaves) = FITTED[name]
    model = Net(forward, n=6).double()
    small = td.prune(model, k, X)
    final = td.finalize(small)
    assert_plain(final, small)
    assert_same_outputs(final, model, {"tail": k}, X)
    pads = [m for m in final.tail.modules() if type(m) is nn.ConstantPad1d]
    expected = [k - 6] if arrives == 6 else []
    expected += [6 - k] if leaves == 6 else []
    assert [pad.padding for pad in pads] == [(0, amount) for amount in expected]


@pytest.mark.parametrize("name", FITTED)
def test_gradients_are_those_of_the_cut_network(name):
    small = td.prune(Net(FITTED[name][0], n=6).double(), 2, X).eval()
    final = td.finalize(small)
    for model in (small, final):
        model(X).square().sum().backward()
    for one, other in zip(small.parameters(), final.parameters(), strict=True):
        assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


class ImageNet(nn.Module):
    """Channels with `dims` dims behind them, all of which are needed."""

    def __init__(self, dims):
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2, 6, 1)
        self.tail = TailDropout(dropout_dim=1)

    def forward(self, x):
        return self.tail(self.conv(x)).softmax(1)


def image_net(dims):
    return ImageNet(dims).double(), torch.randn(2, 2, *[4] * dims, dtype=torch.float64)


@pytest.mark.parametrize("dims", [1, 2])
def test_channels(dims):
    model, x = image_net(dims)
    small = td.prune(model, 4, x)
    final = td.finalize(small)
    assert_plain(final, small)
    assert_same_outputs(final, model, {"tail": 4}, x)
    program = torch.export.export(final.eval(), (x,))
    assert_close(program.module()(x), masked(model, {"tail": 4}, x), rtol=1e-10, atol=1e-12)


def test_what_is_left_of_a_layer_cut_twice():
    model = Net(FITTED["slices"][0], n=6).double()
    final = td.finalize(td.prune(td.prune(model, 4, X), 2, X))
    assert_same_outputs(final, model, {"tail": 2}, X)


def test_a_cut_network_from_a_file(tmp_path):
    model = Net(FITTED["both"][0], n=6).double()
    plan = td.plan_pruning(model, 2, X)
    td.save_pruned(plan.apply(model), plan, tmp_path / "small.safetensors")
    fresh = Net(FITTED["both"][0], n=6).double()
    final = td.finalize(td.load_pruned(fresh, tmp_path / "small.safetensors"))
    assert_plain(final, plan.apply(model))
    assert_close(final(X), masked(model, {"tail": 2}, X), rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------------------- what is refused


def test_a_k_that_is_set_is_refused():
    model = chain(6)
    words = r"no k may be set .* layer '1' is TailDropout\(.*{}\): prune first, or set_k\(None\)"
    with model[1].using_k(6), pytest.raises(ValueError, match=words.format("k=6")):
        td.finalize(model)
    with td.at_width(model, 0.5), pytest.raises(ValueError, match=words.format("width=0.5")):
        td.finalize(model)
    model[1].set_k(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="no k may be set"):
        td.finalize(model)
    model[1].set_k(None)
    assert type(td.finalize(model)[1]) is nn.Identity


def test_an_inserted_layer_that_fills_up_is_refused():
    model = nn.Sequential(nn.Linear(5, 6), nn.Softmax(-1), nn.Linear(6, 2)).double()
    td.insert(model, "0", TailDropout())
    small = td.prune(model, 4, X)
    with pytest.raises(
        ValueError, match=r"layer '0.tail_dropout' was inserted, and slices .* no h"
    ):
        td.finalize(small)


def test_more_dims_than_torch_has_modules_for_are_refused():
    model, x = image_net(3)
    small = td.prune(model, 4, x)
    with pytest.raises(ValueError, match=r"layer 'tail' slices .* 3 dims from the end: .* up to 2"):
        td.finalize(small)


def test_a_layer_called_in_several_ways_is_refused():
    def forward(m, x):
        return m.tail(m.producer(x)).softmax(-1) + m.tail(m.other(x).softmax(-1)).softmax(-1)

    model = Net(forward, n=6).double()
    small = td.prune(model, 4, X)
    assert_same_outputs(small, model, {"tail": 4}, X)
    with pytest.raises(ValueError, match=r"layer 'tail' slices .* is called in several ways"):
        td.finalize(small)


class OfOnesOwn(TailDropout):
    def forward(self, input):
        return 2 * super().forward(input)


def test_a_forward_of_ones_own_is_refused():
    with pytest.raises(ValueError, match="module '0' is a OfOnesOwn, whose forward is its own"):
        td.finalize(nn.Sequential(OfOnesOwn()))


# ----------------------------------------------------------------------------- without the library

WITHOUT = """
import sys, torch
sys.modules["taildropout"] = None
final = torch.load({path!r}, weights_only=False)
inputs, expected = torch.load({data!r})
torch.testing.assert_close(final(inputs), expected, rtol=0, atol=0)
assert not [name for name in sys.modules if name.startswith("taildropout.")]
try:
    import taildropout
except ImportError:
    print("no library, same outputs")
"""


def test_it_is_loaded_where_the_library_is_not_installed(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        *(nn.BatchNorm2d(4), TailDropout(dropout_dim=1), nn.Softmax(1)),
        *(nn.Flatten(), TailMLP(36, 8, 5), nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 2)),
    ).double()
    td.insert(model, "6", TailDropout())
    model = as_trained(model).eval()
    x = torch.randn(3, 1, 5, 5, dtype=torch.float64)
    ks = {"2": 2, "5.dropout": 3, "6.tail_dropout": 4}
    small = td.prune(model, ks, x)
    final = td.finalize(small).eval()
    assert_plain(final, small)
    assert_same_outputs(final, model, ks, x)
    path, data = str(tmp_path / "final.pt"), str(tmp_path / "data.pt")
    torch.save(final, path)
    torch.save((x, final(x).detach()), data)
    code = WITHOUT.format(path=path, data=data)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "no library, same outputs", run.stderr


def test_what_was_not_finalized_is_not(tmp_path):
    """The check above can fail."""
    torch.save(chain(4), tmp_path / "small.pt")
    code = WITHOUT.format(path=str(tmp_path / "small.pt"), data="")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "taildropout" in run.stderr
    assert run.returncode != 0


# ---------------------------------------------------------------------------------------- the zoo

FAMILIES = [branches, convolutional_networks, norms, other_networks, transformers]
ZOO = {name: case for family in FAMILIES for name, case in family.CASES.items()}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", ZOO)
def test_every_network_of_the_zoo(name):
    p = pruned(name, "half", ZOO[name])
    final = td.finalize(copy.deepcopy(p.small))
    assert modules_of_the_library(final) == []
    assert list(final.state_dict()) == list(p.small.state_dict())
    assert_same_outputs(final, p.model, p.ks, *p.case.inputs(3))
