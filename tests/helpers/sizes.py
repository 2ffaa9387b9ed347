"""The promise at every size: pruned on one example, equal at all others."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from helpers.oracle import as_trained, masked
from torch import fx, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten, tree_map

import taildropout as td
from taildropout import PruningError, TailDropout
from taildropout.graph.exports import LAYER
from taildropout.pruning.cuts import Reading
from taildropout.pruning.predicted import cut_unread

K = 5
LENGTHS = [1, 2, 3, 6, 7, 8, 9, 11, 12]
RESOLUTIONS = [1, 2, 3, 4, 5, 6, 11]


def converted(inputs):
    """Floats in float64."""
    return tree_map(lambda v: v.double() if is_float(v) else v, inputs)


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def prune_or_refuse(model, example, k=K):
    """The plan and the small network, or None for both where they are refused."""
    as_trained(model).double()
    try:
        plan = td.plan_pruning(model, k, converted(example))
        return plan, plan.apply(model)
    except PruningError:
        return None, None


def runs(model, inputs):
    try:
        model(*copy.deepcopy(inputs))
    except Exception:
        return False
    return True


@torch.no_grad()
def assert_equal_at(model, small, others, k=K):
    """At the inputs that the large model takes; how many these were."""
    ks = k if isinstance(k, dict) else dict.fromkeys(td.tail_dropouts(model), k)
    large, small = copy.deepcopy(model).eval(), copy.deepcopy(small).eval()
    taken = [inputs for inputs in map(converted, others) if runs(large, inputs)]
    for inputs in taken:
        expected = masked(large, ks, *copy.deepcopy(inputs))
        assert_equal(small(*copy.deepcopy(inputs)), expected)
    return len(taken)


def assert_equal(actual, expected):
    """In the structure and in numbers and words exactly, in tensors to the rounding of float64."""
    (ones, form), (others, other_form) = tree_flatten(actual), tree_flatten(expected)
    assert form == other_form
    for one, other in zip(ones, others, strict=True):
        if isinstance(other, torch.Tensor):
            assert_close(one, other, rtol=1e-9, atol=1e-10)
        else:
            assert one == other


def assert_exact(model, example, others, k=K):
    """Equal wherever the large model runs, or refused. The small network, None if refused."""
    plan, small = prune_or_refuse(model, example, k)
    if small is not None:
        assert assert_equal_at(model, small, [example, *others], k) > 0
        assert_known(plan.reading, plan.k, [example, *others][::4])
    return small


def assert_exact_unread(model, example, others, k=K):
    """As it is cut by what the operations say, before the small network is looked at."""
    as_trained(model).double()
    ks = k if isinstance(k, dict) else dict.fromkeys(td.tail_dropouts(model), k)
    reading = Reading(model, converted(example))
    found, small = cut_unread(model, ks, reading)
    assert assert_equal_at(model, small, [example, *others], ks) > 0
    assert_known(reading, ks, [example, *others])
    return found


@torch.no_grad()
def assert_known(reading, ks, inputs):
    """What is said to be constant is so, in every value that the model computes."""
    known = reading.find(ks).solution.constants.known
    model = copy.deepcopy(reading.model).eval()
    inputs = [given for given in converted(inputs) if runs(model, given)]
    for export in reading.flow.paths.exports:
        for given in filter(export.covers, inputs):
            values = values_of(export, given, ks)
            for (node, dim), expected in known.items():
                if node in values:
                    value = values[node].double().movedim(dim, 0)
                    rows = value.reshape(len(value), -1)[expected.mask]
                    constant = expected.value[expected.mask][:, None].expand_as(rows)
                    assert_close(rows, constant, rtol=1e-9, atol=1e-10, msg=f"{node} along {dim}")


def values_of(export, inputs, ks):
    """All values of an exported model, its layers set to `ks`."""
    values = {}

    class Masked(fx.Interpreter):
        def run_node(self, node):
            values[node] = super().run_node(node)
            return values[node]

        def call_function(self, target, args, kwargs):
            if target is not LAYER:
                return super().call_function(target, args, kwargs)
            h, name, dim, n = args
            stays = torch.arange(n) < ks.get(name, n)
            return h * stays.view(-1, *[1] * (h.ndim - 1 - dim))

    program, remaining = export.program, iter(tree_flatten(inputs)[0])
    tensors = {**program.state_dict, **program.constants}
    specs = program.graph_signature.input_specs
    given = [tensors[s.target] if s.target in tensors else next(remaining) for s in specs]
    Masked(program.graph_module).run(*given)
    return values


class M(nn.Module):
    """Linear(3, 12), the layer, Linear(12, 2), and a forward that is a function of all this."""

    def __init__(self, forward: Callable) -> None:
        super().__init__()
        self.function = forward
        self.a, self.t, self.b = nn.Linear(3, 12), TailDropout(), nn.Linear(12, 2)
        self.p = nn.Parameter(torch.randn(16, 12))
        self.e = nn.Embedding(16, 12)
        self.gru = nn.GRU(12, 2, batch_first=True)
        self.first = nn.Linear(2, 4)
        self.register_buffer("order", torch.randperm(12))
        self.register_buffer("times", torch.rand(16, 1))

    def h(self, x: torch.Tensor) -> torch.Tensor:
        return self.t(self.a(x))

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def sequences(batches=(1, 2, 3, 4, 5, 11), lengths=LENGTHS):
    """Other lengths, other batches, and both."""
    shapes = [(2, t, 3) for t in lengths] + [(b, 7, 3) for b in batches] + [(11, 12, 3), (1, 1, 3)]
    return [(torch.randn(shape),) for shape in shapes] + [(torch.zeros(2, 5, 3),)]


def vectors():
    return [(torch.randn(b, 3),) for b in (1, 2, 3, 4, 5, 7, 8, 11, 40)]


class Do(nn.Module):
    """A function, and then a module."""

    def __init__(self, function: Callable, module: nn.Module) -> None:
        super().__init__()
        self.function, self.module = function, module

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.module(self.function(h))


def images(d=2):
    shapes = [(2, 3, *size) for size in itertools.product(RESOLUTIONS, repeat=d)]
    return [(torch.randn(shape),) for shape in [*shapes, *((b, 3, *[5] * d) for b in (1, 3))]]


def of(table):
    return pytest.mark.parametrize("forward", table.values(), ids=table)
