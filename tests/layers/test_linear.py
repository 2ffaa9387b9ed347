"""TailLinear against the formula, sample by sample, and against nn.Linear."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, jvp, vmap
from torch.testing import assert_close

import taildropout as td
from taildropout import TailDropout, TailLinear

N, OUT = 7, 5

# What loads torch's forward-mode derivatives announces the end of torch.jit.script.
torch_warns_about_itself = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def trained(*args, **options):
    """No row of the tail bias is zero any more."""
    layer = TailLinear(N, OUT, *args, **options).double()
    nn.init.normal_(layer.tail_bias)
    return layer


def by_sample(layer, x, ks):
    """The oracle: each row by itself, with its k."""
    rows = []
    for row, k in zip(x.reshape(-1, N), ks, strict=True):
        factor = math.sqrt(N / k) if layer.scale == "sqrt" and k else 1.0
        output = layer.weight[:, :k] @ row[:k] * factor
        output = output if layer.bias is None else output + layer.bias
        rows.append(output + layer.tail_bias[k] if k < N else output)
    return torch.stack(rows).view(*x.shape[:-1], OUT)


def gradients(output, layer, x, upstream):
    inputs = [x, *layer.parameters()]
    return torch.autograd.grad(output, inputs, upstream, materialize_grads=True)


def assert_same(layer, x, ks):
    """Output and all gradients are the oracle's, where `ks` has one for each row."""
    torch.manual_seed(7)
    actual = layer(x)
    ks = ks() if callable(ks) else ks
    expected = by_sample(layer, x, ks)
    assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(expected)
    assert_close(gradients(actual, layer, x, upstream), gradients(expected, layer, x, upstream))


@pytest.mark.parametrize("scale", [None, "sqrt"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [0, 1, 4, N])
@pytest.mark.parametrize("training", [True, False])
def test_at_a_k(k, bias, scale, training):
    layer = trained(bias=bias, scale=scale).train(training)
    layer.set_k(k)
    assert_same(layer, double(4, 3, N), [k] * 12)


@pytest.mark.parametrize("scale", [None, "sqrt"])
@pytest.mark.parametrize(
    ("shape", "batch_dim", "drawn"),
    [
        ((8, N), 0, lambda k: k),
        ((0, N), 0, lambda k: k),
        ((N,), (), lambda k: k.view(1)),
        ((8, 3, N), 0, lambda k: k.repeat_interleave(3)),
        ((8, 3, N), 1, lambda k: k.repeat(8)),
        ((8, 3, N), (0, 1), lambda k: k.flatten()),
        ((8, 3, N), (1, 0), lambda k: k.T.flatten()),
        ((8, 3, N), (), lambda k: k.expand(24)),
    ],
)
def test_in_training_each_sample_has_the_row_of_its_own_k(shape, batch_dim, drawn, scale):
    layer = trained(batch_dim=batch_dim, scale=scale)
    x = double(*shape)
    if x.numel():
        assert_same(layer, x, lambda: drawn(layer.dropout.drawn_k).tolist())
    else:
        assert layer(x).shape == (0, OUT)


def test_ks_follow_the_lengths(assert_drawn_from):
    """A weight of zeros, and k - n in the tail bias of k."""
    layer = TailLinear(N, 1, lengths=td.lengths.Uniform(0))
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(N)
        layer.tail_bias.copy_(torch.arange(N).view(N, 1) - N)
    k = layer(torch.ones(20_000, N)).flatten().long()
    assert_close(k, layer.dropout.drawn_k)
    assert_drawn_from(k, td.lengths.Uniform(0).pmf(N))


def test_a_k_for_each_sample_may_be_set():
    layer = trained(scale="sqrt")
    layer.set_k(torch.arange(N + 1))
    assert_same(layer, double(N + 1, N), range(N + 1))
    assert_same(layer.eval(), double(2, N), [N, N])


def test_the_tail_does_not_matter_where_it_is_nan():
    layer, x = trained(), torch.full((3, N), torch.nan, dtype=torch.float64)
    x[:, :2] = 1.0
    for k in (2, torch.tensor([2, 1, 0])):
        layer.set_k(k)
        assert layer(x).isfinite().all()


@pytest.mark.parametrize("scale", [None, "sqrt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_at_full_width_it_is_the_linear_bit_for_bit(dtype, scale):
    torch.manual_seed(3)
    linear = nn.Linear(N, OUT, dtype=dtype)
    torch.manual_seed(3)
    layer = TailLinear(N, OUT, scale=scale, dtype=dtype)
    assert_close(layer.weight, linear.weight, rtol=0, atol=0)
    nn.init.normal_(layer.tail_bias)
    x = torch.randn(9, N, dtype=dtype)
    for k in (None, N, torch.tensor(N), torch.full((9,), N)):
        layer.eval().set_k(k)
        actual = layer(x)
        assert actual.dtype == dtype
        assert_close(actual, linear(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    layer = trained(scale="sqrt")
    x, ks = torch.randn(N + 1, N).to(dtype), torch.arange(N + 1)
    layer.to(dtype).set_k(ks)
    actual = layer(x)
    assert actual.dtype == dtype
    expected = by_sample(layer.double(), x.double(), ks)
    tolerance = 4 * torch.finfo(dtype).eps
    assert_close(actual.double(), expected, rtol=tolerance, atol=4 * tolerance)


def test_autocast_has_the_dtype_of_a_linear():
    layer = TailLinear(N, OUT, scale="sqrt")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [layer(torch.randn(4, N)) for layer.training in (True, False)]
        layer.set_k(2)
        outputs.append(layer(torch.randn(4, N)))
    assert [output.dtype for output in outputs] == [torch.bfloat16] * 3


@torch_warns_about_itself
@pytest.mark.parametrize("scale", [None, "sqrt"])
def test_derivatives_of_all_orders_and_modes(scale):
    layer, k = trained(scale=scale), torch.tensor([0, 2, N, 4])
    layer.set_k(k)
    x = double(4, N)
    parameters = {name: p.detach().requires_grad_() for name, p in layer.named_parameters()}

    def call(x, *values):
        return functional_call(layer, dict(zip(parameters, values, strict=True)), x)

    arguments = (x, *parameters.values())
    assert torch.autograd.gradcheck(call, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *a: call(*a).square(), arguments)


@torch_warns_about_itself
def test_functional_transforms():
    layer, x = trained(scale="sqrt").eval(), double(3, N).detach()
    layer.set_k(2)
    expected = torch.stack([layer(row) for row in x])
    assert_close(vmap(layer)(x), expected)
    parameters = dict(layer.named_parameters())
    stacked = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}

    def loss(parameters, x):
        return functional_call(layer, parameters, x).square().sum()

    for k in (2, torch.tensor([0, 2, N])):
        layer.set_k(k)
        by_model = vmap(grad(loss), in_dims=(0, None))(stacked, x)
        for i in range(2):
            one = {name: value[i] for name, value in stacked.items()}
            assert_close({name: g[i] for name, g in by_model.items()}, grad(loss)(one, x))
    _, tangent = jvp(layer, (x,), (x,))
    assert_close(tangent, layer(x) - layer(torch.zeros_like(x)))


# --- the module -------------------------------------------------------------------------------


def test_a_checkpoint_of_a_linear_loads():
    layer, linear = trained(), nn.Linear(N, OUT).double()
    assert layer.load_state_dict(linear.state_dict()).missing_keys == []
    assert_close(layer.tail_bias, torch.zeros(N, OUT, dtype=torch.float64))
    x = double(3, N)
    assert_close(layer.eval()(x), linear(x), rtol=0, atol=0)


def test_a_checkpoint_loads_inside_a_model_and_on_no_device():
    linear = nn.Sequential(nn.Linear(4, N), nn.Linear(N, OUT))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, N), TailLinear(N, OUT))
    before = list(linear.state_dict())
    state = linear.state_dict()
    model.load_state_dict(state, assign=True)
    assert list(state) == before
    x = torch.randn(3, 4)
    assert_close(model.eval()(x), linear(x), rtol=0, atol=0)
    model[1].set_k(2)
    assert model(x).isfinite().all()


def test_a_checkpoint_without_a_weight_is_incomplete():
    with pytest.raises(RuntimeError, match=r"Missing key.*weight.*tail_bias"):
        TailLinear(N, OUT).load_state_dict({"bias": torch.zeros(OUT)})


def test_its_own_state_comes_back():
    layer, other = trained(), trained()
    assert list(layer.state_dict()) == ["weight", "bias", "tail_bias"]
    other.load_state_dict(layer.state_dict())
    assert_close(other.tail_bias, layer.tail_bias, rtol=0, atol=0)


def test_parameters_are_reset():
    layer = trained()
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not layer.tail_bias.any()
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(make):
    layer, x = trained(scale="sqrt", lengths=td.lengths.Uniform()), double(6, N)
    other = make(layer)
    outputs = []
    for module in (layer, other):
        torch.manual_seed(1)
        outputs.append(module(x))
    assert_close(*outputs)
    assert repr(other) == repr(layer)


def test_options_are_those_of_its_dropout():
    layer = TailLinear(8, 3, False, 0.25, (0, 1), multiple_of=4, stratified=False, scale="sqrt")
    own = TailDropout(0.25, (0, 1), multiple_of=4, stratified=False)
    assert repr(layer.dropout) == repr(own)
    assert repr(layer).startswith(
        'TailLinear(\n  in_features=8, out_features=3, bias=False, scale="sqrt"'
    )
    layer(torch.randn(6, 2, 8))
    assert set(layer.dropout.drawn_k.flatten().tolist()) <= {0, 4, 8}
    layer.p = 1
    assert layer.dropout.p == layer.p == 1


def test_a_k_or_width_that_is_set():
    layer, x = trained().eval(), double(2, N)
    layer.set_k(5)
    with layer.using_k(2) as inside:
        assert inside is layer
        assert layer.k == 2
        assert_same(layer, x, [2, 2])
    assert layer.k == 5
    with layer.using_width(0.5), td.at_width(layer, 2 / N):
        assert_same(layer.train(), x, [2, 2])
    layer.eval()
    assert layer.k is None


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: TailLinear(4, 2, scale="n/k"), ValueError, r'scale must be "sqrt" or None, got'),
        (lambda: TailLinear(4, 2, p=2), ValueError, "p is the expected fraction"),
        (
            lambda: TailLinear(4, 2)(torch.ones(3, 5)),
            ValueError,
            r"must fit, got \(3, 5\), \(2, 4\)",
        ),
        (lambda: TailLinear(4, 2).eval()(torch.ones(3, 5)), RuntimeError, "cannot be multiplied"),
        (lambda: TailLinear(4, 2)(torch.ones(3, 4).long()), TypeError, "needs a floating-point"),
        (lambda: TailLinear(4, 2, batch_dim=1)(torch.ones(3, 4)), ValueError, "different dims"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_k_above_n_is_refused():
    layer = TailLinear(4, 2).eval()
    layer.set_k(5)
    with pytest.raises(ValueError, match="k must be at most the number of features n=4, got k=5"):
        layer(torch.ones(3, 4))


# --- ks that were never trained -----------------------------------------------------------------

NEVER = "k = 3 is one that the lengths of this TailLinear never draw.*use a k that is drawn"


def test_a_row_that_was_never_trained_is_warned_of_once():
    layer = TailLinear(N, OUT, lengths=td.lengths.Sizes([2, N])).eval()
    x = torch.randn(2, N)
    layer.set_k(3)
    with pytest.warns(UserWarning, match=NEVER):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in (3, 4, 3):
            layer.set_k(k)
            layer(x)


def test_at_a_width_too():
    model = nn.Sequential(TailLinear(N, OUT, lengths=td.lengths.Sizes([2, N]))).eval()
    with td.at_width(model, 3 / N), pytest.warns(UserWarning, match=NEVER):
        model(torch.randn(2, N))


def test_all_other_ks_are_fine():
    """Those that are drawn, full width, what is trained with k set, and trained rows."""
    x = torch.randn(2, N)
    layer = TailLinear(N, OUT, lengths=td.lengths.Sizes([2, N]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.set_k(3)
        layer(x)
        for k in (None, 2, N, torch.tensor([3, 3])):
            layer.eval().set_k(k)
            layer(x)
        nn.init.ones_(layer.tail_bias)
        layer.set_k(3)
        layer(x)


# --- compiled and exported ------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    def test_gradients(self):
        layer, x = trained(scale="sqrt"), double(20, N)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        upstream = torch.randn(20, OUT, dtype=torch.float64)
        found = []
        for module in (compiled, layer):
            torch.manual_seed(7)
            output = module(x)
            found.append((output.detach(), gradients(output, layer, x, upstream)))
        assert_close(*found)

    def test_draws_and_p_do_not_recompile(self):
        layer, x, counter = trained(), double(20, N).detach(), CompileCounter()
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for p in (0.5, 0.5, 0.1, 0.9):
            layer.p = p
            torch.manual_seed(7)
            actual = compiled(x)
            torch.manual_seed(7)
            assert_close(actual, layer(x))
        assert counter.frame_count == 1

    @pytest.mark.parametrize("scale", [None, "sqrt"])
    def test_ks_do_not_recompile(self, scale):
        layer, x, counter = trained(scale=scale).eval(), double(6, N).detach(), CompileCounter()
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for k in (3, 0, 5, N):
            layer.set_k(k)
            assert_close(compiled(x), layer(x))
        assert counter.frame_count == 1

    def test_widths_do_not_recompile_and_nobody_is_warned(self):
        layer = TailLinear(N, OUT, lengths=td.lengths.Sizes([2])).eval()
        x, counter = torch.randn(6, N), CompileCounter()
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for width in (0.3, 0.5, 1.0):
            with td.at_width(layer, width):
                actual = compiled(x)
            nn.init.zeros_(layer.tail_bias)
            assert_close(actual, by_sample(layer, x, [math.ceil(width * N)] * 6))
        assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("k", [None, 0, 3, N])
@pytest.mark.parametrize("strict", [True, False])
def test_exported(k, strict):
    layer, x = trained(scale="sqrt").eval(), double(6, N).detach()
    layer.set_k(k)
    exported = torch.export.export(layer, (x,), strict=strict).module()
    assert_close(exported(x), layer(x))


# --- measured -------------------------------------------------------------------------------------


def reader_alone(scale):
    return nn.Sequential(nn.Linear(4, N), trained(scale=scale), nn.Tanh(), nn.Linear(OUT, 3))


class Around(nn.Module):
    """A network whose other path does not pass the layer."""

    def __init__(self, scale):
        super().__init__()
        self.inside = reader_alone(scale)
        self.past = nn.Linear(4, 3)

    def forward(self, x):
        return self.inside(x) + self.past(x)


class Twice(nn.Module):
    """The layer is called twice, with the same k; what it reads then depends on k."""

    def __init__(self, scale):
        super().__init__()
        self.first, self.reader = nn.Linear(4, N), trained(scale=scale)
        self.back = nn.Linear(OUT, N)

    def forward(self, x):
        return self.reader(self.back(self.reader(self.first(x))))[:, :3]


def two_of_them(scale):
    """And a Linear that alone reads a TailDropout."""
    second = TailLinear(OUT, 6, scale=scale)
    nn.init.normal_(second.tail_bias)
    last = nn.Sequential(td.TailDropout(), nn.Linear(6, 3))
    return nn.Sequential(nn.Linear(4, N), trained(scale=scale), nn.Tanh(), second, last)


def parametrized(scale):
    model = reader_alone(scale)
    nn.utils.parametrizations.weight_norm(model[1])
    return model


class LooksAtValues(nn.Module):
    """It can't be run for all ks at once: at each k what is behind the layer runs by itself."""

    def __init__(self, scale):
        super().__init__()
        self.inside = reader_alone(scale)

    def forward(self, x):
        output = self.inside(x)
        return output if output.sum() > 0 else 2 * output


def losses_at(model, data, width):
    if width == 0:  # which is measured, but nothing to run a network at
        width = dict.fromkeys(td.tail_dropouts(model), 0)
    with td.at_width(model.eval(), width), torch.no_grad():
        losses = [(model(x) - y).square().mean(1) for x, y in data]
    return torch.cat(losses).mean()


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("scale", [None, "sqrt"])
@pytest.mark.parametrize("make", [reader_alone, Around, Twice, parametrized, two_of_them])
def test_scree_is_that_of_runs_with_k(make, scale):
    """Without a warning that each k runs by itself."""
    model = make(scale).double()
    data = [(doubles(9, 4), doubles(9, 3)) for _ in range(2)]
    layer = None if make is not two_of_them else "*"
    scree = td.scree(model, nn.MSELoss(), data, layer=layer, progress=False)
    assert len(scree.ks) > N
    for k, loss in zip(scree.ks, scree.loss, strict=True):
        assert_close(loss, losses_at(model, data, k))


class Counting(nn.Linear):
    def forward(self, input):
        self.seen = [*getattr(self, "seen", []), len(input)]
        return super().forward(input)


def test_scree_where_each_k_runs_by_itself_computes_what_is_in_front_once():
    model = LooksAtValues("sqrt").double()
    model.inside[0] = Counting(4, N).double()
    data = [(doubles(9, 4), doubles(9, 3)), (doubles(5, 4), doubles(5, 3))]
    with pytest.warns(UserWarning, match="runs each k by itself"):
        scree = td.scree(model, nn.MSELoss(), data, progress=False)
    assert model.inside[0].seen.count(5) == 1
    for k, loss in zip(scree.ks, scree.loss, strict=True):
        assert_close(loss, losses_at(model, data, k))


@pytest.mark.parametrize("features", ["random", "principal"])
def test_scree_of_other_features_has_no_further_bias(features):
    """It is made for the first k. They are those of a Linear behind a TailDropout."""
    model = reader_alone(None).double()
    layer = model[1]
    linear = nn.Linear(N, OUT).double()
    linear.weight, linear.bias = layer.weight, layer.bias
    other = nn.Sequential(model[0], td.TailDropout(), linear, *model[2:])
    data = [(doubles(9, 4), doubles(9, 3)) for _ in range(2)]
    screes = [
        td.scree(m, nn.MSELoss(), data, features=features, progress=False) for m in (model, other)
    ]
    assert_close(screes[0].loss, screes[1].loss)


def test_scree_of_rows_that_the_first_check_does_not_see():
    """Only the row of a k that the comparison with plain runs leaves out is not zero."""
    model = nn.Sequential(nn.Linear(4, N), TailLinear(N, OUT, lengths=td.lengths.Sizes([1, N])))
    with torch.no_grad():
        model[1].tail_bias[1] = 100.0
    data = [(torch.randn(9, 4), torch.randn(9, OUT))]
    with pytest.warns(UserWarning, match="never draw"):
        loss = td.scree(model, nn.MSELoss(), data, progress=False).loss
    assert loss[1] > 1000 > loss[2]


def test_live_scree_knows_its_ks():
    layer = TailLinear(N, OUT)
    live = td.LiveScree(layer)
    live.update(layer(torch.randn(50, N)).square().mean(1).detach())
    assert set(live.result().ks) == set(layer.dropout.drawn_k.tolist())
