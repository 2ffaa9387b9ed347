"""Tensor parallelism: four processes, against the layer on the whole tensor in one.

The functions that take a rank's view run in each of the processes. All have other random seeds.
"""

import copy
import io
import sys
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
from helpers.processes import Processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import taildropout as td
from taildropout import TailDropout, TailLinear, TailMLP
from taildropout.functional import keep_prefix, tail_dropout

pytestmark = pytest.mark.slow

WORLD = 4
exactly = {"rtol": 0, "atol": 0, "equal_nan": True}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    group = Processes(WORLD, tmp_path_factory.mktemp("group") / "meeting-point")
    yield group
    group.close()


@lru_cache
def mesh(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "features")[-len(shape) :])


def same(*shape):
    """The same numbers in each process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def seed(rank):
    torch.manual_seed(100 + rank)


def alone(layer):
    layer = copy.deepcopy(layer)
    layer.device_mesh = None
    return layer


# --- DTensors ------------------------------------------------------------------------------------

S0, S1, S2, R = Shard(0), Shard(1), Shard(2), Replicate()
PLACEMENTS = {(4,): [[S1], [S0], [R]], (2, 2): [[S0, S1], [S1, S0], [R, S1], [S1, S1], [S0, S0]]}


def check_call(layer, whole, *, mesh, placements):
    """Output, gradient, ks and placements of one call, against the layer on the whole tensor."""
    input = distribute_tensor(whole, mesh, placements).requires_grad_()
    seed(dist.get_rank())
    output = layer(input)

    expected_input, reference = whole.clone().requires_grad_(), alone(layer)
    seed(0)
    expected = reference(expected_input)
    assert (output is input) == (expected is expected_input)
    assert output.placements == input.placements
    assert output.stride() == expected.stride()
    assert_close(output.full_tensor(), expected, **exactly)
    if output is input:
        return
    (gradient,) = torch.autograd.grad(output, input, distribute_tensor(whole, mesh, placements))
    (expected_gradient,) = torch.autograd.grad(expected, expected_input, whole)
    assert_close(gradient.full_tensor(), expected_gradient, **exactly)
    if layer.training and layer._in_force is None:
        assert_close(layer.drawn_k, reference.drawn_k, **exactly)


def check_every_k(n):
    for shape, all_placements in PLACEMENTS.items():
        for placements in all_placements:
            where = {"mesh": mesh(*shape), "placements": placements}
            for k in [*range(n + 1), torch.arange(5) * n // 4, torch.tensor(n // 2)]:
                layer = TailDropout().train(isinstance(k, int) and k % 2 == 0)
                layer.set_k(k)
                check_call(layer, same(5, n), **where)
            check_call(TailDropout().eval(), same(5, n), **where)


@pytest.mark.parametrize("n", [8, 5, 3])
def test_k_counts_the_features_of_all_shards(processes, n):
    processes.run(check_every_k, n)


def check_draws():
    for shape, all_placements in PLACEMENTS.items():
        for placements in all_placements:
            for layer in (
                TailDropout(),
                TailDropout(0.3, stratified=False),
                TailDropout(batch_dim=()),
                TailDropout(multiple_of=3),
                TailDropout(batch_dim=1, dropout_dim=0),
            ):
                check_call(layer, same(6, 9), mesh=mesh(*shape), placements=placements)
    for placements in [S1, S2], [S0, S1], [S2, S1]:  # the samples of a sequence, sharded
        check_call(
            TailDropout(batch_dim=(1, 0)), same(3, 5, 7), mesh=mesh(2, 2), placements=placements
        )
    with TailDropout(multiple_of=2).using_width(0.4) as layer:
        check_call(layer, same(5, 8), mesh=mesh(4), placements=[S1])


def test_ks_are_those_of_the_first_process_whatever_is_sharded(processes):
    processes.run(check_draws)


def check_other_things():
    where = mesh(4), [S1]
    whole = same(5, 9)
    whole[:, 6:] = torch.nan
    input = distribute_tensor(whole, *where)
    output = TailDropout(inplace=True)
    output.set_k(6)
    assert output(input) is input
    assert_close(input.full_tensor(), keep_prefix(whole, 6), **exactly)

    parts = same(4, 5, 9)
    own = parts[dist.get_rank()]
    added_up = DTensor.from_local(own, mesh(4), [Partial()])
    output = keep_prefix(added_up, torch.tensor([0, 2, 5, 9, 9]))
    assert output.placements == (Partial(),)
    assert_close(output.full_tensor(), keep_prefix(parts.sum(0), torch.tensor([0, 2, 5, 9, 9])))

    seed(dist.get_rank())
    output = tail_dropout(distribute_tensor(same(5, 9), *where))
    seed(0)
    assert_close(output.full_tensor(), tail_dropout(same(5, 9)), **exactly)

    layer = TailDropout()
    with pytest.raises(TypeError, match=r"k must be a plain tensor.*full_tensor"):
        layer.set_k(distribute_tensor(torch.arange(5), mesh(4), [S0]))
    strided = distribute_tensor(same(4, 8), mesh(2, 2), [_StridedShard(1, split_factor=2), S1])
    with pytest.raises(ValueError, match=r"must be Shard, Replicate or Partial.*redistribute it"):
        layer(strided)
    layer.set_k(10)
    with pytest.raises(ValueError, match="at most the number of features n=9, got k=10"):
        layer(distribute_tensor(same(5, 9), *where))


def test_in_place_partial_sums_functions_and_errors(processes):
    processes.run(check_other_things)


# --- plain tensors that are shards ---------------------------------------------------------------


def check_local_shards(n):
    rank, whole = dist.get_rank(), same(6, n)
    drawn, copied = TailDropout(device_mesh=mesh(4)), io.BytesIO()
    torch.save(drawn, copied)
    copied.seek(0)
    layers = [drawn, copy.deepcopy(drawn), torch.load(copied, weights_only=False)]
    layers.append(TailDropout(batch_dim=1, dropout_dim=0, device_mesh=mesh(2, 2)["features"]))
    for k in [*range(n + 1), torch.arange(6) * n // 5]:
        layers.append(TailDropout(device_mesh=mesh(4)).eval())
        layers[-1].set_k(k)
    layers.append(TailDropout(device_mesh=mesh(4), inplace=True))
    layers.append(TailDropout(device_mesh=mesh(4)).eval())
    for layer in layers:
        for _ in range(2):
            size, index = layer.device_mesh.size(), layer.device_mesh.get_local_rank()

            def part(tensor, dim=layer.dropout_dim, size=size, index=index):
                each = -(-tensor.shape[dim] // size)
                return tensor.movedim(dim, 0)[each * index : each * (index + 1)].movedim(0, dim)

            input, expected_input = (x.clone().requires_grad_() for x in (part(whole), whole))
            seed(rank)
            output = layer(input.clone() if layer.inplace else input)
            seed(rank - index)  # the first of the group
            expected = alone(layer)(expected_input.clone() if layer.inplace else expected_input)
            assert (output is input) == (expected is expected_input)
            assert_close(output, part(expected), **exactly)
            output.sum().backward()
            expected.sum().backward()
            assert_close(input.grad, part(expected_input.grad), **exactly)


@pytest.mark.parametrize("n", [8, 6, 3])
def test_with_a_device_mesh_plain_tensors_are_shards(processes, n):
    processes.run(check_local_shards, n)


def check_refused_shards():
    layer = TailDropout(device_mesh=mesh(4))
    uneven = same(5, 1 if dist.get_rank() == 0 else 2)
    with pytest.raises(
        ValueError, match=r"sizes that torch.chunk.*\[2, 2, 2, 1\] of 7 .*got \[1, 2, 2, 2\]"
    ):
        layer(uneven)
    layer(same(5, 2))
    with pytest.raises(ValueError, match=r"shards of one size.*got 2 features then and 3 now"):
        layer(same(5, 3))
    layer.device_mesh = mesh(2, 2)["data"]
    layer.set_k(5)
    assert_close(layer(same(5, 3)), keep_prefix(same(5, 3), 3 if dist.get_rank() < 2 else 2))
    layer.set_k(7)
    with pytest.raises(ValueError, match="at most the number of features n=6, got k=7"):
        layer(same(5, 3))
    with pytest.raises(ValueError, match=r'one dim.*such as mesh\["tp"\]'):
        TailDropout(device_mesh=mesh(2, 2))(same(5, 3))


def test_shards_that_cannot_be_placed_are_refused(processes):
    processes.run(check_refused_shards)


# --- networks ------------------------------------------------------------------------------------


def network(n=8, layer=None):
    torch.manual_seed(0)
    layer = TailDropout() if layer is None else layer
    return nn.Sequential(nn.Linear(4, n), nn.Tanh(), layer, nn.Linear(n, 3))


def parallel(model, use_local_output=False, on=None):
    plan = {"0": ColwiseParallel(use_local_output=use_local_output), "3": RowwiseParallel()}
    return parallelize_module(model, mesh(4) if on is None else on, plan)


def run(model, how, seed_of):
    seed(seed_of)
    if how == "checkpointed":
        output = checkpoint(model, same(6, 4), use_reentrant=False)
    elif how == "drawn":
        output = model(same(6, 4))
    else:
        with td.at_width(model, how):
            output = model(same(6, 4))
    torch.rand(1 + dist.get_rank())  # what the program draws between forward and backward
    output.square().sum().backward()
    return [output, *(p.grad for p in model.parameters())]


def check_network(n, use_local_output):
    own = mesh(4) if use_local_output else None
    for how in [*range(n + 1), 0.3, "drawn", "checkpointed"]:
        sharded = parallel(network(n, TailDropout(device_mesh=own)), use_local_output)
        actual = [
            x.full_tensor() if isinstance(x, DTensor) else x
            for x in run(sharded, how, dist.get_rank())
        ]
        assert_close(actual, run(network(n), how, 0))


@pytest.mark.parametrize(("n", "use_local_output"), [(8, False), (5, False), (8, True)])
def test_a_sharded_network_is_the_whole_one(processes, n, use_local_output):
    processes.run(check_network, n, use_local_output)


def check_compiled(use_local_output):
    layer = TailDropout(device_mesh=mesh(4) if use_local_output else None)
    model = parallel(network(8, layer), use_local_output)
    reference = network(8)
    model(same(6, 4))  # counts the shards
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for k in (None, 3, 4):
        for module in (layer, reference[2]):
            module.set_k(k)
        seed(dist.get_rank())
        actual = compiled(same(6, 4))
        seed(0)
        assert_close(actual, reference(same(6, 4)))
    torch._dynamo.reset()


@pytest.mark.parametrize("use_local_output", [False, True])
def test_it_compiles_as_one_graph(processes, use_local_output):
    processes.run(check_compiled, use_local_output)


# --- what is refused -----------------------------------------------------------------------------


def tail_mlp():
    torch.manual_seed(0)
    return TailMLP(4, 8, 3, blocks=2)


def check_tail_mlp():
    plan = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
    in_parts = fully_shard(tail_mlp().fc1, mesh=mesh(4)), tail_mlp()
    in_parts[1].fc1 = in_parts[0]
    for mlp in (parallelize_module(tail_mlp(), mesh(4), plan), in_parts[1]):
        with pytest.raises(ValueError, match=r"whole weights of its Linears.*to_sequential"):
            mlp(same(6, 4))
        assert_close(mlp.eval()(same(6, 4)), tail_mlp().eval()(same(6, 4)))
        with (
            mlp.using_k(3),
            pytest.raises(ValueError, match="whole weights of its Linears"),
        ):
            mlp(same(6, 4))
    mlp = tail_mlp()
    mlp.dropout.device_mesh = mesh(4)
    with pytest.raises(ValueError, match=r"no device_mesh.*to_sequential"):
        mlp(same(6, 4))

    sequential = parallel(tail_mlp().to_sequential())
    sequential[2].set_k(3)
    with tail_mlp().using_k(3) as mlp:
        assert_close(sequential(same(6, 4)), mlp(same(6, 4)))


def test_a_tail_mlp_needs_its_weights_whole(processes):
    processes.run(check_tail_mlp)


def tail_linear():
    torch.manual_seed(0)
    layer = TailLinear(8, 3)
    nn.init.normal_(layer.tail_bias)
    return layer


def check_tail_linear():
    layer, x = tail_linear(), distribute_tensor(same(6, 8), mesh(4), [Shard(1)])
    for name, parameter in list(layer.named_parameters()):
        placement = Shard(1) if name == "weight" else Replicate()
        part = distribute_tensor(parameter, mesh(4), [placement])
        setattr(layer, name, nn.Parameter(part))
    assert_close(layer.eval()(x).full_tensor(), tail_linear().eval()(same(6, 8)))
    for k in (3, None):
        layer.train().set_k(k)
        for input in (x, same(6, 8)):
            with pytest.raises(ValueError, match=r"TailLinear.*needs its whole input and weights"):
                layer(input)
    whole, reference = fully_shard(tail_linear(), mesh=mesh(4)), tail_linear()
    for k in (3, torch.tensor([0, 1, 3, 7, 8, 8])):
        whole.set_k(k)
        reference.set_k(k)
        assert_close(whole(same(6, 8)), reference(same(6, 8)))
    reference.train()
    reference.dropout.device_mesh = mesh(4)
    with pytest.raises(ValueError, match="TailDropout of a TailLinear takes no device_mesh"):
        reference(same(6, 8))


def test_a_tail_linear_needs_its_weights_whole(processes):
    processes.run(check_tail_linear)


def check_measuring_and_pruning():
    data = [(same(6, 4), same(6, 3))]
    scree = td.scree(network(), nn.MSELoss(), data, progress=False)
    normed = nn.Sequential(nn.BatchNorm1d(4), *network())

    def fails(model, *, whole_layers=True):
        calls = [
            (td.PruningError, lambda: td.prune(model, 3, same(6, 4))),
            (td.PruningError, lambda: td.plan_pruning(network(), 3, same(6, 4)).apply(model)),
            (td.PruningError, lambda: td.load_pruned(model, "no file")),
        ]
        if whole_layers:
            calls += [
                (ValueError, lambda: td.scree(model, nn.MSELoss(), data, progress=False)),
                (ValueError, lambda: td.report(model, scree, same(6, 4), "no file")),
            ]
        for error, call in calls:
            with pytest.raises(error, match=r"in each process, (got|and) .*(sharded|device_mesh)"):
                call()

    grid = mesh(2, 2)
    fails(parallel(network()))
    fails(parallel(network(), use_local_output=True))
    fails(network(layer=TailDropout(device_mesh=mesh(4))))
    in_both_ways = fully_shard(parallel(network(), on=grid["features"]), mesh=grid["data"])
    fails(in_both_ways)
    in_both_ways(same(6, 4))  # and leaves the root's parameters gathered from the one dim
    with pytest.raises(ValueError, match=r"'0\.weight' is sharded"):
        td.scree(in_both_ways, nn.MSELoss(), data, progress=False)
    with pytest.raises(ValueError, match="recalibrate needs a model whose layers are whole"):
        td.recalibrate(
            parallelize_module(normed, mesh(4), {"1": ColwiseParallel()}), data, progress=False
        )
    for copies in mesh(4), grid:  # shards that are gathered, of one copy or two
        gathered = fully_shard(network(), mesh=copies)
        fails(gathered, whole_layers=False)
        actual = td.scree(gathered, nn.MSELoss(), data, progress=False)
        assert actual.count == WORLD * 6
        assert_close(actual.loss, scree.loss, rtol=1e-5, atol=0)


def test_measuring_and_pruning_refuse_what_is_sharded(processes):
    processes.run(check_measuring_and_pruning)


def test_a_plain_input_needs_nothing_of_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", None)
    with pytest.raises(ImportError):
        from torch.distributed.tensor import DTensor  # noqa: F401
    for training in (True, False):
        TailDropout().train(training)(torch.ones(2, 4))
        tail_mlp().train(training)(torch.ones(2, 4))
        with TailDropout().using_k(3) as layer:
            layer(torch.ones(2, 4))
