"""tail_linear, prefix_linear and expected_mse against loops over k."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch.nn.functional import linear, mse_loss
from torch.testing import assert_close

from taildropout.functional import (
    expected_mse,
    keep_prefix,
    prefix_linear,
    tail_dropout,
    tail_linear,
)
from taildropout.lengths import Exponential, Sizes, Uniform


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def by_loop(input, weight, bias, ks):
    return torch.stack([linear(keep_prefix(input, k), weight, bias) for k in ks])


def assert_same_with_gradients(actual, expected, variables):
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    options = {"grad_outputs": upstream, "retain_graph": True, "materialize_grads": True}
    assert_close(
        torch.autograd.grad(actual, variables, **options),
        torch.autograd.grad(expected, variables, **options),
        rtol=1e-12,
        atol=1e-12,
    )


@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    n=st.integers(0, 9),
    out=st.integers(1, 4),
    with_bias=st.booleans(),
    data=st.data(),
)
def test_prefix_linear_is_the_loop_over_k(leading, n, out, with_bias, data):
    ks = data.draw(st.none() | st.lists(st.integers(0, n), min_size=1, max_size=12))
    input, weight = double(*leading, n), double(out, n)
    bias = double(out) if with_bias else None
    asked = range(n + 1) if ks is None else ks
    variables = [input, weight] + [bias] * with_bias
    actual = prefix_linear(input, weight, bias, ks)
    assert_same_with_gradients(actual, by_loop(input, weight, bias, asked), variables)


def at_each_k(input, weight, bias, tail_bias, scale, ks):
    n, outputs = input.shape[-1], []
    for k in ks:
        factor = (n / k) ** 0.5 if scale and k else 1
        output = linear(factor * keep_prefix(input, k), weight, bias)
        outputs.append(output + tail_bias[k] if k < n else output)
    return torch.stack(outputs)


@pytest.mark.parametrize("scale", [None, "sqrt"])
@pytest.mark.parametrize("batch_dim", [0, 1, (1, 0), ()])
@pytest.mark.parametrize("stratified", [True, False])
def test_tail_linear_has_the_draws_of_tail_dropout(scale, batch_dim, stratified):
    input, weight, bias, tail_bias = double(5, 4, 6), double(3, 6), double(3), double(6, 3)
    options = {"p": 0.4, "batch_dim": batch_dim, "stratified": stratified}
    generator = torch.Generator().manual_seed(5)
    mask = tail_dropout(torch.ones(5, 4, 6), **options, generator=generator)
    k = mask.sum(-1).long()  # (5, 4)
    generator.manual_seed(5)
    actual = tail_linear(
        input, weight, bias, tail_bias, **options, scale=scale, generator=generator
    )
    every = at_each_k(input, weight, bias, tail_bias, scale, range(7))  # (7, 5, 4, 3)
    expected = every.gather(0, k[None, ..., None].expand(1, 5, 4, 3))[0]
    assert_same_with_gradients(actual, expected, [input, weight, bias, tail_bias])


def test_tail_linear_in_eval_is_linear():
    input, weight, bias = torch.randn(5, 6), torch.randn(3, 6), torch.randn(3)
    actual = tail_linear(input, weight, bias, torch.randn(6, 3), training=False, scale="sqrt")
    assert_close(actual, linear(input, weight, bias), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tail_bias": torch.ones(5, 3)}, r"must fit, got \(2, 6\), \(3, 6\) and \(5, 3\)"),
        ({"input": torch.ones(2, 5)}, r"must fit, got \(2, 5\)"),
        ({"scale": "n"}, r"scale must be \"sqrt\" or None, got 'n'"),
        ({"p": 1.5}, "p is the expected fraction"),
    ],
)
def test_bad_arguments_of_tail_linear(options, words):
    good = {"input": torch.ones(2, 6), "weight": torch.ones(3, 6), "bias": None}
    with pytest.raises(ValueError, match=words):
        tail_linear(**{**good, "tail_bias": torch.ones(6, 3), **options})


def test_ks_may_be_a_tensor():
    input, weight = double(3, 5), double(2, 5)
    actual = prefix_linear(input, weight, ks=torch.tensor([4, 0, 4]))
    assert_close(actual, by_loop(input, weight, None, [4, 0, 4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_features_add_up_accurately_in_every_dtype(dtype):
    """Beside the loop in the same dtype, its error against float64 is not larger."""
    input, weight = torch.randn(20, 600).to(dtype), torch.randn(7, 600).to(dtype)
    exact = by_loop(input.double(), weight.double(), None, range(601))
    actual = prefix_linear(input, weight)
    assert actual.dtype == dtype
    assert_close(actual.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-4)


def test_gradcheck():
    assert torch.autograd.gradcheck(prefix_linear, (double(2, 4), double(3, 4), double(3)))
    assert torch.autograd.gradgradcheck(prefix_linear, (double(2, 4), double(3, 4), double(3)))


@pytest.mark.parametrize(
    ("weight", "ks", "error", "words"),
    [
        ((2, 4), None, ValueError, r"weight must have shape \(out_features, 5\).* got \(2, 4\)"),
        ((5,), None, ValueError, r"weight must have shape .* got \(5,\)"),
        ((2, 5), [0, 6], ValueError, r"in 0, ..., n=5, got \[0, 6\]"),
        ((2, 5), [-1], ValueError, r"in 0, ..., n=5, got \[-1\]"),
        ((2, 5), [], ValueError, "at least one k"),
        ((2, 5), [1.5], TypeError, "k must be an integer"),
    ],
)
def test_bad_arguments_of_prefix_linear(weight, ks, error, words):
    with pytest.raises(error, match=words):
        prefix_linear(torch.ones(3, 5), torch.ones(weight), ks=ks)


LENGTHS = [
    Exponential(0.5),
    Exponential(0.01),
    Exponential(0.3, min_k=2),
    Uniform(),
    Uniform(min_k=0),
    Sizes([1, 4], weights=[1, 3]),
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("leading", [(), (7,), (2, 3)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_expected_mse_is_the_mean_over_the_pmf(lengths, leading, with_bias):
    hidden, weight, target = double(*leading, 6), double(4, 6), double(*leading, 4)
    bias = double(4) if with_bias else None
    expected = sum(
        probability * mse_loss(linear(keep_prefix(hidden, k), weight, bias), target)
        for k, probability in enumerate(lengths.pmf(6))
    )
    actual = expected_mse(hidden, weight, target, lengths, bias)
    assert_same_with_gradients(actual, expected, [hidden, weight, target] + [bias] * with_bias)


def test_sampling_converges_to_expected_mse():
    hidden, weight, target = torch.randn(6), torch.randn(4, 6), torch.randn(4)
    many = tail_dropout(hidden.expand(40_000, 6), 0.5, stratified=False)
    losses = (linear(many, weight) - target).square().mean(1)
    exact = expected_mse(hidden, weight, target, Exponential(0.5))
    assert abs(losses.mean() - exact) < 4 * losses.std() / 200


@pytest.mark.parametrize(
    ("hidden", "weight", "target"),
    [((3, 5), (2, 4), (3, 2)), ((3, 5), (2, 5), (3, 4)), ((3, 5), (2, 5), (4, 2))],
)
def test_shapes_that_do_not_fit_are_refused(hidden, weight, target):
    with pytest.raises(ValueError, match=r"must fit, got \(3, 5\)"):
        expected_mse(torch.ones(hidden), torch.ones(weight), torch.ones(target), Uniform())


# --- principal components by gradient descent ---------------------------------------------------

WIDTH = 16


def digits():
    pixels = torch.tensor(load_digits().data) / 16
    return pixels - pixels.mean(0)


def train_linear_autoencoder(rows, loss, seed, steps=8000):
    torch.manual_seed(seed)
    encoder = (torch.randn(WIDTH, 64, dtype=torch.float64) / 8).requires_grad_()
    decoder = encoder.detach().T.clone().requires_grad_()
    optimizer = torch.optim.Adam([encoder, decoder], lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(rows @ encoder.T, decoder, rows).backward()
        optimizer.step()
        schedule.step()
    return encoder.detach(), decoder.detach()


def axis_error(decoder, axes):
    """The mean of 1 - cos^2 between the j-th column and the j-th principal axis."""
    cosines = ((decoder / decoder.norm(dim=0)) * axes[:, :WIDTH]).sum(0)
    return float((1 - cosines.square()).mean())


@pytest.fixture(scope="module")
def second_moments():
    """64 rows with the second moments of all the digits, on which alone the loss depends."""
    pixels = digits()
    values, axes = torch.linalg.eigh(pixels.T @ pixels / len(pixels))
    rows = (axes * values.clamp(min=0).sqrt()) @ axes.T * 8
    return rows, values.flip(0), axes.flip(1)


def test_the_stand_in_has_the_loss_of_the_digits(second_moments):
    rows, *_ = second_moments
    pixels, encoder, decoder = (
        digits(),
        torch.randn(WIDTH, 64).double(),
        torch.randn(64, WIDTH).double(),
    )
    actual, expected = (expected_mse(x @ encoder.T, decoder, x, Uniform()) for x in (rows, pixels))
    assert_close(actual, expected)


def test_a_linear_autoencoder_learns_the_principal_components_in_order(second_moments):
    rows, values, axes = second_moments
    errors = []
    for seed in range(5):
        encoder, decoder = train_linear_autoencoder(
            rows, lambda h, w, y: expected_mse(h, w, y, Uniform()), seed
        )
        errors.append(axis_error(decoder, axes))
        outputs = prefix_linear(rows @ encoder.T, decoder)
        losses = (outputs - rows).square().sum((1, 2)) / len(rows)
        for k in range(1, WIDTH + 1):
            assert losses[k] <= values[k:].sum() * (1 + 1e-6)
    assert sorted(errors)[2] <= 1e-6
    assert max(errors) <= 1e-3


def test_without_the_layer_the_axes_stay_mixed(second_moments):
    rows, _, axes = second_moments
    _, decoder = train_linear_autoencoder(rows, lambda h, w, y: mse_loss(linear(h, w), y), 0)
    assert axis_error(decoder, axes) > 0.3
