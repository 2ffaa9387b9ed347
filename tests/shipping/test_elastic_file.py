"""One file with every width: what comes back, how much is read for it, and what is refused."""

import copy
import json
import pickle
import re
import struct
from pathlib import Path

import pytest
import scipy.stats
import torch
import transformers
from helpers.oracle import as_trained, assert_same, snapshot
from safetensors import safe_open
from torch import nn
from torch.testing import assert_close

import taildropout as td
from taildropout import PruningError, TailDropout

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.arange(12).reshape(2, 6)
MENU = [0.25, 0.5, 1.0]


def mlp(dtype=torch.float32):
    """The last Linear gets a bias at all widths but the full one, where sigmoid(0) is read."""
    return nn.Sequential(
        nn.Linear(6, 16),
        TailDropout(),
        nn.BatchNorm1d(16),
        nn.Sigmoid(),
        nn.Linear(16, 12),
        TailDropout(),
        nn.Sigmoid(),
        nn.Linear(12, 5, bias=False),
    ).to(dtype)


def convolutions(channels=8):
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(8 * channels, 16),
        nn.ReLU(),
        nn.Linear(16, 10),
    )


def tail_linears(scale="sqrt"):
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.ReLU(),
        td.TailLinear(16, 12, scale=scale),
        nn.ReLU(),
        td.TailLinear(12, 5, bias=False),
    )


def uncut_in_front():
    """LayerNorm mixes features: the first layer slices what arrives, the second adds zeros."""
    return nn.Sequential(
        *(nn.Linear(6, 16), nn.LayerNorm(16), TailDropout(), nn.Linear(16, 8)),
        *(TailDropout(), nn.LayerNorm(8), nn.Linear(8, 5)),
    )


def llama():
    config = transformers.LlamaConfig(
        vocab_size=700,
        hidden_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=20,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=20, n_embd=16, n_layer=1, n_head=4, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)


NETWORKS = {
    "MLP": (mlp, X, None),
    "bfloat16": (lambda: mlp(torch.bfloat16), X.bfloat16(), None),
    "convolutions": (convolutions, IMAGES, {}),
    "TailLinear": (tail_linears, X, None),
    "layers that slice and pad": (uncut_in_front, X, None),
    "Llama": (llama, TOKENS, {"streams": True}),
    "GPT-2": (gpt2, TOKENS, {}),
}
STORED_ONCE = ["convolutions", "TailLinear", "Llama", "GPT-2"]
EACH = [pytest.param(n, marks=[pytest.mark.slow] * (n in ("Llama", "GPT-2"))) for n in NETWORKS]


def build(name):
    """A network with new weights, in eval mode; nested, unless it has layers of its own."""
    make, x, options = NETWORKS[name]
    model = as_trained(make()).eval()
    if options is not None:
        td.nest(model, x, **options)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`files(name)`: the model and its file. Each is written once, and is not to be changed."""
    found = {}

    def file(name):
        if name not in found:
            model, path = build(name), tmp_path_factory.mktemp("files") / "model.safetensors"
            before = snapshot(model)
            td.save_elastic(model, NETWORKS[name][1], path, menu=MENU)
            assert_same(snapshot(model), before)
            found[name] = model, path
        return found[name]

    return file


@pytest.fixture
def saved(files, tmp_path):
    """The MLP and its file, to be damaged."""
    model, path = files("MLP")
    (tmp_path / "model.safetensors").write_bytes(path.read_bytes())
    return model, tmp_path / "model.safetensors"


def ties(model):
    names = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return sorted(group for group in names.values() if len(group) > 1)


# ------------------------------------------------------------------------------ what comes back


@pytest.mark.parametrize("width", MENU)
@pytest.mark.parametrize("name", EACH)
def test_a_width_is_what_prune_gives_bit_for_bit(name, width, files):
    model, path = files(name)
    x = NETWORKS[name][1]
    small, shell = td.prune(model, width, x), as_trained(copy.deepcopy(model))
    before = snapshot(shell)
    loaded = td.load_width(shell, path, width)
    assert_same(snapshot(shell), before)
    assert_same(dict(loaded.state_dict()), dict(small.state_dict()))
    assert repr(loaded) == repr(small)
    assert ties(loaded) == ties(small)
    assert not {p.data_ptr() for p in loaded.parameters()} & {
        p.data_ptr() for p in shell.parameters()
    }
    if hasattr(model, "config"):
        assert loaded.config.to_dict() == small.config.to_dict()
        assert_close(loaded(x).logits, small(x).logits, rtol=0, atol=0)
    else:
        assert_close(loaded(x), small(x), rtol=0, atol=0)


def test_a_model_without_the_layers_of_nest_takes_a_width_too(files):
    model, path = files("convolutions")
    loaded = td.load_width(convolutions().eval(), path, 0.5)
    small = td.prune(model, 0.5, IMAGES)
    assert not td.tail_dropouts(loaded)
    assert_close(loaded(IMAGES), small(IMAGES), rtol=0, atol=0)


def test_a_width_has_the_state_of_the_model_that_it_is_loaded_into(files):
    """Its dtype, its modes, what is trained; not the k that is set."""
    _, path = files("MLP")
    shell = mlp(torch.float64)
    shell[0].weight.requires_grad_(False)
    shell[3].eval()
    shell[1].set_k(2)
    loaded = td.load_width(shell, path, 0.5)
    assert {t.dtype for t in loaded.parameters()} == {torch.float64}
    assert [m.training for m in loaded] == [m.training for m in shell]
    assert not loaded[0].weight.requires_grad
    assert loaded[4].weight.requires_grad
    assert loaded[1].k is None
    assert shell[1].k == 2
    loaded(torch.randn(8, 6).double()).sum().backward()


def test_a_model_on_the_meta_device_takes_a_width(files):
    model, path = files("MLP")
    with torch.device("meta"):
        shell = mlp().eval()
    loaded = td.load_width(shell, path, 0.25)
    assert_close(loaded(X), td.prune(model, 0.25, X)(X), rtol=0, atol=0)
    assert all(p.is_meta for p in shell.parameters())


@pytest.mark.slow
def test_what_the_file_does_not_hold_must_not_be_on_the_meta_device(files):
    _, path = files("Llama")
    with torch.device("meta"):
        shell = llama()
    with pytest.raises(PruningError, match=r"inv_freq' .* not in the state dict.* on the CPU"):
        td.load_width(shell, path, 0.25)


def test_heads_that_stay_scattered_over_a_tensor(tmp_path):
    """The features behind a flatten that has the channels last: runs all over the columns."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.tail, self.last = nn.Conv2d(3, 8, 1), TailDropout(dropout_dim=1), None
            self.last = nn.Linear(8 * 64, 5)

        def forward(self, x):
            return self.last(self.tail(self.first(x)).permute(0, 2, 3, 1).flatten(1))

    model, path = Net().eval(), tmp_path / "model.safetensors"
    td.save_elastic(model, IMAGES, path, menu=MENU)
    for width in MENU:
        loaded, small = td.load_width(Net(), path, width), td.prune(model, width, IMAGES)
        assert_same(dict(loaded.state_dict()), dict(small.state_dict()))
    assert loaded.last.in_features == 8 * 64


# ---------------------------------------------------------------------------------- what is read


def bytes_read():
    """By this process so far, as the system counts them."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text()).group(1))


def wide():
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.Linear(512, 10))


LARGE = {
    "MLP": (wide, torch.randn(2, 64), {}),
    "convolutions": (lambda: convolutions(256), IMAGES, {}),
    "Llama": NETWORKS["Llama"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_width_reads_hardly_more_than_its_own_file_has(name, tmp_path):
    make, x, options = LARGE[name]
    model = make().eval()
    td.nest(model, x, **options)
    path, of_one = tmp_path / "model.safetensors", tmp_path / "small.safetensors"
    td.save_elastic(model, x, path)
    menu = td.describe(path)
    assert [item.width for item in menu.items] == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]
    td.load_width(make(), path, 1.0)  # and what it imports
    of_asking = -(bytes_read() - bytes_read())
    of_full = td.plan_pruning(model, 1.0, x)
    for item in menu.items:
        plan = of_full.at(item.width)
        small = plan.apply(model)
        td.save_pruned(small, plan, of_one)
        before = bytes_read()
        td.load_width(make(), path, item.width)
        read = bytes_read() - before - of_asking
        assert abs(read - item.bytes) < 64  # the system's own answer has some digits more or less
        assert read <= 1.05 * of_one.stat().st_size
        assert item.parameters == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("name", [one for one in EACH if one.values[0] in STORED_ONCE])
def test_each_number_is_stored_once(name, files):
    """safetensors reads the file, too."""
    model, path = files(name)
    with safe_open(path, "pt") as file:
        parts = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    adds = sum(tensor.numel() for key, tensor in parts.items() if key.endswith("adds"))
    rows = sum(m.tail_bias.nbytes for m in model.modules() if hasattr(m, "tail_bias"))
    unique = {id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}
    assert adds == sum(unique.values()) - rows
    assert all(key.startswith("only of") for key in parts if not key.endswith("adds"))


def test_damage_to_wider_parts_does_not_concern_a_width(saved):
    model, path = saved
    header, start = header_of(path)
    data = bytearray(path.read_bytes())
    for part in ("0.5 adds", "1.0 adds", "only of 0.5", "only of 1.0"):
        if part in header:
            begin, end = (start + offset for offset in header[part]["data_offsets"])
            data[begin:end] = b"\xff" * (end - begin)
    path.write_bytes(data)
    loaded = td.load_width(mlp(), path, 0.25)
    assert_same(dict(loaded.state_dict()), dict(td.prune(model, 0.25, X).state_dict()))
    with pytest.raises(PruningError, match=r"has been changed since it was written: '0\.5 adds'"):
        td.load_width(mlp(), path, 0.5)


# -------------------------------------------------------------------------------- what is refused


def header_of(path):
    """By hand: the header of a safetensors file, and where the bytes of its tensors begin."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), 8 + length


def assert_refused(path, width=1.0, words="", make=mlp):
    model = make()
    before = snapshot(model)
    with pytest.raises(PruningError, match=words) as caught:
        td.load_width(model, path, width)
    assert str(path) in str(caught.value)
    assert_same(snapshot(model), before)


def test_no_byte_of_the_header_may_change(saved):
    _, path = saved
    data = path.read_bytes()
    model, (_, start) = mlp(), header_of(path)
    before = snapshot(model)
    for place in range(start):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(PruningError):
            td.describe(path) if place % 8 else td.load_width(model, path, 1.0)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("width", MENU)
def test_no_byte_that_is_read_may_change(width, saved):
    _, path = saved
    header, start = header_of(path)
    data = path.read_bytes()
    parts = [f"{w} adds" for w in MENU if w <= width] + [f"only of {width}"]
    places = [header[part]["data_offsets"] for part in parts if part in header]
    assert len(places) >= len(parts) - 1
    for begin, end in places:
        for place in (start + begin, start + (begin + end) // 2, start + end - 1):
            path.write_bytes(data[:place] + bytes([data[place] ^ 128]) + data[place + 1 :])
            assert_refused(path, width, "has been changed since it was written")


def test_a_file_that_was_cut_or_went_on_is_refused(saved):
    _, path = saved
    data, (_, start) = path.read_bytes(), header_of(path)
    for length in (0, 4, 8, 100, start - 1, start, start + 1, len(data) - 1):
        path.write_bytes(data[:length])
        for width in MENU:
            assert_refused(path, width, "is not a whole safetensors file")
        with pytest.raises(PruningError, match="is not a whole safetensors file"):
            td.describe(path)
    path.write_bytes(data + b"\0")
    assert_refused(path, 1.0, "is not a whole safetensors file")


@pytest.mark.parametrize("part", ["0.25 adds", "only of 0.25", "header"])
def test_a_part_of_another_file_is_refused(part, saved, tmp_path):
    """Of the same network, trained otherwise."""
    _, path = saved
    other = tmp_path / "other.safetensors"
    torch.manual_seed(1)
    td.save_elastic(as_trained(mlp()).eval(), X, other, menu=MENU)
    header, start = header_of(path)
    assert header_of(other)[1] == start
    begin, end = (-start, 0) if part == "header" else header[part]["data_offsets"]
    data = path.read_bytes()
    taken = other.read_bytes()[start + begin : start + end]
    path.write_bytes(data[: start + begin] + taken + data[start + end :])
    assert_refused(path, 0.25, "has been changed since it was written")


class Payload:
    """Deletes the file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.unlink, (Path(self.path),)


def pruned(path):
    plan = td.plan_pruning(mlp(), 0.5, X)
    td.save_pruned(plan.apply(plan.model), plan, path)


FOREIGN = {
    "garbage": (lambda p: p.write_bytes(b"garbage" * 99), "is not a whole safetensors file"),
    "a pickle": (lambda p: p.write_bytes(pickle.dumps(Payload(p))), "not a whole safetensors file"),
    "a list": (lambda p: p.write_bytes(struct.pack("<Q", 2) + b"[]"), "its header is no table"),
    "a pruned network": (pruned, "was not written by save_elastic"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused(name, tmp_path):
    write, words = FOREIGN[name]
    path = tmp_path / "model.safetensors"
    write(path)
    assert_refused(path, words=words)
    with pytest.raises(PruningError, match=words):
        td.describe(path)
    assert path.exists()


def test_a_file_of_a_newer_version_is_refused(saved, monkeypatch):
    _, path = saved
    monkeypatch.setitem(td.load_width.__globals__, "FORMAT", 0)
    assert_refused(path, words="has format 1, .* reads up to 0: update taildropout")


def test_a_file_is_no_pruned_network(saved):
    _, path = saved
    with pytest.raises(PruningError, match="was not written by save_pruned"):
        td.load_pruned(mlp(), path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        td.load_width(mlp(), tmp_path / "nowhere.safetensors", 1.0)


class Another(nn.Sequential):
    """Another class."""


ANOTHER = {
    "class": (lambda: Another(*mlp()), "it is of a Sequential, got a Another"),
    "shape": (
        lambda: nn.Sequential(*mlp()[:-1], nn.Linear(12, 9, bias=False)),
        r"its '7.weight' has shape \(5, 12\), and the model has one of \(9, 12\)",
    ),
    "more": (lambda: mlp().append(nn.Linear(5, 1)), r"'8.bias' has shape None, .* of \(1,\)"),
    "less": (lambda: mlp()[:-1], r"'7.weight' has shape \(5, 12\), .* of None"),
}


@pytest.mark.parametrize("name", ANOTHER)
def test_a_file_of_another_model_is_refused(name, saved):
    make, words = ANOTHER[name]
    assert_refused(saved[1], words="is of another model than this one: .*" + words, make=make)


def test_the_layers_that_must_slice_must_be_there(files):
    """Without them, the names and shapes are the same."""
    _, path = files("layers that slice and pad")

    def without():
        model = uncut_in_front()
        model[2], model[4] = nn.Identity(), nn.Identity()
        return model

    assert_refused(path, 0.5, "is of another model than this one: '2'", without)


def test_a_width_that_is_not_on_the_menu_is_refused(saved):
    _, path = saved
    with pytest.raises(ValueError, match=r"one of \[0.25, 0.5, 1.0\], the menu of .*, got 0.3"):
        td.load_width(mlp(), path, 0.3)


def test_the_full_width_is_there_only_if_it_is_on_the_menu(saved, tmp_path):
    model, path = saved
    few = tmp_path / "few.safetensors"
    td.save_elastic(model, X, few, menu=[0.5, 0.25, 0.5])
    assert few.stat().st_size < path.stat().st_size
    for width in (0.25, 0.5):
        loaded, small = td.load_width(mlp(), few, width), td.prune(model, width, X)
        assert_same(dict(loaded.state_dict()), dict(small.state_dict()))
    with pytest.raises(ValueError, match=r"must be one of \[0.25, 0.5\]"):
        td.load_width(mlp(), few, 1.0)


@pytest.mark.parametrize(
    ("menu", "words"),
    [
        ([], "menu must be at least one width, got none"),
        ([4, 8], r"menu of several layers, '\*', must be widths, .* got 4"),
        ([0.5, 1.5], r"must be in \(0, 1\], got 1.5"),
    ],
)
def test_a_wrong_menu_is_refused(menu, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        td.save_elastic(mlp(), X, tmp_path / "model.safetensors", menu=menu)
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------- whole or not at all


class FullDisk:
    """A file on a disk that takes so many writes."""

    def __init__(self, file, writes):
        self.file, self.writes = file, writes

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.writes -= 1
        if self.writes < 0:
            self.file.write(bytes(data)[: len(data) // 2])
            raise OSError("no space left on device")
        self.file.write(data)


@pytest.mark.parametrize("writes", [0, 3, "all"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(writes, saved, monkeypatch):
    _, path = saved
    torch.manual_seed(1)
    before, model, opened = path.read_bytes(), as_trained(mlp()).eval(), Path.open

    def full(self, target):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        if writes == "all":
            patch.setattr(Path, "replace", full)
        else:
            patch.setattr(Path, "open", lambda p, *args: FullDisk(opened(p, *args), writes))
        with pytest.raises(OSError, match="no space left on device"):
            td.save_elastic(model, X, path, menu=MENU)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    td.save_elastic(model, X, path, menu=MENU)
    assert path.read_bytes() != before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# ------------------------------------------------------------------------------------- the menu


def measured(widths=(0.25, 0.5, 0.75, 1.0), **changes):
    """Of 400 samples: losses and how they vary."""
    root = torch.tensor([[3.0, 0, 0, 0], [2, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0.5, 0.5]]).double()
    data = td.Scree("*", list(widths), torch.tensor([4.0, 2, 1.5, 1]).double(), 400, root @ root.T)
    return td.Scree.from_dict(data.to_dict() | changes)


def test_describe_says_what_each_width_takes_and_loses(saved, tmp_path):
    model, path = saved
    td.save_elastic(model, X, path, menu=[0.25, 0.5], scree=measured())
    menu = td.describe(path, confidence=0.9)
    assert (menu.model, menu.count, menu.confidence, menu.largest) == ("Sequential", 400, 0.9, 1.0)
    assert [item.width for item in menu.items] == [0.25, 0.5]
    assert [item.loss for item in menu.items] == [4.0, 2.0]
    assert [item.difference for item in menu.items] == [3.0, 1.0]
    assert_close([i.stderr for i in menu.items], [(9 / 400) ** 0.5, (5 / 400) ** 0.5])
    # Student's t for one difference, and Bonferroni's bound for two.
    variances = [9 + 2.5 - 2 * 3.0, 5 + 2.5 - 2 * 3.0]
    for item, variance in zip(menu.items, variances, strict=True):
        one, two = (scipy.stats.t.ppf(level, 399) for level in (0.9, 0.95))
        error = (variance / 400) ** 0.5
        assert item.difference + one * error < item.bound < item.difference + 1.01 * two * error
    assert str(menu).splitlines()[0] == "Sequential, 2 widths"
    assert re.search(r"0\.25 .* 4 ± 0\.15 +\+3 +\+3\.\d", str(menu))
    assert "loss on 400 samples" in str(menu)
    assert "90% confidence" in str(menu)


def test_the_bound_of_one_difference_is_students(saved):
    model, path = saved
    td.save_elastic(model, X, path, menu=[0.5, 1.0], scree=measured())
    half, full = td.describe(path).items
    error = ((5 + 2.5 - 2 * 3.0) / 400) ** 0.5
    assert half.bound == pytest.approx(1 + scipy.stats.t.ppf(0.95, 399) * error, rel=1e-2)
    assert (full.difference, full.bound) == (0, 0)


def test_a_measurement_is_saved_as_it_is_made(saved):
    model, path = saved

    def loss(output, target):
        return (output - target).square().mean(-1)

    data = [(torch.randn(32, 6), torch.randn(32, 5))]
    scree = td.scree(model, loss, data, layer="*", ks=MENU, progress=False)
    td.save_elastic(model, X, path, menu=MENU, scree=scree)
    assert [item.loss for item in td.describe(path).items] == scree.loss.tolist()


def test_without_a_scree_the_menu_has_sizes_only(files):
    _, path = files("MLP")
    lines = str(td.describe(path)).splitlines()
    assert lines[1].split() == ["width", "parameters", "bytes", "to", "read"]
    assert len(lines) == 2 + len(MENU)


def test_describe_reads_the_header_only(saved):
    _, path = saved
    _, start = header_of(path)
    before = td.describe(path)
    path.write_bytes(path.read_bytes()[:start] + b"\0" * (path.stat().st_size - start))
    assert td.describe(path) == before


@pytest.mark.parametrize(
    ("scree", "words"),
    [
        (measured(ks=[1, 2, 3, 4]), r"one of all layers together, layer=\"\*\", got one of '\*'"),
        (measured(layer="1"), "one of all layers together, .* got one of '1'"),
        (measured(features="random"), "features=\"first\", got 'random'"),
        (measured(ks=[0.2, 0.3, 0.4, 1.0]), r"got none at \[0.25, 0.5\]: .* ks=\[0.25, 0.5, 1.0\]"),
        (measured(count=1), "at least two samples"),
        (measured(loss=[4.0, float("nan"), 2.0, 1.0]), "must be finite"),
    ],
    ids=["features", "one layer", "others", "other widths", "one sample", "NaN"],
)
def test_a_scree_that_does_not_fit_is_refused(scree, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        td.save_elastic(mlp(), X, tmp_path / "model.safetensors", menu=MENU, scree=scree)
    assert list(tmp_path.iterdir()) == []
