import contextlib
import copy
import json
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing import assert_close

import taildropout as td
from taildropout import Choice, TailDropout, TailMLP, at_width
from taildropout.models.width import layer_ks, plain_name, widths_by_layer


def one_layer():
    return nn.Sequential(nn.Identity(), TailDropout())


class Network(nn.Module):
    """Layers `stem`, `blocks.0.mlp.drop`, `blocks.1.mlp.drop`, `head`."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = TailDropout(), TailDropout()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.ModuleDict({"drop": TailDropout()})}) for _ in range(2)
        )


STEM, FIRST, SECOND, HEAD = "stem", "blocks.0.mlp.drop", "blocks.1.mlp.drop", "head"


# --- what was said ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        (0.5, {STEM: 0.5, FIRST: 0.5, SECOND: 0.5, HEAD: 0.5}),
        ({STEM: 3}, {STEM: 3}),
        ({STEM: 3, "_default": 0.25}, {STEM: 3, FIRST: 0.25, SECOND: 0.25, HEAD: 0.25}),
        ({"_default": 2}, {STEM: 2, FIRST: 2, SECOND: 2, HEAD: 2}),
        ({"blocks.*": 0.5}, {FIRST: 0.5, SECOND: 0.5}),
        ({"blocks.[1-9].*": 4, "?ead": 0.1}, {SECOND: 4, HEAD: 0.1}),
        ({"blocks.*": 0.5, SECOND: 7}, {FIRST: 0.5, SECOND: 7}),  # its own name goes first
        ({"blocks.0.*": 1, "blocks.*": 2}, {FIRST: 1, SECOND: 2}),  # then what stands first
        ({"blocks.*": 2, "blocks.0.*": 1}, {FIRST: 2, SECOND: 2}),
        ({r"re:blocks\.\d+\.mlp\.drop": 5}, {FIRST: 5, SECOND: 5}),
        ({"re:st.*|he.*": 1.0, "*": 9}, {STEM: 1.0, FIRST: 9, SECOND: 9, HEAD: 1.0}),
        ({STEM: np.int64(3), HEAD: np.float32(0.5)}, {STEM: 3, HEAD: 0.5}),
        ({STEM: Choice(3, "elsewhere")}, {STEM: 3}),
        (Choice(3, SECOND), {SECOND: 3}),
        ({}, {}),
    ],
)
def test_widths_of_several_layers(widths, expected):
    actual = widths_by_layer(Network(), widths)
    assert actual == expected
    assert {name: type(value) for name, value in actual.items()} == {
        name: type(value) for name, value in expected.items()
    }


@pytest.mark.parametrize("widths", [3, np.int64(3), Choice(3), Choice(3, "of the encoder alone")])
def test_an_int_is_the_k_of_the_only_layer(widths):
    actual = widths_by_layer(one_layer(), widths)
    assert actual == {"1": 3}
    assert type(actual["1"]) is int


def test_none_means_the_ks_that_are_set():
    model = Network()
    model.head.set_k(2)
    assert widths_by_layer(model, None) == {HEAD: 2}
    model.stem.set_k(0)
    assert widths_by_layer(model, None) == {STEM: 0, HEAD: 2}


NAMES = r"\['blocks.0.mlp.drop', 'blocks.1.mlp.drop', 'head', 'stem'\]"


@pytest.mark.parametrize(
    ("widths", "error", "words"),
    [
        (
            2,
            ValueError,
            rf"several TailDropout layers, give k as a dict: {NAMES}, .* 1.0 is .*got 2",
        ),
        (1, ValueError, r"where 1.0 is the full width; got 1"),
        (Choice(2), ValueError, "several TailDropout layers"),
        (
            Choice(2, "gone"),
            ValueError,
            rf"must name TailDropout layers .* {NAMES}, got \['gone'\]",
        ),
        ({"gone": 2, STEM: 1}, ValueError, rf"{NAMES}, got \['gone'\]"),
        ({"blocks": 2}, ValueError, r"got \['blocks'\]"),
        ({"re:st": 2}, ValueError, r"got \['re:st'\]"),  # a part of a name is not the name
        ({0: 2, "x*": 2}, ValueError, r"got \[0, 'x\*'\]"),
        (None, ValueError, "the ks that are set, and none is"),
        ({STEM: -1}, ValueError, "k must be at least 0, got -1 for layer 'stem'"),
        (
            0.0,
            ValueError,
            r"in \(0, 1\], got 0.0 for layer 'stem': a number of features must be an",
        ),
        (1.5, ValueError, r"must be in \(0, 1\], got 1.5"),
        (-0.5, ValueError, r"must be in \(0, 1\], got -0.5"),
        (math.nan, ValueError, r"must be in \(0, 1\], got nan"),
        ({HEAD: 2.0}, ValueError, r"got 2.0 for layer 'head': a number of features must be an int"),
        ({HEAD: True}, TypeError, "must be an integer .* got True"),
        ({HEAD: "2"}, TypeError, "must be an integer .* got '2'"),
        ({HEAD: None}, TypeError, "must be an integer .* got None"),
        ({HEAD: torch.tensor([1, 2])}, TypeError, r"one int for all samples, got .* layer 'head'"),
        (
            {HEAD: torch.tensor(0.5)},
            TypeError,
            "must be an integer tensor, got dtype torch.float32",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(widths, error, words):
    with pytest.raises(error, match=words):
        widths_by_layer(Network(), widths)
    with pytest.raises(error, match=words), at_width(Network(), widths):
        pass


@pytest.mark.parametrize("width", [True, "2", [2]])
def test_what_is_no_width_of_the_only_layer_is_refused(width):
    with pytest.raises(TypeError, match="k must be an integer"):
        widths_by_layer(one_layer(), width)


@pytest.mark.parametrize("widths", [2, 0.5, None, {"_default": 0.5}])
def test_a_model_without_layers_is_refused(widths):
    with pytest.raises(ValueError, match="must contain a TailDropout layer"):
        widths_by_layer(nn.Linear(2, 2), widths)


# --- the k of a fraction ------------------------------------------------------------------------


def test_a_fraction_is_rounded_up_for_the_n_of_each_layer():
    n = {STEM: 10, FIRST: 7, SECOND: 1, HEAD: 1000}
    ks = layer_ks(Network(), {"*": 0.3, HEAD: 5}, n.__getitem__)
    assert ks == {STEM: 3, FIRST: 3, SECOND: 1, HEAD: 5}
    assert {type(k) for k in ks.values()} == {int}


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))))
def test_the_fraction_k_over_n_is_k(k_and_n):
    k, n = k_and_n
    assert layer_ks(one_layer(), k / n, lambda name: n) == {"1": k}


@given(st.floats(1e-6, 1), st.integers(1, 10**6))
def test_a_fraction_of_n_is_rounded_up(width, n):
    k = layer_ks(one_layer(), width, lambda name: n)["1"]
    exact = Fraction(width) * n
    assert k - 1 < exact < k + Fraction(n, 10**8)


# --- Choice -------------------------------------------------------------------------------------


def test_a_choice_is_an_int_in_all_but_its_layer():
    k = Choice(12, "encoder.1")
    assert k.layer == "encoder.1"
    assert (k == 12, hash(k) == hash(12), {12: "x"}[k], k < 13) == (True, True, "x", True)
    assert (repr(k), str(k), f"{k} {k:>4}", json.dumps({"k": k})) == (
        "12",
        "12",
        "12   12",
        '{"k": 12}',
    )
    for number in (k + 1, 2 * k, -k, k // 5, int(k), sum([k, k]), k - k):
        assert type(number) is int
    assert list(range(20))[k] == 12
    assert torch.ones(20)[:k].shape == (12,)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda k: pickle.loads(pickle.dumps(k))]
)
def test_a_copy_of_a_choice_knows_the_layer_too(duplicate):
    twin = duplicate(Choice(12, "encoder.1"))
    assert (type(twin), twin, twin.layer) == (Choice, 12, "encoder.1")


def test_a_k_that_is_set_to_a_choice_is_a_plain_int():
    layer = TailDropout()
    layer.set_k(Choice(2, "1"))
    assert type(layer.k) is int


def test_a_choice_of_one_of_several_layers_prunes_and_runs_that_layer():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 6), TailDropout(), nn.Linear(6, 5), TailDropout(), nn.Linear(5, 2)
    )
    x = torch.randn(8, 3)
    scree = td.scree(
        model, nn.MSELoss(), [(x, torch.zeros(8, 2))], layer="3", ks=[2], progress=False
    )
    k = scree.choose()
    small = td.prune(model, k, x)
    assert [small[i].out_features for i in (0, 2)] == [6, 2]
    with at_width(model, k):
        assert_close(model.eval()(x), small.eval()(x))


# --- at_width -----------------------------------------------------------------------------------


def two_layers():
    return nn.Sequential(TailDropout(), nn.Identity(), TailDropout())


def kept(model, n=10):
    """How many features come out."""
    (count,) = set(model(torch.ones(3, n)).sum(1).tolist())
    return count


@pytest.mark.parametrize("wanted", [True, False])
def test_train_and_eval_do_not_end_it(wanted):
    model = two_layers()
    with at_width(model, 0.45) as same:
        assert same is model
        for mode in (True, False, wanted):
            model.train(mode)
            assert kept(model) == 5  # 4.5 rounded up
            assert model.training is mode
    assert model.training is wanted


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_afterwards_all_is_as_before(error):
    model = two_layers().eval()
    model[0].set_k(7)
    with contextlib.suppress(RuntimeError, KeyboardInterrupt), at_width(model, {"*": 0.3, "2": 4}):
        assert kept(model) == 3
        model.train().eval()
        model[2].set_k(1)
        if error is not None:
            raise error
    assert (model[0].k, model[2].k) == (7, None)
    assert kept(model) == 7


def test_the_innermost_wins():
    model = two_layers().eval()
    with at_width(model, 0.5), at_width(model, {"2": 2}):
        assert kept(model) == 2
        with model[2].using_k(1):
            assert kept(model) == 1
        with at_width(model, 0.4):
            assert kept(model) == 4
        assert kept(model) == 2


def test_layers_that_are_not_spoken_of_are_left_alone():
    model = two_layers()
    with at_width(model, {"0": 0.5}):
        model[2].set_k(3)
        assert kept(model) == 3
        model.train()
        counts = model(torch.ones(2000, 10)).sum(1)
        assert counts.max() == 5
        assert counts.unique().numel() == 6
        assert kept(model.eval()) == 5


def test_a_k_above_n_is_refused_in_the_call():
    with (
        at_width(one_layer(), 11) as model,
        pytest.raises(ValueError, match="at most the number of features n=10, got k=11"),
    ):
        model(torch.ones(1, 10))


@pytest.mark.parametrize("mode", [True, False])
def test_a_tail_mlp_runs_at_a_width(mode):
    mlp, x = TailMLP(3, 8, 2).train(mode), torch.randn(4, 3)
    with at_width(mlp, 0.5):
        actual = mlp(x)
    hidden = mlp.activation(mlp.fc1(x))
    expected = nn.functional.linear(hidden[:, :4], mlp.fc2.weight[:, :4], mlp.fc2.bias)
    assert_close(actual, expected)


# --- models that are wrapped --------------------------------------------------------------------


def data_parallel(model):
    return nn.DataParallel(model)


def compiled(model):
    return torch.compile(model, backend="eager")


def checkpointed(model):
    return nn.Sequential(checkpoint_wrapper(model))[0]


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def distributed(model):
    return nn.parallel.DistributedDataParallel(model)


WRAPPERS = [data_parallel, compiled, checkpointed, distributed, lambda m: compiled(distributed(m))]


@pytest.mark.usefixtures("one_process", "fresh_compiler")
@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("widths", [{"1": 4}, {"[1]": 4}, {"re:1": 0.4}, 0.4, 4])
def test_what_wraps_a_model_does_not_change_the_names(wrap, widths):
    model = wrap(nn.Sequential(nn.Linear(10, 10), TailDropout()))
    x = torch.randn(3, 10)
    with at_width(model, widths), torch.no_grad():
        for mode in (True, False):
            assert (model.train(mode)(x) != 0).sum(1).tolist() == [4, 4, 4]
    (name,) = td.tail_dropouts(model)
    assert name != "1"
    with at_width(model, {name: 2}), torch.no_grad():
        assert (model(x) != 0).sum(1).tolist() == [2, 2, 2]


def test_a_child_that_is_called_module_keeps_its_name():
    model = nn.ModuleDict({"module": TailDropout()})
    assert plain_name(model, "module") == "module"
    assert plain_name(nn.DataParallel(model), "module.module") == "module"
    assert plain_name(TailDropout(), "") == ""


def test_a_model_that_is_a_layer_is_named_by_the_empty_name():
    layer, x = TailDropout(), torch.ones(1, 4)
    with td.at_width(layer, {"": 2}):
        assert layer(x).tolist() == [[1, 1, 0, 0]]
    curve = td.scree(layer, nn.MSELoss(), [(x, x)], layer="", ks=[0, 4], progress=False)
    assert (curve.layer, curve.ks) == ("", [0, 4])


def test_a_k_of_random_features_is_refused_for_one_of_several_layers_too():
    model = nn.Sequential(TailDropout(), nn.ReLU(), TailDropout())
    chosen = Choice(2, "0", "random")
    with pytest.raises(ValueError, match='choose from a scree with features="first"'):
        td.plan_pruning(model, chosen, torch.ones(1, 4))
