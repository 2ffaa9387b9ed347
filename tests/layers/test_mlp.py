"""TailMLP and tail_mlp against the modules in turn, which compute the tail and zero it."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import taildropout as td
from taildropout import TailDropout, TailMLP
from taildropout.functional import keep_prefix, tail_mlp
from taildropout.pruning.elastic import Elastic

IN, HIDDEN, OUT = 6, 37, 5
ACTIVATIONS = [nn.GELU, nn.ReLU, nn.Sigmoid, nn.PReLU, nn.Softplus, torch.tanh, torch.exp]


GATED = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def hidden(mlp, x):
    if mlp.gated:
        return mlp.activation(mlp.gate(x)) * mlp.up(x)
    return mlp.activation(mlp.fc1(x))


def out(mlp):
    return mlp.down if mlp.gated else mlp.fc2


def as_sequential(mlp):
    """The oracle, whatever the activation: masked, nothing skipped."""

    def forward(x):
        return out(mlp)(mlp.dropout(hidden(mlp, x)))

    return forward


def gradients(function, inputs, upstream, **options):
    torch.manual_seed(7)
    return torch.autograd.grad(function(inputs[0]), inputs, upstream, **options)


def assert_same(mlp, x, rtol=1e-9, atol=1e-11):
    """Output and all gradients are the oracle's under the same seed."""
    torch.manual_seed(7)
    actual = mlp(x)
    torch.manual_seed(7)
    expected = as_sequential(mlp)(x)
    assert_close(actual, expected, rtol=rtol, atol=atol)
    inputs = [x, *mlp.parameters()]
    upstream = torch.randn_like(expected)
    assert_close(
        gradients(mlp, inputs, upstream),
        gradients(as_sequential(mlp), inputs, upstream),
        rtol=rtol,
        atol=atol,
    )


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@GATED
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("p", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("blocks", [None, 1, 4, 37, 100])
def test_training_computes_what_the_sequential_does(activation, p, blocks, gated):
    mlp = TailMLP(IN, HIDDEN, OUT, p, activation, gated=gated, blocks=blocks).double()
    assert_same(mlp, double(33, IN))


@pytest.mark.parametrize(
    "lengths",
    [
        td.lengths.Uniform(),
        td.lengths.Uniform(min_k=9),
        td.lengths.Sizes([3, 20]),
        td.lengths.Sizes([0, 37], weights=[1, 3]),
        td.lengths.Exponential(0.4, min_k=10),
    ],
)
def test_with_any_lengths(lengths):
    assert_same(TailMLP(IN, HIDDEN, OUT, lengths=lengths, blocks=6).double(), double(50, IN))


class Own:
    """Lengths that a user wrote: k is 0, 5 or n."""

    def pmf(self, n):
        pmf = torch.zeros(n + 1, dtype=torch.float64)
        pmf[[0, 5, n]] = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
        return pmf


def test_with_lengths_of_the_users_own():
    assert_same(TailMLP(IN, HIDDEN, OUT, lengths=Own(), blocks=6).double(), double(50, IN))


@GATED
@pytest.mark.parametrize(
    ("shape", "batch_dim"),
    [
        ((IN,), ()),
        ((1, IN), 0),
        ((0, IN), 0),
        ((8, IN), -2),
        ((8, 5, IN), 0),
        ((8, 5, IN), 1),
        ((8, 5, IN), (0, 1)),
        ((8, 5, IN), (1, 0)),
        ((8, 5, IN), ()),
        ((3, 4, 5, IN), (2, 0)),
    ],
)
def test_with_any_leading_shape(shape, batch_dim, gated):
    mlp = TailMLP(IN, HIDDEN, OUT, gated=gated, batch_dim=batch_dim, blocks=4).double()
    assert_same(mlp, double(*shape))


@given(
    batch=st.integers(0, 40),
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
    p=st.floats(0, 1),
    blocks=st.integers(1, 50),
    bias=st.booleans(),
    gated=st.booleans(),
)
def test_with_any_sizes(batch, sizes, p, blocks, bias, gated):
    mlp = TailMLP(*sizes, p=p, bias=bias, gated=gated, blocks=blocks).double()
    assert_same(mlp, double(batch, sizes[0]))


@GATED
@pytest.mark.parametrize("activation", [nn.GELU, nn.Sigmoid])
def test_second_derivatives(activation, gated):
    mlp = TailMLP(IN, HIDDEN, OUT, activation=activation, gated=gated, blocks=4).double()
    x = double(9, IN)
    inputs, upstream = [x, *mlp.parameters()], torch.randn(9, OUT, dtype=torch.float64)

    def of_squared_gradients(function):
        first = gradients(function, inputs, upstream, create_graph=True)
        loss = sum(grad.square().sum() for grad in first)
        return torch.autograd.grad(loss, inputs, materialize_grads=True)

    assert_close(of_squared_gradients(mlp), of_squared_gradients(as_sequential(mlp)))


def test_per_sample_k_follows_the_lengths(assert_drawn_from):
    """With the identity for both weights the output is the mask."""
    eye, ones = torch.eye(HIDDEN), torch.ones(20_000, HIDDEN)
    output = tail_mlp(ones, eye, None, eye, None, p=0.3, activation=nn.Identity(), blocks=5)
    assert set(output.unique().tolist()) == {0.0, 1.0}
    assert_drawn_from(output.sum(1).long(), td.lengths.Exponential(0.3).pmf(HIDDEN))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_function_with_a_gate_is_the_layer(training, bias):
    mlp = TailMLP(IN, HIDDEN, OUT, 0.3, nn.SiLU, bias, gated=True, blocks=4).double()
    mlp.train(training)
    x = double(20, IN)
    torch.manual_seed(7)
    expected = mlp(x)
    torch.manual_seed(7)
    actual = tail_mlp(
        x,
        *(mlp.up.weight, mlp.up.bias, mlp.down.weight, mlp.down.bias, 0.3, training),
        activation=nn.functional.silu,
        blocks=4,
        weight_gate=mlp.gate.weight,
        bias_gate=mlp.gate.bias,
    )
    assert_close(actual, expected)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function().sum().backward()
    return counter.get_total_flops()


@GATED
@pytest.mark.parametrize("p", [0.2, 0.5, 0.8, 0.95])
def test_the_tail_is_not_computed(p, gated):
    """A staircase of 16 steps computes at most half a step's height more than 1 - p of it all."""
    x = torch.randn(1000, 64, requires_grad=True)
    mlp = TailMLP(64, 512, 64, p, gated=gated, blocks=16)
    share = flops(lambda: mlp(x)) / flops(lambda: as_sequential(mlp)(x))
    assert 1 - p <= share <= 1 - p + 0.5 / 16 + 0.01


# --- the module -------------------------------------------------------------------------------


@GATED
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("k", [0, 1, 20, HIDDEN, torch.arange(8)])
def test_a_set_k_is_that_of_the_sequential(k, training, gated):
    mlp = TailMLP(IN, HIDDEN, OUT, gated=gated).double().train(training)
    mlp.set_k(k)
    x = double(8, IN)
    expected = out(mlp)(keep_prefix(hidden(mlp, x), k))
    assert_close(mlp(x), expected, rtol=1e-10, atol=1e-12)


@GATED
def test_a_set_k_computes_only_that_many_features(gated):
    x = torch.randn(8, IN)
    mlp = TailMLP(IN, HIDDEN, OUT, gated=gated).eval()

    def computed(k):
        mlp.set_k(k)
        with FlopCounterMode(display=False) as counter:
            mlp(x)
        return counter.get_total_flops()

    assert computed(10) == 2 * 8 * 10 * (IN * (1 + gated) + OUT)
    assert computed(None) == 2 * 8 * HIDDEN * (IN * (1 + gated) + OUT)


@GATED
def test_eval_is_the_plain_network_and_clears_k(gated):
    mlp = TailMLP(IN, HIDDEN, OUT, gated=gated)
    mlp.set_k(3)
    mlp.eval()
    assert mlp.k is None
    x = torch.randn(8, IN)
    assert_close(mlp(x), out(mlp)(hidden(mlp, x)), rtol=0, atol=0)


def test_using_k_holds_inside():
    mlp = TailMLP(IN, HIDDEN, OUT).eval()
    mlp.set_k(5)
    with mlp.using_k(2) as inside:
        assert inside is mlp
        assert mlp.k == 2
    assert mlp.k == 5


def test_p_is_that_of_its_dropout():
    mlp = TailMLP(IN, HIDDEN, OUT, p=0.25)
    assert mlp.p == mlp.dropout.p == 0.25
    mlp.p = 0.75
    assert mlp.dropout.p == 0.75


def test_out_features_are_in_features_by_default():
    assert TailMLP(IN, HIDDEN)(torch.randn(3, IN)).shape == (3, IN)


def test_state_dict_holds_the_two_linear_layers():
    assert list(TailMLP(IN, HIDDEN).state_dict()) == [
        "fc1.weight",
        "fc1.bias",
        "fc2.weight",
        "fc2.bias",
    ]
    assert list(TailMLP(IN, HIDDEN, bias=False).state_dict()) == ["fc1.weight", "fc2.weight"]


def test_state_dict_of_a_gated_one_holds_the_three():
    keys = [f"{name}.{what}" for name in ("gate", "up", "down") for what in ("weight", "bias")]
    assert list(TailMLP(IN, HIDDEN, gated=True).state_dict()) == keys
    assert list(TailMLP(IN, HIDDEN, bias=False, gated=True).state_dict()) == keys[::2]


def test_to_sequential_and_back_shares_the_parameters():
    mlp = TailMLP(IN, HIDDEN, OUT, p=0.3, activation=nn.Tanh).double().eval()
    sequential = mlp.to_sequential()
    assert [type(module) for module in sequential] == [nn.Linear, nn.Tanh, TailDropout, nn.Linear]
    back = TailMLP.from_sequential(sequential, blocks=3)
    assert back.blocks == 3
    assert back.p == 0.3
    assert not back.training
    for name, parameter in mlp.named_parameters():
        assert back.get_parameter(name) is parameter
    assert_same(back.train(), double(12, IN))


NOT_CONVERTIBLE = [
    (nn.Sequential(nn.Linear(3, 3), TailDropout(), nn.Linear(3, 3)), "needs nn.Sequential"),
    (nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Dropout(), nn.Linear(3, 3)), "'Dropout'"),
    (
        nn.Sequential(nn.Linear(3, 3), nn.GELU(), TailDropout(dropout_dim=1), nn.Linear(3, 3)),
        "along dropout_dim=-1",
    ),
    (
        nn.Sequential(nn.Linear(3, 3), nn.GELU(), TailDropout(stratified=False), nn.Linear(3, 3)),
        "needs stratified draws",
    ),
    (
        nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1), TailDropout(), nn.Linear(3, 3)),
        "activation must be elementwise",
    ),
]


@pytest.mark.parametrize(("sequential", "words"), NOT_CONVERTIBLE)
def test_other_sequentials_are_refused(sequential, words):
    with pytest.raises(ValueError, match=words):
        TailMLP.from_sequential(sequential)


@pytest.mark.parametrize(
    "activation", [nn.Softmax(-1), nn.LayerNorm(4), nn.GLU(), nn.PReLU(HIDDEN), nn.LogSoftmax(-1)]
)
def test_an_activation_that_mixes_features_is_refused(activation):
    with pytest.raises(ValueError, match="activation must be elementwise"):
        TailMLP(IN, HIDDEN, activation=activation)


@pytest.mark.parametrize("blocks", [0, -3])
def test_less_than_one_block_is_refused(blocks):
    with pytest.raises(ValueError, match=f"blocks must be at least 1, got {blocks}"):
        TailMLP(IN, HIDDEN, blocks=blocks)


def test_a_bad_p_is_refused():
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 1.5"):
        TailMLP(IN, HIDDEN, p=1.5)


def test_a_k_above_the_hidden_features_is_refused():
    mlp = TailMLP(IN, HIDDEN)
    mlp.set_k(HIDDEN + 1)
    with pytest.raises(ValueError, match=f"at most the number of features n={HIDDEN}, got k=38"):
        mlp(torch.randn(3, IN))


def test_a_dim_that_the_input_does_not_have_is_refused():
    with pytest.raises(IndexError, match="batch_dim must be a dim of the input, got batch_dim=2"):
        TailMLP(IN, HIDDEN, batch_dim=2)(torch.randn(3, IN))


def test_a_copy_is_independent_and_equal():
    mlp = TailMLP(IN, HIDDEN, OUT)
    copied = copy.deepcopy(mlp)
    x = torch.randn(9, IN)
    torch.manual_seed(3)
    expected = mlp(x)
    torch.manual_seed(3)
    assert_close(copied(x), expected, rtol=0, atol=0)


# --- precision, compiler, and the rest of the library -------------------------------------------


@GATED
def test_autocast_has_the_dtype_of_the_sequential_and_its_accuracy(gated):
    mlp = TailMLP(64, 256, 32, gated=gated)
    x = torch.randn(100, 64)
    torch.manual_seed(7)
    exact = mlp(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(7)
        actual = mlp(x)
        torch.manual_seed(7)
        expected = as_sequential(mlp)(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    error, reference = (actual - exact).norm(), (expected - exact).norm()
    assert error <= 1.5 * reference


@GATED
def test_bfloat16_is_as_accurate_as_the_sequential(gated):
    mlp = TailMLP(64, 1024, 32, p=0.3, gated=gated, blocks=16)
    x = torch.randn(200, 64)
    torch.manual_seed(7)
    exact = mlp(x)
    mlp, x = mlp.bfloat16(), x.bfloat16()
    torch.manual_seed(7)
    error = (mlp(x) - exact).norm()
    torch.manual_seed(7)
    assert error <= 1.5 * (as_sequential(mlp)(x) - exact).norm()
    mlp(x).sum().backward()
    assert mlp.linears[0].weight.grad.dtype == torch.bfloat16


@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    @GATED
    def test_one_graph_with_the_same_results_and_gradients(self, gated):
        mlp = TailMLP(IN, HIDDEN, OUT, gated=gated, blocks=4).double()
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
        x = double(20, IN)
        inputs, upstream = [x, *mlp.parameters()], torch.randn(20, OUT, dtype=torch.float64)
        assert_close(gradients(compiled, inputs, upstream), gradients(mlp, inputs, upstream))

    def test_a_change_of_p_or_of_the_batch_size_is_seen(self):
        mlp = TailMLP(IN, HIDDEN, OUT, blocks=4)
        compiled = torch.compile(mlp, fullgraph=True, backend="eager")
        for p, batch in [(0.5, 20), (0.1, 20), (0.9, 20), (0.5, 40), (0.5, 41), (0.1, 43)]:
            mlp.p = p
            x = torch.randn(batch, IN)
            torch.manual_seed(7)
            actual = compiled(x)
            torch.manual_seed(7)
            assert_close(actual, as_sequential(mlp)(x))

    @pytest.mark.parametrize(
        "lengths",
        [
            td.lengths.Uniform(min_k=3),
            td.lengths.Sizes([2, 30], weights=[1, 2]),
            td.lengths.Mixed([td.lengths.Full(), td.lengths.LogUniform(0.1)], weights=[1, 3]),
        ],
    )
    def test_other_lengths(self, lengths):
        mlp = TailMLP(IN, HIDDEN, OUT, lengths=lengths, blocks=4)
        compiled = torch.compile(mlp, fullgraph=True, backend="eager")
        x = torch.randn(20, IN)
        torch.manual_seed(7)
        actual = compiled(x)
        torch.manual_seed(7)
        assert_close(actual, as_sequential(mlp)(x))

    @GATED
    def test_a_change_of_k_does_not_recompile(self, gated):
        mlp = TailMLP(IN, HIDDEN, OUT, gated=gated).eval()
        counter = CompileCounter()
        compiled = torch.compile(mlp, fullgraph=True, backend=counter)
        x = torch.randn(8, IN)
        for k in (3, 7, HIDDEN):
            mlp.set_k(k)
            assert_close(compiled(x), mlp(x))
        assert counter.frame_count == 1


@GATED
def test_an_exported_model_computes_what_the_model_does(gated):
    mlp = TailMLP(IN, HIDDEN, OUT, gated=gated).eval()
    x = torch.randn(8, IN)
    assert_close(torch.export.export(mlp, (x,)).module()(x), mlp(x))


@GATED
def test_scree_is_that_of_the_sequential(gated):
    mlp = TailMLP(IN, HIDDEN, OUT, gated=gated)
    data = [(torch.randn(20, IN), torch.randn(20, OUT)) for _ in range(2)]
    actual = td.scree(mlp, nn.MSELoss(), data, progress=False)
    apart = mlp.to_gated() if gated else mlp.to_sequential()
    expected = td.scree(apart, nn.MSELoss(), data, progress=False)
    assert actual.layer == "dropout"
    assert actual.ks == expected.ks == list(range(HIDDEN + 1))
    assert_close(actual.loss, expected.loss)
    assert_close(actual.cov, expected.cov)


@GATED
@pytest.mark.parametrize("k", [1, 9, HIDDEN])
def test_pruning_cuts_it_like_the_sequential(k, gated):
    mlp = TailMLP(IN, HIDDEN, OUT, activation=nn.Sigmoid, gated=gated).eval()
    x = torch.randn(8, IN)
    small = td.prune(mlp, k, x[:2])
    assert isinstance(small, TailMLP)
    *into, last = small.linears
    assert [one.out_features for one in into] == [last.in_features] * len(into) == [k] * len(into)
    mlp.set_k(k)
    assert_close(small(x), mlp(x))
    small.train()
    assert_same(small.double(), double(20, IN))


def test_groups_of_hidden_features_are_skipped_like_single_ones():
    mlp = TailMLP(5, 24, 3, blocks=4)
    mlp.dropout = TailDropout(0.4, multiple_of=4)
    sequential = mlp.to_sequential()
    x = torch.randn(64, 5)
    torch.manual_seed(1)
    output = mlp(x)
    drawn = mlp.dropout.drawn_k
    torch.manual_seed(1)
    assert_close(output, sequential(x))
    assert (drawn % 4 == 0).all()
    assert drawn.unique().numel() > 3


def test_elastic_computes_gated_ones_in_groups():
    torch.manual_seed(0)
    first, second = (TailMLP(IN, HIDDEN, IN, activation=nn.SiLU, gated=True) for _ in range(2))
    model = nn.Sequential(first, second).double()
    elastic, x = Elastic(model, double(8, IN), groups=4), double(40, IN)
    assert elastic.masked is None
    inputs, upstream = [x, *model.parameters()], torch.randn(40, IN, dtype=torch.float64)
    actual = gradients(elastic.train(), inputs, upstream)
    ks = [mlp.dropout.drawn_k for mlp in model]
    for mlp, k in zip(model, ks, strict=True):
        mlp.set_k(k)
    assert_close(actual, gradients(model, inputs, upstream))
    assert min(k.unique().numel() for k in ks) > 3


# --- gated, as in Llama -------------------------------------------------------------------------


class GatedMLP(nn.Module):
    """As Llama has it."""

    def __init__(self, bias=False, act_fn=None, factor=1.0):
        super().__init__()
        self.gate_proj = nn.Linear(IN, HIDDEN, bias)
        self.up_proj = nn.Linear(IN, HIDDEN, bias)
        self.down_proj = nn.Linear(HIDDEN, IN, bias)
        self.act_fn = nn.SiLU() if act_fn is None else act_fn
        self.factor = factor

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * self.factor


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act_fn", [nn.GELU("tanh"), torch.tanh])
def test_from_gated_computes_the_same_and_shares_the_parameters(act_fn, training):
    llama = GatedMLP(bias=True, act_fn=act_fn).double().train(training)
    mlp = TailMLP.from_gated(llama, TailDropout(0.3, batch_dim=(0, 1)), blocks=3)
    assert mlp.training == mlp.dropout.training == training
    assert mlp.gate is llama.gate_proj
    assert mlp.up is llama.up_proj
    assert mlp.down is llama.down_proj
    x = double(4, 5, IN)
    assert_close(mlp.eval()(x), llama(x))
    assert_same(mlp.train(), x)


def test_to_gated_and_back_has_the_names_of_llama():
    llama = GatedMLP().double().eval()
    mlp = TailMLP.from_gated(llama, TailDropout(0.3))
    gated = mlp.to_gated()
    assert not gated.training
    assert gated.state_dict().keys() == llama.state_dict().keys()
    for name, parameter in llama.named_parameters():
        assert gated.get_parameter(name) is parameter
    x = double(9, IN)
    assert_close(gated(x), llama(x))
    torch.manual_seed(7)
    expected = mlp.train()(x)
    torch.manual_seed(7)
    assert_close(gated.train()(x), expected)
    back = TailMLP.from_gated(gated)
    assert back.dropout is mlp.dropout
    assert back.training


def test_it_stands_in_for_the_mlps_of_a_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    tokens = torch.randint(20, (3, 5))
    expected, keys = model(tokens).logits, model.state_dict().keys()
    for layer in model.model.layers:
        layer.mlp = TailMLP.from_gated(layer.mlp)
    assert_close(model(tokens).logits, expected)
    td.draw_together(model)
    loss = model.train()(tokens, labels=tokens).loss
    ks = [layer.mlp.dropout.drawn_k for layer in model.model.layers]
    assert_close(*ks)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for layer in model.model.layers:
        layer.mlp = layer.mlp.to_gated()
    assert model.state_dict().keys() == keys


class Phi3MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Linear(IN, 2 * HIDDEN)
        self.down_proj = nn.Linear(HIDDEN, IN)
        self.act_fn = nn.SiLU()


def with_inserted():
    module = GatedMLP()
    td.insert(module, "down_proj", TailDropout(), at="input")
    return module


def with_dropout():
    module = GatedMLP()
    module.dropout = nn.Dropout()
    return module


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Phi3MLP, r"gate_proj, up_proj and down_proj.*gate_up_proj.*got Phi3MLP"),
        (with_dropout, "'Dropout'"),
        (with_inserted, r"remove\(\) it first"),
        (lambda: GatedMLP(factor=2.0), "computes something else"),
        (lambda: GatedMLP(act_fn=nn.Softmax(-1)), "activation must be elementwise"),
    ],
)
def test_other_modules_are_refused(make, words):
    before = torch.get_rng_state()
    module = make()
    torch.set_rng_state(before)
    dropout = TailDropout().eval()
    with pytest.raises(ValueError, match=words):
        TailMLP.from_gated(module.train(), dropout)
    assert not dropout.training
    assert_close(torch.get_rng_state(), before)


def test_draws_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needs stratified draws"):
        TailMLP.from_gated(GatedMLP(), TailDropout(stratified=False))


def test_the_way_back_is_that_of_its_kind():
    with pytest.raises(ValueError, match=r"use to_gated\(\)"):
        TailMLP(IN, HIDDEN, gated=True).to_sequential()
    with pytest.raises(ValueError, match=r"use to_sequential\(\)"):
        TailMLP(IN, HIDDEN).to_gated()
