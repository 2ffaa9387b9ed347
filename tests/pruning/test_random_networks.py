"""Of random networks: what is lost at the layer, whatever else there is.

That what is left computes the same is tested in tests/benchmarks/test_attack.py.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers.oracle import assert_same_outputs, masked
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import taildropout as td
from benchmarks.random_networks import Network, Statement, draw_network
from taildropout import PruningError

pytestmark = pytest.mark.slow

# What reads n features, by the roles of the dims around them.
READERS = {
    "BF": "nn.Linear({n}, 3)",
    "BTF": "nn.Linear({n}, 3)",
    "BFT": "nn.Conv1d({n}, 3, 1)",
    "BFHW": "nn.Conv2d({n}, 3, 1)",
}


def networks(seeds: range) -> Iterator[tuple[Network, Statement]]:
    """Those with one layer, and along features; with its call."""
    for network in map(draw_network, seeds):
        calls = [s for s in network.statements if s.template.startswith("@TailDropout")]
        layers = td.tail_dropouts(network.build()).values()
        if [call.roles in READERS for call in calls] == [True]:
            (layer,), (call,) = layers, calls
            if range(len(call.roles))[layer.dropout_dim] == call.roles.index("F"):
                yield network, call


def read_alone(network: Network, call: Statement) -> Network:
    """The network and one more module: that reads the layer, and what has read it reads past it."""
    (n,) = network.widths().values()
    (source,) = call.reads
    past = tuple(
        replace(s, reads=tuple(source if name == call.target else name for name in s.reads))
        for s in network.statements
    )
    reader = Statement("read", "self.reader({0})", (call.target,), call.roles, "")
    made = {**network.made, "reader": READERS[call.roles].format(n=n)}
    return replace(network, statements=(*past, reader), made=made)


def test_a_consumer_at_the_layer_loses_columns_in_any_network():
    """Whatever else there is, a Linear or Conv that alone reads the layer reads k features."""
    for network, call in networks(range(1000, 1030)):
        alone = read_alone(network, call)
        model, (k,) = alone.build(), alone.k.values()
        small = td.prune(model, alone.k, alone.example())
        assert small.reader.weight.shape[:2] == (
            3,
            max(k, 1) if "Conv" in repr(small.reader) else k,
        )
        assert_same_outputs(small, model, alone.k, *alone.example(1))


def ends_with_the_features(network: Network) -> Network | None:
    """Without its last steps, the features of the layer often are outputs."""
    last = network.outputs
    rest = tuple(s for s in network.statements if s.target not in last)
    shorter = replace(network, statements=rest)
    return shorter if td.tail_dropouts(shorter.build()) else None


def test_outputs_lose_zeros_and_nothing_else():
    cut = 0
    for network, _ in networks(range(1100, 1145)):
        shorter = ends_with_the_features(network)
        if shorter is None:
            continue
        model = shorter.build()
        try:
            plan = td.plan_pruning(model, shorter.k, shorter.example(), outputs=True)
        except PruningError as error:
            assert str(error).startswith("outputs=True cuts the features"), shorter.describe()  # noqa: PT017
            continue
        small = plan.apply(model).eval()
        inputs = shorter.example(1)
        whole = tree_leaves(masked(model, shorter.k, *inputs))
        for found in plan.output_cuts:
            keep, value = torch.tensor(found.keep), whole[found.position]
            assert value.shape[found.dim] == found.size
            assert value.count_nonzero() == value.index_select(found.dim, keep).count_nonzero()
            whole[found.position] = value.index_select(found.dim, keep)
        assert_close(tree_leaves(small(*inputs)), whole, rtol=1e-9, atol=1e-10)
        cut += len(plan.output_cuts) > 0
    assert cut >= 10
