"""TailLinear in networks that are pruned: at every k the small network is the masked one."""

import copy
import io
import math
import pickle

import onnxruntime
import pytest
import torch
from helpers.oracle import assert_computes, assert_same, assert_same_outputs, masked, snapshot
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.testing import assert_close

import taildropout as td
from taildropout import PruningError, TailDropout, TailLinear, TailMLP

N = 7
SCALES = pytest.mark.parametrize("scale", [None, "sqrt"])


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def reader(n, out, **options):
    """No row of the tail bias is zero any more."""
    layer = TailLinear(n, out, **options).double()
    nn.init.normal_(layer.tail_bias)
    return layer


def bottleneck(scale=None, bias=True):
    return nn.Sequential(nn.Linear(4, N), nn.ReLU(), reader(N, 5, scale=scale, bias=bias)).double()


def kinds(model):
    return [type(module) for module in model.modules() if isinstance(module, nn.Linear)]


def prune(model, k, x):
    """And compare it on new inputs, of another batch too; also where the library is not needed."""
    small = td.prune(model.double(), k, x)
    ks = k if isinstance(k, dict) else dict.fromkeys(td.tail_dropouts(model), k)
    assert_computes(small, model, ks, x.shape, (5, *x.shape[1:]))
    assert_computes(td.finalize(small), model, ks, x.shape)
    return small


# --- alone ------------------------------------------------------------------------------------


@SCALES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", range(N + 1))
def test_it_becomes_the_linear_of_its_k(k, bias, scale):
    model = bottleneck(scale, bias)
    small = prune(model, k, doubles(3, 4))
    assert not td.tail_dropouts(small)
    layer, linear = model[2], small[2]
    assert type(linear) is nn.Linear
    assert vars(linear).keys() == vars(nn.Linear(1, 1)).keys()
    assert (linear.in_features, linear.out_features) == (k, 5)
    factor = math.sqrt(N / k) if scale and k else 1.0
    assert_close(linear.weight, layer.weight[:, :k] * factor)
    expected = torch.zeros(5, dtype=torch.float64) if layer.bias is None else layer.bias
    if k < N:
        assert_close(linear.bias, expected + layer.tail_bias[k])
    else:
        assert (linear.bias is None) == (not bias)


@SCALES
@pytest.mark.parametrize("bias", [True, False])
def test_it_may_be_the_whole_model(scale, bias):
    small = prune(reader(N, 4, scale=scale, bias=bias), 3, doubles(3, N))
    assert (type(small), small.in_features) == (nn.Linear, 3)


def test_the_model_is_untouched():
    model, x = bottleneck("sqrt").train(), doubles(3, 4)
    before = snapshot(model)
    td.prune(model, 3, x)
    assert_same(snapshot(model), before)


def test_the_small_network_goes_on_training_as_it_was():
    model = bottleneck(bias=False).train()
    model[0].requires_grad_(False)
    small = td.prune(model, 3, doubles(2, 4))
    assert small.training
    assert [p.requires_grad for p in small.parameters()] == [False, False, True, True]
    x = doubles(4, 4)
    assert_close(small(x), copy.deepcopy(small).eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_folded_in_float64_and_rounded_once(dtype):
    model = bottleneck("sqrt").to(dtype)
    small = td.prune(model, 3, torch.randn(2, 4, dtype=dtype))
    layer = copy.deepcopy(model[2]).double()
    assert small[2].weight.dtype == small[2].bias.dtype == dtype
    weight, bias = layer.weight[:, :3] * math.sqrt(N / 3), layer.bias + layer.tail_bias[3]
    assert_close(small[2].weight, weight.to(dtype), rtol=0, atol=0)
    assert_close(small[2].bias, bias.to(dtype), rtol=0, atol=0)


def test_the_summary_says_so():
    summary = td.plan_pruning(bottleneck("sqrt"), 3, doubles(2, 4)).summary()
    assert "2 becomes an nn.Linear, which takes in the bias and scale of k = 3" in summary
    assert "TailLinear  5 x 7 -> 5 x 3  75 -> 20" in summary


@pytest.mark.parametrize("name", ["2", "2.dropout", "re:2"])
def test_its_dropout_answers_to_its_name_too(name):
    assert td.prune(bottleneck(), {name: 3}, doubles(2, 4))[2].in_features == 3


# --- in networks of many kinds -----------------------------------------------------------------


class Net(nn.Module):
    """Its forward is a function of the module and the input."""

    def __init__(self, forward, scale):
        super().__init__()
        self.function = forward
        self.a, self.b = nn.Linear(4, N), nn.Linear(4, N)
        self.norm, self.scale = nn.LayerNorm(N), nn.Parameter(torch.randn(N))
        self.gru = nn.GRU(4, N, batch_first=True)
        self.read = reader(N, 4, scale=scale)
        self.again = reader(N, N, scale=scale)
        for name in {"read", "again"}.difference(forward.__code__.co_names):
            delattr(self, name)

    def forward(self, x):
        return self.function(self, x)


# What is computed, the k of `read` and of `again`, and whether what is in front is cut too
NETS = {
    "gated": (lambda m, x: x + m.read(silu(m.a(x)) * m.b(x)), {"read": 3}, True),
    "shifted": (lambda m, x: m.read(m.a(x) * m.scale + 1), {"read": 3}, True),
    "norm": (lambda m, x: m.read(input=m.norm(m.a(x))), {"read": 3}, False),
    "GRU": (lambda m, x: m.read(m.gru(x)[0]), {"read": 3}, False),
    "the input": (lambda m, x: m.read(torch.cat([x, x[..., :3]], -1)), {"read": 3}, False),
    "stream": (lambda m, x: (h := m.a(x), h + m.again(h + m.b(x).relu()))[1], {"again": 3}, False),
    "in a row": (lambda m, x: m.read(m.again(m.a(x)).relu()), {"again": 2, "read": 3}, True),
    "only the first": (lambda m, x: m.read(m.again(m.a(x)).relu()), {"again": 2}, True),
    "only the second": (lambda m, x: m.read(m.again(m.a(x)).relu()), {"read": 3}, False),
    "both of one": (lambda m, x: m.read(h := m.a(x)) + m.again(h)[..., :4], {"read": 3}, False),
    "both cut": (
        lambda m, x: m.read(h := m.a(x)) + m.again(h)[..., :4],
        {"read": 3, "again": 2},
        0,
    ),
}


@pytest.mark.slow
@SCALES
@pytest.mark.parametrize("name", NETS)
def test_networks(name, scale):
    forward, ks, both_sides = NETS[name]
    model, x = Net(forward, scale).double(), doubles(2, 3, 4)
    plan = td.plan_pruning(model, ks, x)
    small = plan.apply(model)
    ks = {f"{reader}.dropout": k for reader, k in ks.items()}
    for network in (small, td.finalize(small)):
        assert_same_outputs(network, model, ks, doubles(5, 2, 4))
    if both_sides:
        assert not plan.stays


@SCALES
def test_a_head_is_a_multiple(scale):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
            self.out = reader(8, 8, multiple_of=4, scale=scale)

        def forward(self, x):
            heads = [f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in self.qkv]
            return x + self.out(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

    small = prune(Attention(), 4, doubles(2, 3, 8))
    assert [linear.out_features for linear in small.qkv] == [4, 4, 4]


@SCALES
@pytest.mark.parametrize("ks", [(3, 5), (5, 3), (3, N), (0, 4)], ids=str)
def test_constants_from_in_front_are_scaled_too(ks, scale):
    """Between the two ks the sigmoid makes 0.5 of the zeros, which the scale multiplies."""
    first, second = nn.Linear(4, N), reader(N, 5, scale=scale)
    model = nn.Sequential(first, TailDropout(), nn.Sigmoid(), second)
    small = prune(model, {"1": ks[0], "3.dropout": ks[1]}, doubles(3, 4))
    assert small[0].out_features == small[3].in_features == min(ks)


def test_without_a_k_it_stays_and_keeps_its_biases():
    model = nn.Sequential(nn.Linear(4, N), TailDropout(), reader(N, 6), nn.Tanh(), reader(6, 5))
    small = prune(model, {"1": 3, "4.dropout": 2}, doubles(3, 4))
    assert kinds(small) == [nn.Linear, TailLinear, nn.Linear]
    assert small[2].tail_bias.shape == (N, 2)
    for k in (2, 5):
        with (
            td.at_width(model.eval(), {"1": 3, "2": k, "4": 2}),
            td.at_width(small.eval(), {"2": k}),
        ):
            x = doubles(3, 4)
            assert_close(small(x), model(x))
    why = td.plan_pruning(model, {"1": 3}, doubles(3, 4)).summary()
    assert "'2.dropout' is that of a TailLinear, which has a bias for each number" in why


class Tied(nn.Module):
    def __init__(self, what, scale, other=None):
        super().__init__()
        self.a, self.read = nn.Linear(4, N), reader(N, 4, scale=scale)
        self.other = other or nn.Linear(N, 4)
        setattr(self.other, what, getattr(self.read, what))

    def forward(self, x):
        h = self.a(x).relu()
        return self.read(h) + self.other(h)


@pytest.mark.parametrize(
    ("what", "scale", "k"), [("bias", None, 3), ("bias", "sqrt", 3), ("weight", "sqrt", 3)]
)
def test_what_another_reads_too_takes_nothing_in(what, scale, k):
    words = (
        f"the {what} of TailLinear 'read' can't take in .* k = 3, since linear in module 'other'"
    )
    with pytest.raises(PruningError, match=words):
        td.prune(Tied(what, scale).double(), k, doubles(2, 4))


@pytest.mark.parametrize(("what", "scale", "k"), [("weight", None, 3), ("weight", "sqrt", N)])
def test_what_another_reads_may_stay_as_it_is(what, scale, k):
    model, x = Tied(what, scale).double(), doubles(2, 4)
    small = td.prune(model, k, x)
    assert_computes(small, model, {"read.dropout": k}, (5, 4))
    assert small.read.weight is small.other.weight


def test_two_that_share_a_weight_have_biases_of_their_own():
    model = Tied("weight", None, reader(N, 4))
    small = prune(model, {"read.dropout": 3, "other.dropout": 3}, doubles(2, 4))
    assert small.read.weight is small.other.weight
    assert small.read.in_features == 3


def test_one_that_has_two_names():
    model = nn.Sequential(nn.Linear(4, N), reader(N, N), nn.ReLU())
    model.append(model[1])
    small = td.prune(model.double(), 3, doubles(2, 4))
    assert_computes(small, model, {"1.dropout": 3}, (5, 4))
    assert small[1] is small[3]


class Own(TailLinear):
    def forward(self, input):
        return 2 * super().forward(input)


def own():
    return Own(N, 5)


def parametrized():
    return nn.utils.parametrizations.weight_norm(TailLinear(N, 5))


@pytest.mark.parametrize("make", [own, parametrized])
def test_what_is_not_plain_is_refused(make):
    model = nn.Sequential(nn.Linear(4, N), make())
    with pytest.raises(
        PruningError, match=r"'1' must be a plain TailLinear .* leave layer '1.drop"
    ):
        td.prune(model, 3, torch.randn(2, 4))


def test_code_that_reads_the_tail_bias_is_told():
    model = Net(lambda m, x: m.read(m.a(x)) + m.read.tail_bias[0], None).double()
    with pytest.raises(PruningError, match=r"does not run: .* no attribute 'tail_bias'"):
        td.prune(model, 3, doubles(2, 4))


# --- with everything else ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        bottleneck(),
        nn.Sequential(nn.Linear(4, N), TailDropout(), nn.Linear(N, 3)),
        nn.Sequential(TailMLP(4, N, 3)),
    ],
    ids=["TailLinear", "TailDropout", "TailMLP"],
)
def test_a_plan_inside_at_width_is_the_plan_outside(model):
    model, x = model.double(), doubles(2, 4)
    (name,) = td.tail_dropouts(model)
    with td.at_width(model, 0.7):
        plan = td.plan_pruning(model, 3, x)
        smalls = [plan.apply(model), plan.at(2).apply(model)]
        for small, k in zip(smalls, (3, 2), strict=True):
            assert_computes(small, model, {name: k}, (5, 4))
        assert_close(model.eval()(x), masked(model, {name: 5}, x))
    assert plan.summary() == td.plan_pruning(model, 3, x).summary() + "\n" + verified(plan)


def verified(plan):
    return "\n".join(plan.verifications[-1].lines())


def test_a_k_that_is_set_is_one_to_plan_for_inside_at_width_too():
    model, x = bottleneck(), doubles(2, 4)
    with td.at_width(model, 0.7):
        model[2].set_k(3)
        assert td.prune(model, None, x)[2].in_features == 3
        assert model[2].k == 3


def test_a_nested_network_has_one_width():
    last = [nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)]
    model, x = (
        nn.Sequential(nn.Linear(4, N), nn.ReLU(), reader(N, 6), *last).double(),
        doubles(3, 4),
    )
    td.nest(model, x)
    assert list(td.tail_dropouts(model)) == ["2.dropout", "4.tail_dropout", "6.tail_dropout"]
    td.draw_together(model)
    for width in (0.25, 0.5, 1.0):
        small = td.prune(model, width, x).eval()
        with td.at_width(model.eval(), width):
            assert_close(small(x), model(x))
        assert type(small[2]) is nn.Linear


def test_what_is_left_is_drawn_together():
    model = nn.Sequential(nn.Linear(4, N), reader(N, 6), nn.Linear(6, 8), TailDropout()).double()
    td.draw_together(model)
    small = td.prune(model, {"1": 3}, doubles(2, 4)).train()
    small(doubles(8, 4))
    assert small[3].together.layers == [small[3]]
    assert len(model[3].together.layers) == 2


def test_the_budget_is_spent_on_it():
    last = [nn.ReLU(), nn.Linear(6, 8), TailDropout(), nn.Linear(8, 3)]
    model = nn.Sequential(nn.Linear(4, N), nn.ReLU(), reader(N, 6), *last).double()
    data = [(doubles(20, 4), doubles(20, 3))]
    path = td.choose_widths(model, nn.MSELoss(), data, 0.5, data[0][0], progress=False)
    small = td.prune(model, path.widths, data[0][0])
    sizes = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    assert sizes[0] <= 0.5 * sizes[1]
    assert_computes(small, model, path.widths, (5, 4))


# --- files and deployment -----------------------------------------------------------------------


@SCALES
@pytest.mark.parametrize("k", [0, 3, N])
def test_a_saved_network_comes_back_bit_for_bit(k, scale, tmp_path):
    model, x = bottleneck(scale, bias=False), doubles(2, 4)
    plan = td.plan_pruning(model, k, x)
    small = plan.apply(model)
    td.save_pruned(small, plan, tmp_path / "small")
    loaded = td.load_pruned(bottleneck(scale, bias=False), tmp_path / "small")
    assert_same(loaded.state_dict(), small.state_dict())
    assert repr(loaded) == repr(small)
    assert_close(loaded(x), small(x), rtol=0, atol=0)


def test_a_file_is_not_loaded_into_another_model(tmp_path):
    model, x = bottleneck(), doubles(2, 4)
    plan = td.plan_pruning(model, 3, x)
    td.save_pruned(plan.apply(model), plan, tmp_path / "small")
    plain = nn.Sequential(nn.Linear(4, N), nn.ReLU(), nn.Linear(N, 5)).double()
    before = snapshot(plain)
    with pytest.raises(PruningError, match="was pruned from another model"):
        td.load_pruned(plain, tmp_path / "small")
    assert_same(snapshot(plain), before)


def test_its_state_moves_to_a_network_of_linears():
    small = td.prune(bottleneck("sqrt"), 3, doubles(2, 4))
    plain = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5)).double()
    plain.load_state_dict(small.state_dict())
    x = doubles(2, 4)
    assert_close(plain(x), small(x), rtol=0, atol=0)


def needs_the_library(model):
    return b"taildropout" in pickle.dumps(model)


@pytest.mark.parametrize("bias", [True, False])
def test_finalized_unpruned_it_is_the_linear(bias):
    model, x = bottleneck("sqrt", bias).train(), doubles(2, 4)
    plain = td.finalize(model)
    assert needs_the_library(model)
    assert not needs_the_library(plain)
    assert list(plain.state_dict()) == [n for n in model.state_dict() if n != "2.tail_bias"]
    assert_close(plain(x), model.eval()(x), rtol=0, atol=0)


@SCALES
def test_finalized_behind_what_can_not_be_cut(scale):
    """Its weight has columns of zeros, where the pruned network slices."""
    model = nn.Sequential(nn.Linear(4, N), nn.LayerNorm(N), reader(N, 3, scale=scale))
    small = prune(model, 3, doubles(2, 3, 4))
    plain = td.finalize(small)
    assert not needs_the_library(plain)
    assert (small[2].in_features, plain[2].in_features) == (3, N)
    assert not plain[2].weight[:, 3:].any()
    assert list(plain.state_dict()) == list(small.state_dict())


def test_a_weight_that_is_read_elsewhere_is_not_finalized():
    model = Net(lambda m, x: m.read(h := m.a(x)) + h @ m.read.weight.T, None).double()
    small = td.prune(model, 3, doubles(2, 4))
    assert_computes(small, model, {"read.dropout": 3}, (5, 4))
    with pytest.raises(ValueError, match=r"layer 'read.dropout' was inserted, and slices"):
        td.finalize(small)


@pytest.mark.usefixtures("fresh_compiler")
def test_small_networks_compile_and_export():
    model, x = bottleneck("sqrt"), doubles(2, 4)
    small, expected = td.prune(model, 3, x), masked(model, {"2.dropout": 3}, x)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), expected)
    assert_close(torch.export.export(small, (x,)).module()(x), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("prune_first", [True, False])
def test_it_runs_in_onnxruntime(prune_first):
    """Pruned, or at full width."""
    model, x = bottleneck("sqrt").float().eval(), torch.randn(2, 4)
    network = td.prune(model, 3, x) if prune_first else model
    file = io.BytesIO()
    torch.onnx.export(network, (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = masked(model, {"2.dropout": 3 if prune_first else N}, x)
    assert_close(torch.from_numpy(actual), expected, rtol=1e-4, atol=1e-4)
