import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from taildropout.functional import keep_prefix, tail_dropout, tail_mlp
from taildropout.lengths import Exponential, Sizes, Uniform

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
DTYPES = [*FLOATS, torch.int64, torch.bool]
SAMPLES, FEATURES = 64, 1000

# gradcheck's forward mode goes through torch.jit.script, which announces its own end.
torch_warns_about_itself = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)


def slow_keep_prefix(input, k, dim=-1):
    """Element by element; k is indexed by the dims other than `dim`, from the left."""
    dim %= input.ndim
    k = torch.as_tensor(k)
    output = torch.zeros_like(input)
    for index in itertools.product(*map(range, input.shape)):
        others = index if k.ndim == input.ndim else index[:dim] + index[dim + 1 :]
        sample = tuple(0 if size == 1 else i for i, size in zip(others, k.shape, strict=False))
        if index[dim] < k[sample]:
            output[index] = input[index]
    return output


def assert_same_bits(actual, expected):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    copies = (x.detach().clone(memory_format=torch.contiguous_format) for x in (actual, expected))
    actual, expected = (copy.flatten().view(torch.uint8) for copy in copies)
    assert_close(actual, expected, rtol=0, atol=0)


def lengths_of(output, dim=-1):
    """How many features of each sample are not zero; for an input without zeros this is k."""
    return output.ne(0).sum(dim)


# --- inputs of every kind ---------------------------------------------------------------------


@st.composite
def tensors(draw, dtypes, min_size=0):
    """Without zeros, of 1 to 4 dims, in every layout that a tensor may come in."""
    shape = draw(st.lists(st.integers(min_size, 4), min_size=1, max_size=4))
    dtype = draw(st.sampled_from(dtypes))
    layouts = ["contiguous", "permuted", "sliced", "expanded", "channels_last"]
    layout = draw(st.sampled_from(layouts[: 5 if len(shape) == 4 else 4]))
    x = torch.arange(1, math.prod(shape) + 1).reshape(shape).to(dtype)
    if layout == "permuted":
        order = draw(st.permutations(range(len(shape))))
        x = x.permute(order).contiguous().permute(np.argsort(order).tolist())
    elif layout == "sliced":
        x = x.repeat_interleave(2, dim=-1)[..., ::2]
    elif layout == "expanded":
        x = x[..., :1].expand(shape)
    elif layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    return x


def dims(x):
    return st.integers(-x.ndim, x.ndim - 1)


@st.composite
def lengths_for(draw, shape, dim):
    """An int, one k for each index of the leading other dims, or a tensor that broadcasts."""
    n = shape[dim]
    others = list(shape)
    del others[dim]
    per_sample = others[: draw(st.integers(0, len(others)))]
    broadcast = [draw(st.sampled_from([1, size])) for size in shape]
    broadcast[dim] = 1
    form = draw(st.sampled_from(["int", per_sample, broadcast]))
    if form == "int":
        return draw(st.integers(0, n))
    count = math.prod(form)
    values = draw(st.lists(st.integers(0, n), min_size=count, max_size=count))
    dtype = draw(st.sampled_from([torch.uint8, torch.int32, torch.int64]))
    return torch.tensor(values, dtype=dtype).reshape(form)


@given(st.data())
def test_keep_prefix_is_the_slow_loop_bit_for_bit_in_the_layout_of_the_input(data):
    x = data.draw(tensors(DTYPES))
    dim = data.draw(dims(x))
    k = data.draw(lengths_for(x.shape, dim))
    output = keep_prefix(x, k, dim)
    assert_same_bits(output, slow_keep_prefix(x, k, dim))
    assert output.stride() == torch.empty_like(x).stride()


@given(st.data())
def test_the_gradient_of_keep_prefix_is_the_slow_loop_on_the_incoming_gradient(data):
    x = data.draw(tensors(FLOATS)).requires_grad_()
    dim = data.draw(dims(x))
    k = data.draw(lengths_for(x.shape, dim))
    incoming = 1 + torch.arange(x.numel()).reshape(x.shape).to(x.dtype)
    (grad,) = torch.autograd.grad(keep_prefix(x, k, dim), x, incoming)
    assert_same_bits(grad, slow_keep_prefix(incoming, k, dim))


@given(st.data())
def test_tail_dropout_cuts_one_suffix_per_sample_and_its_gradient(data):
    x = data.draw(tensors(FLOATS, min_size=1)).requires_grad_()
    *batch_dim, dim = data.draw(
        st.lists(dims(x), min_size=1, max_size=x.ndim, unique_by=lambda d: d % x.ndim)
    )
    output = tail_dropout(x, 0.5, True, batch_dim, dim)
    (grad,) = torch.autograd.grad(output, x, torch.ones_like(output))
    kept = output.ne(0)
    assert_same_bits(output, torch.where(kept, x, torch.zeros_like(x)))
    assert_same_bits(kept, kept.cumprod(dim).bool())
    assert_same_bits(grad, kept.to(x.dtype))
    assert output.stride() == torch.empty_like(x).stride()
    samples = {d % x.ndim for d in batch_dim}
    shared = [d for d in range(x.ndim) if d not in samples and d != dim % x.ndim]
    k = kept.sum(dim, keepdim=True)
    one_per_sample = k[tuple(slice(1) if d in shared else slice(None) for d in range(x.ndim))]
    assert_close(k, one_per_sample.expand_as(k), rtol=0, atol=0)


# --- keep_prefix ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_special_values_are_kept_bit_for_bit_and_cut_to_positive_zero(dtype):
    tiny = torch.finfo(dtype).smallest_normal / 2
    special = [-0.0, math.inf, -math.inf, math.nan, tiny, -1.0]
    x = torch.tensor(2 * special, dtype=dtype)
    expected = torch.tensor(special + 6 * [0.0], dtype=dtype)
    assert_same_bits(keep_prefix(x, 6), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", [2, torch.tensor([2, 2, 2])], ids=["int", "tensor"])
def test_nan_and_inf_in_the_tail_reach_neither_output_nor_gradient(k, bad):
    x = torch.ones(3, 4)
    x[:, 2:] = bad
    x.requires_grad_()
    incoming = x.detach().clone()
    output = keep_prefix(x, k)
    (grad,) = torch.autograd.grad(output, x, incoming)
    expected = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(3, 4)
    assert_same_bits(output, expected)
    assert_same_bits(grad, expected)


@pytest.mark.parametrize("k", [2, torch.tensor([0, 2, 4])], ids=["int", "tensor"])
def test_the_input_is_left_alone(k):
    x = torch.ones(3, 4)
    keep_prefix(x, k)
    assert_same_bits(x, torch.ones(3, 4))


def test_the_output_is_never_the_input_even_where_everything_is_kept():
    x = torch.ones(3, 4)
    keep_prefix(x, 4).zero_()
    assert_same_bits(x, torch.ones(3, 4))


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint16, torch.uint32, torch.uint64),
    ],
    ids=str,
)
def test_k_may_have_any_integer_dtype(dtype):
    output = keep_prefix(torch.ones(3, 4), torch.tensor([0, 2, 4], dtype=dtype))
    assert_same_bits(output, torch.tensor([[0.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]))


@pytest.mark.parametrize("k", [np.int64(2), np.uint8(2), torch.tensor(2)])
def test_k_may_be_anything_that_is_an_integer(k):
    assert_same_bits(keep_prefix(torch.ones(4), k), torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_k_compares_exactly_where_the_number_of_features_overflows_its_dtype():
    k = torch.tensor([100, 127], dtype=torch.int8)
    assert lengths_of(keep_prefix(torch.ones(2, 300), k)).tolist() == [100, 127]


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (-1, "k must be at least 0, got k=-1"),
        (torch.tensor([0, 1, -2, 3]), "k must be at least 0, got k=-2"),
        (7, "k must be at most the number of features n=6, got k=7"),
        (torch.tensor([0, 6, 8, 1]), "k must be at most the number of features n=6, got k=8"),
    ],
)
def test_k_outside_0_to_n_is_refused(k, message):
    with pytest.raises(ValueError, match=message):
        keep_prefix(torch.ones(4, 6), k)


@pytest.mark.parametrize("k", [2.0, True, "2", None, [1, 2], np.float64(2), np.array([1, 2])])
def test_k_that_is_not_an_integer_is_refused(k):
    with pytest.raises(TypeError, match="k must be an integer or an integer tensor, got "):
        keep_prefix(torch.ones(4, 6), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64], ids=str)
def test_k_that_is_not_an_integer_tensor_is_refused(dtype):
    with pytest.raises(TypeError, match=f"k must be an integer tensor, got dtype {dtype}"):
        keep_prefix(torch.ones(4, 6), torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("shape", [(3,), (6,), (2, 1), (4, 6), (1, 6), (4, 1, 1), (0,)])
def test_k_of_a_shape_that_does_not_fit_is_refused(shape):
    k = torch.ones(shape, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"k must have one entry per sample.*, got shape .*\(4, 6\)"
    ):
        keep_prefix(torch.ones(4, 6), k)


@pytest.mark.parametrize(("shape", "dim"), [((4, 6), 2), ((4, 6), -3), ((), 0), ((), -1)])
def test_a_dim_that_the_input_does_not_have_is_refused(shape, dim):
    with pytest.raises(IndexError, match=f"dim must be a dim of the input, got dim={dim} .*shape"):
        keep_prefix(torch.ones(shape), 0, dim)


# --- what the backward pass needs -------------------------------------------------------------


def saved_bytes(function):
    saved = []

    def pack(tensor):
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(torch.randn(SAMPLES, FEATURES, requires_grad=True))
    return sum(saved)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: keep_prefix(x, 3),
        lambda x: keep_prefix(x, torch.arange(SAMPLES)),
        lambda x: keep_prefix(x.clone(), torch.arange(SAMPLES), inplace=True),
        lambda x: tail_dropout(x),
        lambda x: tail_dropout(x, stratified=False),
        lambda x: tail_dropout(x.clone(), inplace=True),
    ],
    ids=["int", "tensor", "inplace", "drawn", "independent", "drawn inplace"],
)
def test_only_k_is_saved_for_backward(function):
    assert 0 < saved_bytes(function) <= 16 * SAMPLES


@pytest.mark.parametrize("function", [keep_prefix, lambda x, k: tail_dropout(x)])
def test_of_64_kib_a_mask_of_a_byte_per_number_may_be_saved(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.untyped_storage().nbytes()), lambda _: None
    ):
        for features in (256, 257):  # 64 KiB of float32, and more
            saved.append(0)
            function(torch.randn(64, features, requires_grad=True), torch.arange(64))
    start = saved.index(0, 1)
    assert sum(saved[:start]) <= 64 * 256
    assert 0 < sum(saved[start:]) <= 16 * 64


def test_a_mask_saved_for_backward_would_be_seen():
    assert saved_bytes(torch.nn.functional.dropout) >= SAMPLES * FEATURES


# --- derivatives ------------------------------------------------------------------------------

KS = pytest.mark.parametrize("k", [2, torch.tensor([0, 4, 1])], ids=["int", "tensor"])


@torch_warns_about_itself
@KS
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_first_derivatives_agree_with_finite_differences_in_both_modes(dtype, k):
    x = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    assert gradcheck(
        lambda x: keep_prefix(x, k),
        x,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@torch_warns_about_itself
@KS
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_second_derivatives_agree_with_finite_differences_in_both_modes(dtype, k):
    x = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    assert gradgradcheck(
        lambda x: keep_prefix(x, k) ** 2,
        x,
        check_batched_grad=True,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
    )


def cubed(x):
    return keep_prefix(x, 2) ** 3


@torch_warns_about_itself
@pytest.mark.parametrize("jacobian", [torch.func.jacrev, torch.func.jacfwd])
def test_torch_func_has_the_jacobian(jacobian):
    x = torch.tensor([1.0, 2.0, 3.0])
    assert_close(jacobian(cubed)(x), torch.diag(torch.tensor([3.0, 12.0, 0.0])))


@torch_warns_about_itself
def test_torch_func_has_the_hessian():
    x = torch.tensor([1.0, 2.0, 3.0])
    hessian = torch.func.hessian(lambda x: cubed(x).sum())(x)
    assert_close(hessian, torch.diag(torch.tensor([6.0, 12.0, 0.0])))


@torch_warns_about_itself
def test_torch_func_has_the_jvp():
    x = torch.tensor([1.0, 2.0, 3.0])
    output, tangent = torch.func.jvp(cubed, (x,), (torch.tensor([1.0, -1.0, math.nan]),))
    assert_close(output, torch.tensor([1.0, 8.0, 0.0]))
    assert_close(tangent, torch.tensor([3.0, -12.0, 0.0]))


def test_torch_func_has_per_sample_gradients():
    x, k = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 4])
    grads = torch.vmap(torch.func.grad(lambda x, k: (keep_prefix(x, k) ** 2).sum()))(x, k)
    assert_close(grads, 2 * slow_keep_prefix(x, k))


@pytest.mark.parametrize("k", [2, torch.tensor([0, 4, 1])], ids=["int", "tensor"])
def test_gradients_may_be_batched(k):
    x = torch.randn(3, 4, requires_grad=True)
    incoming = torch.randn(5, 3, 4)
    (grads,) = torch.autograd.grad(keep_prefix(x, k), x, incoming, is_grads_batched=True)
    assert_same_bits(grads, torch.stack([slow_keep_prefix(g, k) for g in incoming]))


# --- vmap -------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_dim", [0, 1, -1])
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("k", [2, torch.tensor([0, 3, 1])], ids=["int", "tensor"])
def test_vmap_over_the_input(k, dim, in_dim):
    x = torch.randn(5, 3, 3)
    output = torch.vmap(lambda x: keep_prefix(x, k, dim), in_dims=in_dim)(x.movedim(0, in_dim))
    assert_same_bits(output, torch.stack([slow_keep_prefix(row, k, dim) for row in x]))


def test_under_vmap_a_k_above_n_keeps_everything():
    """Nobody can look at the values of k there."""
    x = torch.randn(3, 4)
    output = torch.vmap(lambda k: keep_prefix(x, k))(torch.tensor([2, 4, 9]))
    assert_close(output[0], keep_prefix(x, 2), rtol=0, atol=0)
    assert_close(output[1:], x.expand(2, 3, 4), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 3, 1)], ids=["int", "per sample", "broadcast"])
def test_vmap_over_k(shape):
    x, k = torch.randn(3, 4), torch.arange(math.prod(shape)).reshape(shape) % 5
    output = torch.vmap(lambda k: keep_prefix(x, k))(k)
    assert_same_bits(output, torch.stack([slow_keep_prefix(x, each) for each in k]))


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 3, 1)], ids=["int", "per sample", "broadcast"])
@pytest.mark.parametrize("x_dim", [0, 1, -1])
@pytest.mark.parametrize("k_dim", [0, -1])
def test_vmap_over_input_and_k(shape, x_dim, k_dim):
    x, k = torch.randn(5, 3, 4), torch.arange(math.prod(shape)).reshape(shape) % 5
    output = torch.vmap(keep_prefix, in_dims=(x_dim, k_dim))(
        x.movedim(0, x_dim), k.movedim(0, k_dim)
    )
    expected = [slow_keep_prefix(row, each) for row, each in zip(x, k, strict=True)]
    assert_same_bits(output, torch.stack(expected))


@pytest.mark.parametrize("rows", [3, 4, 5])
@pytest.mark.parametrize("k_outside", [True, False])
def test_vmap_of_vmap_tries_every_k_on_every_row(rows, k_outside):
    x, k = torch.randn(rows, 4), torch.tensor([1, 2, 3, 4])
    over_x, over_k = (0, None), (None, 0)
    inner, outer = (over_x, over_k) if k_outside else (over_k, over_x)
    output = torch.vmap(torch.vmap(keep_prefix, in_dims=inner), in_dims=outer)(x, k)
    expected = torch.stack([slow_keep_prefix(x, each) for each in k.tolist()])
    assert_same_bits(output, expected if k_outside else expected.transpose(0, 1))


def test_vmap_over_k_of_a_jacobian():
    x, k = torch.randn(4), torch.arange(4)
    jacobians = torch.vmap(torch.func.jacrev(keep_prefix), in_dims=(None, 0))(x, k)
    assert_same_bits(jacobians, torch.stack([torch.diag((torch.arange(4) < i).float()) for i in k]))


@pytest.mark.parametrize("stratified", [True, False])
def test_vmap_with_different_randomness_draws_for_every_call(stratified, assert_drawn_from):
    x = torch.ones(20_000, 2, 5)
    output = torch.vmap(
        lambda x: tail_dropout(x, 0.4, stratified=stratified), randomness="different"
    )(x)
    k = lengths_of(output)
    pmf = Exponential(0.4).pmf(5)
    assert_drawn_from(k[:, 0], pmf)
    assert_drawn_from(k[:, 1], pmf)


@pytest.mark.parametrize("stratified", [True, False])
def test_vmap_with_the_same_randomness_draws_once(stratified):
    output = torch.vmap(lambda x: tail_dropout(x, stratified=stratified), randomness="same")(
        torch.ones(5, 7, 100)
    )
    k = lengths_of(output)
    assert_same_bits(k, k[:1].expand(5, 7))
    assert len(set(k[0].tolist())) > 1


def test_vmap_without_randomness_refuses_to_draw():
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(tail_dropout)(torch.ones(5, 7, 100))


# --- in place ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, torch.tensor([0, 4, 1])], ids=["int", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_writes_into_the_input(dtype, k):
    x = torch.ones(3, 4, dtype=dtype)
    output = keep_prefix(x, k, inplace=True)
    assert output is x
    assert_same_bits(x, slow_keep_prefix(torch.ones(3, 4, dtype=dtype), k))


def test_inplace_on_a_view_writes_into_its_base():
    base = torch.ones(4, 6)
    keep_prefix(base[::2, ::2].t(), torch.tensor([0, 1, 2]), inplace=True)
    expected = torch.ones(4, 6)
    expected[::2, ::2] = torch.tensor([[0.0, 1, 1], [0, 0, 1]])
    assert_same_bits(base, expected)


def test_inplace_has_the_same_gradient():
    x = torch.tensor([[1.0, 2.0, math.nan]], requires_grad=True)
    output = keep_prefix(x * 3, 2, inplace=True)
    (grad,) = torch.autograd.grad(output, x, torch.tensor([[1.0, 10.0, math.inf]]))
    assert_same_bits(grad, torch.tensor([[3.0, 30.0, 0.0]]))


def test_inplace_on_a_leaf_is_refused_by_torch():
    with pytest.raises(RuntimeError, match="leaf Variable"):
        keep_prefix(torch.ones(3, 4, requires_grad=True), 2, inplace=True)


def test_tail_dropout_inplace_writes_into_the_input():
    x = torch.randn(8, 100)
    torch.manual_seed(1)
    expected = tail_dropout(x)
    torch.manual_seed(1)
    output = tail_dropout(x, inplace=True)
    assert output is x
    assert_same_bits(output, expected)


# --- tail_dropout: how k is drawn -------------------------------------------------------------


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("p", [0.03, 0.5, 0.9])
@pytest.mark.parametrize("n", [1, 2, 13])
def test_k_follows_the_exponential_of_p(n, p, stratified, assert_drawn_from):
    output = tail_dropout(torch.ones(20_000, n), p, stratified=stratified)
    assert_drawn_from(lengths_of(output), Exponential(p).pmf(n))


def test_k_follows_the_given_lengths_and_not_p(assert_drawn_from):
    lengths = Sizes([2, 5, 13], weights=[1, 5, 2])
    output = tail_dropout(torch.ones(20_000, 13), 1.0, lengths=lengths, stratified=False)
    assert_drawn_from(lengths_of(output), lengths.pmf(13))


def test_draws_are_stratified_unless_told_otherwise():
    x = torch.ones(8, 8)
    spread = [sorted(lengths_of(tail_dropout(x, lengths=Uniform())).tolist()) for _ in range(20)]
    free = [
        sorted(lengths_of(tail_dropout(x, lengths=Uniform(), stratified=False)).tolist())
        for _ in range(20)
    ]
    assert spread == 20 * [list(range(1, 9))]
    assert list(range(1, 9)) not in free


@pytest.mark.parametrize("p", [0.5, 1e-3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_k_is_drawn_at_full_precision_whatever_the_dtype(dtype, p, assert_drawn_from):
    n = 1025
    output = tail_dropout(torch.ones(10_000, n, dtype=dtype), p, stratified=False)
    assert_drawn_from(lengths_of(output), Exponential(p).pmf(n))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_k_occurs_in_half_precision(dtype):
    n = 1025
    x = torch.ones(4 * (n + 1), n, dtype=dtype)
    k = lengths_of(tail_dropout(x, lengths=Uniform(min_k=0)))
    assert_same_bits(k.bincount(), torch.full((n + 1,), 4))


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_dropped_fraction_of_a_stratified_batch_is_p(dtype, p):
    batch, n = 5000, 301
    k = lengths_of(tail_dropout(torch.ones(batch, n, dtype=dtype), p))
    dropped = 1 - k.double().mean().item() / n
    assert abs(dropped - p) < 1 / batch  # of any monotone function over evenly spread numbers


@pytest.mark.parametrize(
    ("batch_dim", "dropout_dim", "samples"),
    [
        (0, -1, (5, 1, 1)),
        (-4, 3, (5, 1, 1)),
        (1, -1, (1, 6, 1)),
        (-2, -1, (1, 1, 7)),
        ([0], -1, (5, 1, 1)),
        ([0, 1], -1, (5, 6, 1)),
        ((2, 0), -1, (5, 1, 7)),
        ([-4, -2], 3, (5, 1, 7)),
        ([0, 1, 2], -1, (5, 6, 7)),
        ((), -1, (1, 1, 1)),
    ],
)
def test_each_index_of_batch_dim_has_its_own_k_shared_along_the_other_dims(
    batch_dim, dropout_dim, samples
):
    count = math.prod(samples)
    sizes = Uniform(min_k=0)
    output = tail_dropout(
        torch.ones(5, 6, 7, count - 1), 0.5, True, batch_dim, dropout_dim, lengths=sizes
    )
    k = lengths_of(output)
    drawn = k[tuple(slice(size) for size in samples)]
    assert drawn.flatten().sort().values.tolist() == list(range(count))
    assert_same_bits(k, drawn.expand(5, 6, 7))


def test_features_may_lie_along_any_dim():
    k = lengths_of(tail_dropout(torch.ones(8, 7, 5), 0.5, True, 2, 0), dim=0)
    assert k.shape == (7, 5)
    assert_same_bits(k, k[:1].expand(7, 5))


def test_every_call_draws_anew():
    x = torch.ones(64, 1000)
    assert not torch.equal(tail_dropout(x), tail_dropout(x))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_p_0_keeps_everything_bit_for_bit(dtype):
    x = torch.randn(5, 7, dtype=dtype)
    x[0] = math.nan
    assert_same_bits(tail_dropout(x, 0), x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_p_1_drops_everything(dtype):
    x = torch.full((5, 7), math.nan, dtype=dtype)
    assert_same_bits(tail_dropout(x, 1), torch.zeros(5, 7, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_p_may_be_a_tensor_without_dims(dtype):
    x, p = torch.randn(64, 100), torch.tensor(0.25, dtype=dtype)
    torch.manual_seed(1)
    expected = tail_dropout(x, 0.25)
    torch.manual_seed(1)
    assert_same_bits(tail_dropout(x, p), expected)


def test_a_generator_reproduces_the_output_and_leaves_the_global_one_alone():
    x = torch.randn(64, 100)
    state = torch.get_rng_state()
    first, second, other = (
        tail_dropout(x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert_same_bits(first, second)
    assert not torch.equal(first, other)
    assert_same_bits(torch.get_rng_state(), state)


# --- tail_dropout: when it does not draw ------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_training_the_input_itself_is_returned(dtype):
    x = torch.ones(3, 4, dtype=dtype)
    state = torch.get_rng_state()
    assert tail_dropout(x, training=False) is x
    assert tail_dropout(x, training=False, inplace=True) is x
    assert_same_bits(x, torch.ones(3, 4, dtype=dtype))
    assert_same_bits(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_an_integer_or_boolean_input_is_refused_in_training(dtype):
    message = rf"needs a floating-point or complex input, got {dtype}: convert it, call eval\(\)"
    with pytest.raises(TypeError, match=message):
        tail_dropout(torch.ones(3, 4, dtype=dtype))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, torch.tensor(1.1), torch.tensor(math.nan)])
def test_p_outside_0_to_1_is_refused(p, training):
    with pytest.raises(ValueError, match=r"p is the .* fraction .* must be in \[0, 1\], got"):
        tail_dropout(torch.ones(3, 4), p, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", ["a", None])
def test_p_that_is_not_a_number_is_refused(p, training):
    with pytest.raises(TypeError, match=r"p must be a number in \[0, 1\], got"):
        tail_dropout(torch.ones(3, 4), p, training)


@pytest.mark.parametrize(
    ("batch_dim", "dropout_dim"),
    [(0, 0), (1, -1), (-1, 1), ([0, 1], -1), ([0, 0], 1), ([0, -2], 1)],
)
def test_dims_that_coincide_are_refused_once_negative_ones_are_resolved(batch_dim, dropout_dim):
    message = r"batch_dim and dropout_dim must be different dims, got .*shape \(3, 4\)"
    with pytest.raises(ValueError, match=message):
        tail_dropout(torch.ones(3, 4), 0.5, True, batch_dim, dropout_dim)


@pytest.mark.parametrize(
    ("batch_dim", "dropout_dim", "message"),
    [
        (2, -1, "batch_dim must be a dim of the input, got batch_dim=2 "),
        ([0, -3], -1, "batch_dim must be a dim of the input, got batch_dim=-3 "),
        (0, 2, "dropout_dim must be a dim of the input, got dropout_dim=2 "),
        (0, -3, "dropout_dim must be a dim of the input, got dropout_dim=-3 "),
    ],
)
def test_dims_that_the_input_does_not_have_are_refused(batch_dim, dropout_dim, message):
    with pytest.raises(IndexError, match=message + r"for an input of shape \(3, 4\)"):
        tail_dropout(torch.ones(3, 4), 0.5, True, batch_dim, dropout_dim)


# --- tensors without elements, without memory, and traced -------------------------------------

BOTH = pytest.mark.parametrize(
    "function", [tail_dropout, lambda x: keep_prefix(x, 0)], ids=["tail_dropout", "keep_prefix"]
)


@BOTH
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_tensors_without_elements_pass_forward_and_back(shape, function):
    x = torch.ones(shape, requires_grad=True)
    output = function(x)
    (grad,) = torch.autograd.grad(output.sum(), x)
    assert_same_bits(output, torch.ones(shape))
    assert_same_bits(grad, torch.ones(shape))


def test_k_of_no_samples_is_accepted():
    k = torch.ones(0, dtype=torch.int64)
    assert keep_prefix(torch.ones(0, 3), k).shape == (0, 3)


MEMORY_FORMATS = pytest.mark.parametrize(
    "make",
    [
        lambda **options: torch.ones(4, 6, **options),
        lambda **options: torch.ones(6, 4, **options).t(),
        lambda **options: torch.ones(4, 6, 2, 2, **options).to(memory_format=torch.channels_last),
    ],
    ids=["contiguous", "transposed", "channels_last"],
)


@MEMORY_FORMATS
@pytest.mark.parametrize(
    "function",
    [
        lambda x: tail_dropout(x, 0.5, True, 0, 1),
        lambda x: tail_dropout(x, 0.5, True, 0, 1, stratified=False),
        lambda x: keep_prefix(x, 2, 1),
        lambda x: keep_prefix(x, torch.arange(4, device=x.device), 1),
    ],
    ids=["stratified", "independent", "int", "tensor"],
)
class TestTensorsWithoutData:
    def check(self, function, x):
        x = x.requires_grad_()
        output = function(x)
        (grad,) = torch.autograd.grad(output.sum(), x)
        for result in (output, grad):
            assert (result.shape, result.dtype, result.device) == (x.shape, x.dtype, x.device)
        assert output.stride() == x.stride()

    def test_meta_tensors_pass_forward_and_back(self, function, make):
        self.check(function, make(device="meta", dtype=torch.bfloat16))

    def test_fake_tensors_pass_forward_and_back(self, function, make):
        with FakeTensorMode():
            self.check(function, make(dtype=torch.bfloat16))


def drawn_under_inference_mode(x, p):
    with torch.inference_mode():
        tail_dropout(x, p)


def drawn_under_fake_tensor_mode(x, p):
    with FakeTensorMode() as mode:
        tail_dropout(mode.from_tensor(x), p)


@torch_warns_about_itself
@pytest.mark.parametrize(
    ("draw_first", "p"),
    [
        (drawn_under_inference_mode, 0.41),
        (drawn_under_fake_tensor_mode, 0.42),
        (lambda x, p: tail_dropout(x.to("meta"), p), 0.43),
        (lambda x, p: torch.func.grad(lambda x: tail_dropout(x, p).sum())(x), 0.44),
        (lambda x, p: torch.func.jvp(lambda x: tail_dropout(x, p), (x,), (x,)), 0.45),
        (lambda x, p: torch.vmap(lambda x: tail_dropout(x, p), randomness="same")(x[None]), 0.46),
    ],
    ids=["inference_mode", "fake", "meta", "grad", "jvp", "vmap"],
)
def test_a_first_draw_with_unusual_tensors_does_not_spoil_the_next(
    draw_first, p, assert_drawn_from
):
    """The table of cumulative probabilities is kept between calls with the same p and n, and what a
    small input needs between calls of its size."""
    draw_first(torch.ones(2, 5), p)
    small = torch.ones(2, 5, requires_grad=True)
    output = tail_dropout(small, p)
    assert torch.equal(torch.autograd.grad(output.sum(), small)[0], output.detach())
    x = torch.ones(20_000, 5, requires_grad=True)
    output = tail_dropout(x, p)
    output.sum().backward()
    assert_drawn_from(lengths_of(output), Exponential(p).pmf(5))
    assert_same_bits(x.grad, output)


def test_lengths_without_a_pmf_are_refused():
    """As the layer refuses them."""
    x, weight = torch.randn(2, 3), torch.randn(3, 3)
    message = r"lengths must have a pmf\(n\), as lengths.Uniform\(\) has, got 3"
    with pytest.raises(TypeError, match=message):
        tail_dropout(x, lengths=3)
    with pytest.raises(TypeError, match=message):
        tail_mlp(x, weight, None, weight, None, lengths=3)
