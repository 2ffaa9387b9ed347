"""What is saved of a pruned network, and what comes back."""

import copy
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.oracle import LeNet, as_trained, assert_same, chain, snapshot
from helpers.zoo import branches, transformer_networks
from helpers.zoo.checks import pruned
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import taildropout as td
from taildropout import PruningError, TailDropout

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


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
    assert record["format"] == 2
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
        lambda p: rewrite(p, lambda r: r | {"format": 3}),
        "has format 3, .* reads up to 2: update taildropout",
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


def test_the_record_is_plain_data():
    plan = td.plan_pruning(chain(4, nn.Sigmoid()), 2, X)
    record = plan.to_dict()
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "format": 2,
        "k": {"1": 2},
        "n": {"1": 4},
        "cuts": [
            ["0.weight", 0, 4, [0, 1]],
            ["0.bias", 0, 4, [0, 1]],
            ["3.weight", 1, 4, [0, 1]],
        ],
        "biases": ["3.bias"],
        "fits": [],
        "rescales": [],
        "to_linears": [],
    }


TIED = {**branches.CASES, **transformer_networks.CASES}


@pytest.mark.parametrize("name", ["tied weights that lose the same features", "GPT-2", "T5"])
def test_tied_weights_stay_tied(name, tmp_path):
    p = pruned(name, "half", TIED[name])
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


def test_a_rescaled_norm_is_loaded_with_its_eps(tmp_path):
    def rescaled():
        return nn.Sequential(
            nn.Linear(5, 4), TailDropout(), nn.RMSNorm(4, eps=0.3), nn.Linear(4, 3)
        ).eval()

    model, path = rescaled(), tmp_path / "small.safetensors"
    plan = td.plan_pruning(model, 2, X)
    small = plan.apply(model)
    td.save_pruned(small, plan, path)
    loaded = td.load_pruned(rescaled(), path)
    assert repr(loaded) == repr(small)
    assert_close(loaded(X), small(X), rtol=0, atol=0)
