"""Root mean square norms over a zero tail, recognised by what they compute."""

import re

import pytest
import torch
from helpers.oracle import as_trained, assert_computes, assert_same, masked, snapshot
from torch import nn
from torch.testing import assert_close

import taildropout as td
from taildropout import TailDropout

N, K = 8, 3
SHAPES = [(2, 4, 5), (1, 1, 5), (7, 9, 5)]


class Norm(nn.Module):
    """A norm that a user has written, as a function of the module and the input."""

    def __init__(self, function, eps=0.3, **attributes):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(N))
        self.eps = eps
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.function(self, x)


class Net(nn.Module):
    """A producer, the layer, a norm, and what reads it."""

    def __init__(self, *norms, between=None):
        super().__init__()
        self.producer = nn.Linear(5, N)
        self.tail = TailDropout()
        self.norms = nn.ModuleList(norms)
        self.consumer = nn.Linear(N, 3)
        self.between = between

    def forward(self, x):
        h = self.tail(self.producer(x))
        if self.between is not None:
            return self.between(self, h)
        for norm in self.norms:
            h = norm(h)
        return self.consumer(h)


def mean_of_squares(x):
    return x.pow(2).mean(-1, keepdim=True)


def llama(m, x):
    dtype = x.dtype
    x = x.double()
    return m.weight * (x * torch.rsqrt(mean_of_squares(x) + m.eps)).to(dtype)


def gemma(m, x):
    return x * torch.rsqrt(mean_of_squares(x) + m.eps) * (1.0 + m.weight)


def by_product(m, x):
    return x * (x * x).mean(-1, keepdim=True).add(m.eps).rsqrt() * m.weight


def divided(m, x):
    return m.weight * (x / torch.sqrt(m.eps + torch.square(x).mean(-1, True)))


def one_over_the_root(m, x):
    return m.weight * (1 / torch.sqrt(mean_of_squares(x) + m.eps) * x)


def by_power(m, x):
    return m.weight * x * torch.pow(mean_of_squares(x) + m.eps, -0.5)


def weighted_first(m, x):
    return (x * m.weight) * torch.rsqrt(mean_of_squares(x) + m.eps)


def weighted_root(m, x):
    return x * (m.weight * torch.rsqrt(mean_of_squares(x) + m.eps))


def weighted_in_another_shape(m, x):
    return (x * torch.rsqrt(mean_of_squares(x) + m.eps)) * m.weight[None, None]


def with_half_the_weight(m, x):
    return x * torch.rsqrt(mean_of_squares(x) + m.eps) * (m.weight + 0.5)


def without_eps(m, x):
    return m.weight * x * mean_of_squares(x).rsqrt()


def with_a_bias(m, x):
    return m.weight * x * torch.rsqrt(mean_of_squares(x) + m.eps) + m.weight[:1].sum()


def by_function(m, x):
    return nn.functional.rms_norm(x, x.shape[-1:], m.weight, m.eps)


EXACT = {
    "nn.RMSNorm": lambda: nn.RMSNorm(N),
    "nn.RMSNorm with eps": lambda: nn.RMSNorm(N, eps=0.3),
    "without weight": lambda: nn.RMSNorm(N, eps=0.3, elementwise_affine=False),
    **{
        function.__name__: lambda function=function: Norm(function)
        for function in (
            *(llama, gemma, by_product, divided, one_over_the_root, by_power, weighted_first),
            *(weighted_root, weighted_in_another_shape, with_half_the_weight, without_eps),
            by_function,
        )
    },
}


def prepared(model):
    return as_trained(model).double()


def plan_of(model, k=K, shape=SHAPES[0]):
    return td.plan_pruning(model, k, torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("k", [1, K, N - 1, N])
@pytest.mark.parametrize("name", EXACT)
def test_the_norm_over_what_is_left_is_the_norm_over_all(name, k):
    model = prepared(Net(EXACT[name]()))
    plan = plan_of(model, k)
    small = plan.apply(model)
    assert plan.stays == []
    assert small.consumer.weight.shape == (3, k)
    for weight in small.norms.parameters():
        assert weight.shape == (k,)
    assert_computes(small, model, {"tail": k}, *SHAPES)


@pytest.mark.parametrize("name", EXACT)
def test_an_example_of_one_position(name):
    model = prepared(Net(EXACT[name]()))
    small = plan_of(model, shape=(1, 1, 5)).apply(model)
    assert small.consumer.weight.shape == (3, K)
    assert_computes(small, model, {"tail": K}, *SHAPES)


def test_one_feature_is_kept_where_all_are_zero():
    model = prepared(Net(nn.RMSNorm(N, eps=0.3)))
    small = plan_of(model, 0).apply(model)
    assert small.consumer.weight.shape == (3, 1)
    assert_computes(small, model, {"tail": 0}, *SHAPES)


def test_weight_and_eps_are_those_of_the_formula():
    model = prepared(Net(nn.RMSNorm(N, eps=0.3), Norm(gemma)))
    plain, one_more = plan_of(model).apply(model).norms
    large, large_more = model.norms
    grown = (N / K) ** 0.5
    assert_close(plain.weight, large.weight[:K] * grown)
    assert_close(one_more.weight, (1 + large_more.weight[:K]) * grown - 1)
    assert plain.eps == one_more.eps == pytest.approx(0.3 * N / K)
    assert repr(plain) == repr(nn.RMSNorm(K, eps=plain.eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eps_that_was_left_to_torch_is_written_out(dtype):
    model = Net(nn.RMSNorm(N)).to(dtype)
    small = td.prune(model, K, torch.randn(2, 5).to(dtype))
    assert small.norms[0].eps == pytest.approx(torch.finfo(dtype).eps * N / K)


def test_the_smaller_network_takes_a_smaller_k_still():
    model = prepared(Net(nn.RMSNorm(N, eps=0.3), Norm(llama)))
    small = plan_of(model, 5).apply(model)
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    assert_close(masked(small, {"tail": 2}, x), masked(model, {"tail": 2}, x))
    again = td.prune(small, 2, x)
    assert again.consumer.weight.shape == (3, 2)
    assert_close(again.eval()(x), masked(model, {"tail": 2}, x))


def test_weights_become_trainable_parameters_as_they_were():
    model = prepared(Net(nn.RMSNorm(N), nn.RMSNorm(N)))
    model.norms[1].weight.requires_grad_(False)
    small = plan_of(model).apply(model)
    assert [p.requires_grad for p in small.norms.parameters()] == [True, False]


def test_over_another_dim():
    class OverChannels(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.randn(1, N, 1, 1))
            self.little = 0.2

        def forward(self, x):
            return x * (x.square().mean(1, keepdim=True) + self.little).rsqrt() * self.gain

    model = nn.Sequential(
        nn.Conv2d(2, N, 3), TailDropout(dropout_dim=1), OverChannels(), nn.Conv2d(N, 3, 2)
    ).double()
    small = td.prune(model, K, torch.randn(1, 2, 6, 6, dtype=torch.float64))
    assert small[3].weight.shape == (3, K, 2, 2)
    assert small[2].gain.shape == (1, K, 1, 1)
    assert_computes(small, model, {"1": K}, (3, 2, 5, 9), (1, 2, 8, 4))


# ----------------------------------------------------------------------------------- what is shared


def twice(m, h):
    (norm,) = m.norms
    return m.consumer(norm(torch.tanh(norm(h))))


def test_one_norm_called_twice():
    model = prepared(Net(nn.RMSNorm(N, eps=0.3), between=twice))
    small = plan_of(model).apply(model)
    assert small.consumer.weight.shape == (3, K)
    assert small.norms[0].eps == pytest.approx(0.3 * N / K)
    assert_computes(small, model, {"tail": K}, *SHAPES)


def test_two_norms_of_one_weight():
    model = prepared(Net(nn.RMSNorm(N, eps=0.3), Norm(llama, eps=0.1)))
    model.norms[1].weight = model.norms[0].weight
    small = plan_of(model).apply(model)
    assert small.norms[0].weight is small.norms[1].weight
    assert small.norms[0].weight.shape == (K,)
    assert_computes(small, model, {"tail": K}, *SHAPES)


def over_other_features(m, h):
    (norm,) = m.norms
    return m.consumer(norm(h)) + m.reader(norm(m.other(h)))


def test_one_norm_over_other_features_too():
    """There its features are no zeros, and all of them stay."""
    model = Net(nn.RMSNorm(N, eps=0.3), between=over_other_features)
    model.other, model.reader = nn.Linear(N, N), nn.Linear(N, 3)
    kept(prepared(model), ".* reads them too, where they are not constant")


# ---------------------------------------------------------------------------------- what is refused


def kept(model, *words):
    """The norm stays as it is, what the plan says of it, and the result is the same."""
    plan = plan_of(model)
    small = plan.apply(model)
    assert plan.rescales == []
    assert small.producer.weight.shape == (K, 5)
    said = [f"{stay.name} {stay.reason}" for stay in plan.stays]
    assert len(said) == len(words), said
    for line, expected in zip(said, words, strict=True):
        assert re.fullmatch(expected, line), line
    assert_computes(small, model, {"tail": K}, *SHAPES)


NO_ATTRIBUTE = (
    "mean in module 'norms.0' adds an eps that no attribute of its module holds for it alone"
)
NO_WEIGHT = (
    "mean in module 'norms.0' has no weight of its own that could make up for fewer features"
)


def written_in_the_code(m, x):
    return m.weight * x * torch.rsqrt(mean_of_squares(x) + 0.3)


def used_twice(m, x):
    return m.weight * x * torch.rsqrt(mean_of_squares(x) + m.eps) * torch.full((1,), m.eps)


def computed_with(m, x):
    return m.weight * x * torch.rsqrt(mean_of_squares(x) + m.eps) * (1 + m.eps)


def in_an_object(m, x):
    return m.weight * x * torch.rsqrt(mean_of_squares(x) + m.config["eps"])


def weight_used_twice(m, x):
    return m.weight * (x * torch.rsqrt(mean_of_squares(x) + m.eps)) + m.weight


def not_in_proportion(m, x):
    return m.weight * torch.tanh(x * torch.rsqrt(mean_of_squares(x) + m.eps))


def squared(m, x):
    x = x * torch.rsqrt(mean_of_squares(x) + m.eps)
    return m.weight * (x * x)


def squared_in_two_steps(m, x):
    x = x * torch.rsqrt(mean_of_squares(x) + m.eps)
    return m.weight * (x * (2 * x))


def residual(m, x):
    return x + x * torch.rsqrt(mean_of_squares(x) + m.eps)


def over_the_inverse(m, x):
    return m.weight * (x / torch.rsqrt(mean_of_squares(x) + m.eps))


def times_the_root(m, x):
    return m.weight * (x * (torch.sqrt(mean_of_squares(x) + m.eps) / 2.0))


def rounded(m, x):
    return m.weight * (4 * x * torch.rsqrt(mean_of_squares(x) + m.eps)).long()


def mean_used_twice(m, x):
    mean = mean_of_squares(x)
    return m.weight * (x * torch.rsqrt(mean + m.eps)) * mean


def mean_of_magnitudes(m, x):
    return m.weight * (x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + m.eps))


def twice_one_more(m, x):
    return x * torch.rsqrt(mean_of_squares(x) + m.eps) * torch.add(m.weight, 1.0, alpha=2.0)


def two_more(m, x):
    return x * torch.rsqrt(mean_of_squares(x) + m.eps) * (m.weight + 1.0 + 0.5)


def by_the_exponential(m, x):
    return x * torch.rsqrt(mean_of_squares(x) + m.eps) * m.weight.exp()


def over_the_weighted_root(m, x):
    return x / (m.weight * torch.sqrt(mean_of_squares(x) + m.eps))


def two_eps(m, x):
    return m.weight * x * torch.rsqrt(mean_of_squares(x) + 0.2 + m.eps)


def by_the_mean(m, x):
    return m.weight * x * torch.pow(mean_of_squares(x) + m.eps, -1.0)


def one_more_twice(m, x):
    more = 1.0 + m.weight
    return x * torch.rsqrt(mean_of_squares(x) + m.eps) * more + more


def over_itself(m, x):
    root = torch.rsqrt(mean_of_squares(x) + m.eps)
    return m.weight * (x * (root / root))


def by_function_of_one_more(m, x):
    return nn.functional.rms_norm(x, x.shape[-1:], 1.0 + m.weight, m.eps)


AT_ONCE = "mean in module 'norms.0' needs all features at once, or is not supported"
REFUSED = {
    "over the inverse": (over_the_inverse, NO_WEIGHT),
    "times the root": (times_the_root, NO_WEIGHT),
    "rounded": (rounded, NO_WEIGHT),
    "its mean used elsewhere too": (mean_used_twice, AT_ONCE),
    "a mean of magnitudes": (mean_of_magnitudes, AT_ONCE),
    "eps written in the code": (written_in_the_code, NO_ATTRIBUTE),
    "eps in an object": (in_an_object, NO_ATTRIBUTE),
    "eps used elsewhere too": (used_twice, NO_ATTRIBUTE),
    "a number computed from eps": (computed_with, NO_ATTRIBUTE),
    "its weight used elsewhere too": (
        weight_used_twice,
        "mean in module 'norms.0' has the weight 'norms.0.weight', which is used elsewhere too",
    ),
    "a function before the weight": (not_in_proportion, NO_WEIGHT),
    "a square": (squared, NO_WEIGHT),
    "a square in two steps": (squared_in_two_steps, NO_WEIGHT),
    "a sum": (residual, NO_WEIGHT),
    "two numbers added to the mean": (two_eps, AT_ONCE),
    "another power": (by_the_mean, AT_ONCE),
    "one more than the weight used elsewhere too": (one_more_twice, NO_WEIGHT),
    "a weight of the root that divides": (over_the_weighted_root, NO_WEIGHT),
    "its root over itself": (over_itself, NO_WEIGHT),
    "a weight that is computed": (
        by_function_of_one_more,
        "rms_norm in module 'norms.0' has no parameter as its weight",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_norms_that_stay(name):
    function, words = REFUSED[name]
    kept(prepared(Net(Norm(function, config={"eps": 0.3}))), words)


def test_the_attribute_of_eps_is_found_by_its_effect():
    """Others may hold the same number."""
    model = prepared(Net(Norm(llama, another=0.3, momentum=0.3)))
    small = plan_of(model).apply(model)
    (norm,) = small.norms
    assert (norm.another, norm.momentum) == (0.3, 0.3)
    assert norm.eps == pytest.approx(0.3 * N / K)
    assert_computes(small, model, {"tail": K}, *SHAPES)


def test_a_norm_of_features_that_are_not_zero():
    model = Net(Norm(llama), between=lambda m, h: m.consumer(m.norms[0](h + 1)))
    kept(prepared(model), "mean in module 'norms.0' can't take in the constants that it reads .*")


def test_norms_of_one_eps_over_other_features():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = 0.3
            self.one, self.two = nn.Parameter(torch.randn(N)), nn.Parameter(torch.randn(5))
            self.other = nn.Linear(5, N)

        def forward(self, h, x):
            h = self.one * h * torch.rsqrt(mean_of_squares(h) + self.eps)
            return h * self.other(self.two * x * torch.rsqrt(mean_of_squares(x) + self.eps))

    class Whole(Net):
        def forward(self, x):
            return self.consumer(self.norms[0](self.tail(self.producer(x)), x))

    words = "mean in module 'norms.0' shares its eps with norms of other features"
    kept(prepared(Whole(Both())), words)


def test_norms_of_one_weight_over_other_features():
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.eps, self.scale = 0.3, scale

        def forward(self, x):
            return self.scale * (x * torch.rsqrt(mean_of_squares(x) + self.eps))

    class Whole(Net):
        def forward(self, x):
            first, second = self.norms
            return self.consumer(first(self.tail(self.producer(second(x)))))

    scale = nn.Parameter(torch.tensor(1.5))
    model = prepared(Whole(Scaled(scale), Scaled(scale)))
    kept(
        model, "mean in module 'norms.0' shares 'norms.0.scale' = 'norms.1.scale' with norms of .*"
    )


def test_a_root_that_is_returned_too():
    def both(m, h):
        root = torch.rsqrt(mean_of_squares(h) + m.norms[0].eps)
        return m.consumer(m.norms[0].weight * (h * root)), root

    model = prepared(Net(Norm(llama), between=both))
    words = "mean in the model's own forward has no weight of its own that could make up for .*"
    kept(model, words)


def test_a_mean_that_is_returned_too():
    def both(m, h):
        mean = mean_of_squares(h)
        return m.consumer(m.norms[0].weight * (h * torch.rsqrt(mean + m.norms[0].eps))), mean

    kept(prepared(Net(Norm(llama), between=both)), "mean in the model's own forward needs all .*")


@pytest.mark.parametrize("function", [twice_one_more, two_more, by_the_exponential])
def test_a_weight_that_is_no_parameter_and_a_number(function):
    """What reads the norm takes in the factor."""
    model = prepared(Net(Norm(function)))
    plan = plan_of(model)
    assert [rescale.weights for rescale in plan.rescales] == [("consumer.weight",)]
    assert_computes(plan.apply(model), model, {"tail": K}, *SHAPES)


def test_layer_norm_stays_with_its_reason():
    words = (
        "layer_norm in module 'norms.0' subtracts the mean over all n features, zeros among them"
    )
    kept(prepared(Net(nn.LayerNorm(N))), words)


def test_planning_leaves_the_random_state_and_the_model_alone():
    model = prepared(Net(nn.RMSNorm(N, eps=0.3)))
    x = torch.randn(2, 5, dtype=torch.float64)
    before = snapshot(model)
    td.plan_pruning(model, K, x)
    assert_same(snapshot(model), before)
