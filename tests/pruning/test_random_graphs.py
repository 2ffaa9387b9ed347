"""Random networks around one layer: pruned exactly, or refused in words; never wrongly."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers.oracle import assert_same_outputs, masked
from helpers.zoo.case import floats, with_random_weights
from helpers.zoo.gates import Scale
from helpers.zoo.sequences import Output
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import taildropout as td
from taildropout import PruningError, TailDropout

pytestmark = pytest.mark.slow


class Do(nn.Module):
    """A function as a module; its name says which in a failing example."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.function(*values)

    def extra_repr(self) -> str:
        return self.function.__name__


class Network(nn.Module):
    """Each step applies a module to earlier values. What no step reads is an output."""

    def __init__(self, steps: list[tuple[nn.Module, tuple[int, ...]]]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(module for module, _ in steps)
        self.sources = [sources for _, sources in steps]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = [x]
        for step, sources in zip(self.steps, self.sources, strict=True):
            values.append(step(*(values[source] for source in sources)))
        read = {source for sources in self.sources for source in sources}
        return tuple(value for i, value in enumerate(values) if i not in read)

    def extra_repr(self) -> str:
        return f"sources={self.sources}"


def add(a, b):
    return a + b


def multiply(a, b):
    return a * b


def join(a, b):
    return torch.cat([a, b], dim=feature_dim(a))


def gate(a, b):
    return torch.sigmoid(a) * b


def divide(a, b):
    return a / (1 + b.abs())


def halves(x):
    first, second = x.chunk(2, dim=feature_dim(x))
    return first * second


def gated_half(x):
    return F.glu(x, dim=feature_dim(x))


def flat(x):
    return x.flatten(1)


def average(x):
    return x.mean(dim=(2, 3) if x.ndim == 4 else 1)


def along_features(x):
    return torch.softmax(x, dim=feature_dim(x))


def centred(x):
    return x - x.mean(dim=feature_dim(x), keepdim=True)


def normalised(x):
    return F.normalize(x, dim=feature_dim(x))


def by_their_sum(x):
    return x * torch.sigmoid(x.sum(dim=feature_dim(x), keepdim=True))


def times_last(x):
    return x * torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)


def larger(x):
    return F.interpolate(x, scale_factor=2)


def pooled(x):
    return F.max_pool2d(x, 2, ceil_mode=True)


def as_sequence(x):
    return x.flatten(2).transpose(1, 2)


def feature_dim(x):
    return 1 if x.ndim == 4 else -1


@dataclass(frozen=True)
class Size:
    """What a step may need to know of the value that it reads."""

    shape: tuple[int, ...]

    @property
    def n(self) -> int:
        return self.shape[feature_dim(torch.empty(self.shape, device="meta"))]


# What one value goes through, by its rank: vectors, sequences, images.
SHAPES = {2: (3, 5), 3: (3, 4, 5), 4: (3, 2, 6, 6)}
ANY_RANK: list[Callable[[int], nn.Module]] = [
    lambda n: nn.ReLU(),
    lambda n: nn.Sigmoid(),
    lambda n: nn.GELU(),
    lambda n: nn.ReLU(inplace=True),
    lambda n: Do(along_features),
    lambda n: Do(centred),
    lambda n: Do(normalised),
    lambda n: Do(by_their_sum),
    lambda n: Do(times_last),
    lambda n: nn.Dropout(),
]
ONE_SOURCE: dict[int, list[Callable[[int], nn.Module]]] = {
    2: [
        lambda n: nn.Linear(n, 4),
        lambda n: nn.Linear(n, 6, bias=False),
        lambda n: nn.Linear(n, n),
        lambda n: nn.BatchNorm1d(n),
        lambda n: nn.LayerNorm(n),
        lambda n: nn.PReLU(n),
        lambda n: Scale(n),
    ],
    3: [
        lambda n: nn.Linear(n, 4),
        lambda n: nn.Linear(n, n, bias=False),
        lambda n: nn.LayerNorm(n),
        lambda n: nn.RMSNorm(n),
        lambda n: Scale(n),
        lambda n: Output(nn.GRU(n, 4, batch_first=True)),
        lambda n: Do(flat),
        lambda n: Do(average),
    ],
    4: [
        lambda n: nn.Conv2d(n, 4, 3, padding=1),
        lambda n: nn.Conv2d(n, n, 1, bias=False),
        lambda n: nn.Conv2d(n, n, 3, padding=1, groups=n),
        lambda n: nn.Conv2d(n, 2 * n, 3, padding=1, groups=n),
        lambda n: nn.Conv2d(n, n, 1, groups=2 if n % 2 == 0 else 1),
        lambda n: nn.ConvTranspose2d(n, 4, 2),
        lambda n: nn.BatchNorm2d(n),
        lambda n: nn.GroupNorm(2 if n % 2 == 0 else 1, n),
        lambda n: nn.InstanceNorm2d(n, affine=True),
        lambda n: nn.PReLU(n),
        lambda n: Do(larger),
        lambda n: Do(pooled),
        lambda n: Do(flat),
        lambda n: Do(average),
        lambda n: Do(as_sequence),
    ],
}
HALVING = [lambda n: Do(halves), lambda n: Do(gated_half)]
TWO_SOURCES = [add, multiply, gate, join, divide]


PRODUCERS: dict[int, list[Callable[[int], nn.Module]]] = {
    2: [lambda n: nn.Linear(n, 6), lambda n: nn.Linear(n, 4, bias=False)],
    3: [
        lambda n: nn.Linear(n, 6),
        lambda n: Output(nn.LSTM(n, 6, batch_first=True)),
        lambda n: Output(nn.GRU(n, 2, batch_first=True, bidirectional=True)),
    ],
    4: [
        lambda n: nn.Conv2d(n, 6, 3, bias=False),
        lambda n: nn.Conv2d(n, 6, 3, padding=1, groups=2),
        lambda n: nn.ConvTranspose2d(n, 4, 2, stride=2),
    ],
}
CONSUMERS: dict[int, list[Callable[[int], nn.Module]]] = {
    2: [lambda n: nn.Linear(n, 2), lambda n: nn.Linear(n, 2, bias=False)],
    3: [lambda n: nn.Linear(n, 2), lambda n: Output(nn.RNN(n, 2, batch_first=True))],
    4: [
        lambda n: nn.Conv2d(n, 2, 3, padding=1),
        lambda n: nn.Conv2d(n, 2, 2, bias=False),
        lambda n: nn.ConvTranspose2d(n, 2, 2),
    ],
}


@st.composite
def networks(draw):
    """A network and a k: from a producer to the layer, and on to a consumer, by many ways."""
    rank = draw(st.sampled_from([2, 3, 4]))
    sizes = [Size(SHAPES[rank])]
    steps: list[tuple[nn.Module, tuple[int, ...]]] = []

    def append(module, *sources):
        values = [torch.ones(sizes[source].shape) for source in sources]
        with torch.no_grad():
            output = module.eval()(*values)
        steps.append((module, sources))
        sizes.append(Size(tuple(output.shape)))

    def append_one_of(choice, at=-1):
        at %= len(sizes)
        append(draw(st.sampled_from(choice[len(sizes[at].shape)]))(sizes[at].n), at)

    def append_any():
        last = len(sizes) - 1
        source = draw(st.sampled_from([last, last, *range(1, len(sizes))]))
        size = sizes[source]
        others = [i for i, other in enumerate(sizes) if other.shape == size.shape and i != source]
        kinds = ["simple", "one source"]
        kinds += ["halving"] if size.n % 2 == 0 else []
        kinds += ["two sources"] if others else []
        kind = draw(st.sampled_from(kinds))
        if kind == "two sources":
            pair = draw(st.permutations([source, draw(st.sampled_from(others))]))
            append(Do(draw(st.sampled_from(TWO_SOURCES))), *pair)
        elif kind == "one source":
            append_one_of(ONE_SOURCE, source)
        else:
            choice = ANY_RANK if kind == "simple" else HALVING
            append(draw(st.sampled_from(choice))(size.n), source)

    append_one_of(PRODUCERS)
    for _ in range(draw(st.integers(0, 3))):
        append_any()
    at = draw(st.sampled_from([len(sizes) - 1, *range(1, len(sizes))]))
    n = sizes[at].n
    append(TailDropout(batch_dim=0, dropout_dim=1 if len(sizes[at].shape) == 4 else -1), at)
    for _ in range(draw(st.integers(0, 3))):
        append_any()
    append_one_of(CONSUMERS)
    k = draw(st.sampled_from([*range(1, n), n]))
    return Network(steps), k, SHAPES[rank][1:]


# Every refusal that is allowed, in its own words. There is no other.
REFUSALS: list[str] = []


def assert_pruned_or_refused(model, k, shape):
    """The small network, or None if it is refused in words that are allowed."""
    with_random_weights(model).double()
    (layer,) = td.tail_dropouts(model)
    try:
        small = td.prune(model, k, floats(3, *shape))
    except PruningError as error:
        message = str(error)
    else:
        assert_same_outputs(small, model, {layer: k}, floats(2, *shape))
        assert_same_outputs(small, model, {layer: k}, floats(5, *shape))
        return small
    allowed = [words for words in REFUSALS if words in message]
    assert allowed, message
    assert repr(layer) in message
    return None


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(networks())
def test_random_networks(drawn):
    model, k, shape = drawn
    assert_pruned_or_refused(model, k, shape)


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(networks(), st.data())
def test_a_consumer_at_the_layer_loses_columns_in_any_network(drawn, data):
    """Whatever else there is, a Linear or Conv that alone reads the layer reads k features."""
    model, _, shape = drawn
    (at,) = (i for i, step in enumerate(model.steps) if isinstance(step, TailDropout))
    layer = model.steps[at]
    widths = []
    hook = layer.register_forward_hook(
        lambda layer, inputs, output: widths.append(output.shape[layer.dropout_dim])
    )
    with torch.no_grad():
        model.double().eval()(floats(3, *shape))
    hook.remove()
    (n,) = widths
    consumer = nn.Conv2d(n, 3, 1) if layer.dropout_dim == 1 else nn.Linear(n, 3)
    k = data.draw(st.integers(1, n))
    for i, sources in enumerate(model.sources):  # nothing else reads it
        if i > at:
            past = model.sources[at][0]
            model.sources[i] = tuple(past if s == at + 1 else s for s in sources)
    model.steps.append(consumer)
    model.sources.append((at + 1,))
    small = assert_pruned_or_refused(model, k, shape)
    assert small is not None
    assert small.steps[-1].weight.shape[:2] == (3, k)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(networks())
def test_outputs_lose_zeros_and_nothing_else(drawn):
    """Without its last step, the features of the layer often are outputs."""
    model, k, shape = drawn
    del model.steps[-1], model.sources[-1]
    with_random_weights(model).double()
    (layer,) = td.tail_dropouts(model)
    try:
        plan = td.plan_pruning(model, k, floats(3, *shape), outputs=True)
        small = plan.apply(model).eval()
    except PruningError as error:
        assert str(error).startswith("outputs=True cuts the features")  # noqa: PT017
        return
    inputs = floats(5, *shape)
    whole = list(masked(model, {layer: k}, inputs))
    for cut in plan.output_cuts:
        keep, value = torch.tensor(cut.keep), whole[cut.position]
        assert value.shape[cut.dim] == cut.size
        assert value.count_nonzero() == value.index_select(cut.dim, keep).count_nonzero()
        whole[cut.position] = value.index_select(cut.dim, keep)
    assert_close(small(inputs), tuple(whole), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rank", SHAPES)
def test_networks_of_every_kind_are_drawn(rank):
    """The strategy can't quietly stop drawing what it is made for."""
    seen = set()

    @settings(max_examples=600, suppress_health_check=list(HealthCheck))
    @given(networks())
    def collect(drawn):
        model, _, shape = drawn
        for step in [*model.steps] if len(shape) == rank - 1 else []:
            seen.add(step.function.__name__ if isinstance(step, Do) else type(step).__name__)

    collect()
    made = {type(make(4)).__name__ for make in ONE_SOURCE[rank]} - {"Do"}
    assert seen >= made | {"TailDropout", "add", "multiply", "gate", "join", "divide"}
