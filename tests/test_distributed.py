"""Several processes, over gloo: scree on shards, DistributedDataParallel, FSDP2, checkpointing."""

import pytest
import torch
import torch.distributed as dist
from helpers.processes import Processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import taildropout as td
from taildropout import Scree, TailDropout, TailMLP
from taildropout.draws import Draw, inverse_cdf
from taildropout.lengths import Exponential

pytestmark = pytest.mark.slow

N = 6
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory):
    group = Processes(request.param, tmp_path_factory.mktemp("group") / "meeting-point")
    yield group
    group.close()


# --- scree ---------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, N), nn.Tanh(), TailDropout(), nn.Linear(N, 3))


def rows(start, end):
    """A part of always the same 60 samples."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(60, 4, generator=generator)
    return inputs[start:end], torch.randn(60, 3, generator=generator)[start:end]


def measure(shares, ks=None):
    """Scree of this process's share: the bounds of its batches."""
    data = [rows(start, end) for start, end in shares[dist.get_rank()]]
    chosen = None if ks is None else ks[dist.get_rank()]
    result = td.scree(network(), nn.MSELoss(), data, ks=chosen, progress=False)
    return result.to_dict(), result.choose(0.1)


UNEVEN = [[(0, 20), (20, 37)], [(37, 38)], [(38, 60)]]
NONE_IN_THE_FIRST = [[], [(0, 9), (9, 37)], [(37, 60)]]
ALL_IN_THE_LAST = [[], [], [(0, 60)]]
AN_EMPTY_BATCH = [[(0, 0)], [(0, 30)], [(30, 60), (60, 60)]]


def shares_of(world, shares):
    """For so many processes: those left over go to the last one."""
    return [*shares[: world - 1], [share for rest in shares[world - 1 :] for share in rest]]


@pytest.mark.parametrize("shares", [UNEVEN, NONE_IN_THE_FIRST, ALL_IN_THE_LAST, AN_EMPTY_BATCH])
def test_scree_of_shards_is_that_of_one_process(processes, shares):
    shares = shares_of(processes.world, shares)
    alone = td.scree(network(), nn.MSELoss(), [rows(0, 60)], progress=False)
    results = processes.run(measure, shares)
    assert results == [results[0]] * processes.world
    together = Scree.from_dict(results[0][0])
    assert (together.layer, together.ks, together.count) == (alone.layer, alone.ks, 60)
    assert_close(together.loss, alone.loss, rtol=1e-6, atol=0)
    assert_close(together.cov, alone.cov, rtol=1e-6, atol=1e-6 * alone.cov.max().item())
    assert results[0][1] == alone.choose(0.1)


def raises_value_error(*args):
    with pytest.raises(ValueError, match=args[0]):
        measure(*args[1:])


def ordered_weights(shares, by):
    """Of a DistributedDataParallel model, ordered in place by this process's share."""
    data = [rows(start, end) for start, end in shares[dist.get_rank()]]
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    td.order(model, data, loss=nn.MSELoss(), by=by, optimizer=optimizer)
    return model.module[0].weight.detach()


@pytest.mark.parametrize("by", ["variance", "saliency", "greedy"])
def test_the_order_is_that_of_one_process_with_all_data(processes, by):
    shares = [[(0, 20), (20, 30)], [(30, 60)]] if processes.world == 2 else UNEVEN
    model, data = network(), [rows(0, 60)]
    expected = td.order(model, data, loss=nn.MSELoss(), by=by)[0].weight.detach()
    assert not torch.equal(expected, model[0].weight)
    for weight in processes.run(ordered_weights, shares, by):
        assert torch.equal(weight, expected)


def test_no_data_anywhere_is_an_error_in_every_process(processes):
    processes.run(raises_value_error, "at least one sample", [[]] * processes.world)


def test_different_ks_are_an_error_in_every_process(processes):
    shares = shares_of(processes.world, UNEVEN)
    ks = [[0, N], *[[0, 1, N]] * (processes.world - 1)]
    processes.run(raises_value_error, "must measure the same ks", shares, ks)


# --- training ------------------------------------------------------------------------------------


def tail_mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Sequential(TailMLP(5, N, 3, blocks=3)))


def checkpointed():
    return Checkpointed(network())


class Checkpointed(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


SIZE = 12  # samples per process


def data_parallel(model):
    return DistributedDataParallel(model)


def fully_sharded(model):
    """Two groups of parameters: the first module's, and all others."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(next(module for module in model.modules() if type(module) is nn.Linear), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(network, wrap, k):
    """Of one step: drawn ks, gradients by name, and the keys of the state dict.

    k: what to set, None to draw; a list has one for each sample of all processes.
    """
    rank = dist.get_rank()
    model = wrap(network())
    drawn, named_gradients = step(model, k, rank * SIZE, (rank + 1) * SIZE, seed=rank)
    return drawn, named_gradients, [name.removeprefix("module.") for name in model.state_dict()]


def step(model, k, start, end, seed):
    (layer,) = td.tail_dropouts(model).values()
    layer.set_k(torch.tensor(k[start:end]) if isinstance(k, list) else k)
    inputs, target = rows(start, end)
    torch.manual_seed(seed)
    nn.functional.mse_loss(model(inputs), target).backward()
    drawn = None if layer.drawn_k is None else layer.drawn_k.tolist()
    named = {name.removeprefix("module."): full(p.grad) for name, p in model.named_parameters()}
    return drawn, {name: gradient.tolist() for name, gradient in named.items()}


def assert_equal_gradients(actual, expected):
    assert list(actual) == list(expected)
    for name, gradient in expected.items():
        assert_close(torch.tensor(actual[name]), torch.tensor(gradient))


by_wrapper = pytest.mark.parametrize("wrap", [data_parallel, fully_sharded])
by_network = pytest.mark.parametrize("network", [network, tail_mlp, checkpointed])


@by_wrapper
@by_network
@pytest.mark.parametrize("k", [0, 2, N, "one per sample"])
def test_gradients_with_k_set_are_those_of_one_process(processes, wrap, network, k):
    if k == "one per sample":
        k = torch.randint(N + 1, (processes.world * SIZE,)).tolist()
    _, expected = step(network(), k, 0, processes.world * SIZE, seed=0)
    for drawn, actual, _ in processes.run(gradients, network, wrap, k):
        assert drawn is None
        assert_equal_gradients(actual, expected)


@by_wrapper
@by_network
def test_each_process_draws_its_own_ks(processes, wrap, network):
    """From its own seed; the gradients are those of one process with all of the ks."""
    results = processes.run(gradients, network, wrap, None)
    ks = [drawn for drawn, *_ in results]
    for rank, drawn in enumerate(ks):
        alone, _ = step(network(), None, 0, SIZE, seed=rank)
        assert drawn == alone
    assert len(set(map(tuple, ks))) == processes.world
    together = [k for drawn in ks for k in drawn]
    _, expected = step(network(), together, 0, processes.world * SIZE, seed=0)
    for _, actual, _ in results:
        assert_equal_gradients(actual, expected)


@by_wrapper
@by_network
def test_the_keys_of_the_state_dict_are_those_of_the_plain_model(processes, wrap, network):
    for _, _, keys in processes.run(gradients, network, wrap, None):
        assert keys == list(network().state_dict())


# --- drawn together ------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """Its blocks, with their layers, are at a checkpoint each, or not."""

    def __init__(self, checkpointed):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, N), nn.Tanh(), TailDropout())
        self.second = nn.Sequential(TailMLP(N, 9, N, blocks=3), nn.Linear(N, 3))
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in (self.first, self.second):
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def two_layers(checkpointed=False):
    torch.manual_seed(0)
    return TwoLayers(checkpointed)


def fully_sharded_blocks(model):
    """Each block by itself, then the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in (model.first, model.second):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients_together(wrap, wrapped_before, checkpointed):
    """Of one step: the uniforms, the ks of both layers, and the gradients by name."""
    rank = dist.get_rank()
    model = two_layers(checkpointed)
    model = wrap(model) if wrapped_before else model
    handle = td.draw_together(model)
    model = model if wrapped_before else wrap(model)
    inputs, target = rows(rank * SIZE, (rank + 1) * SIZE)
    torch.manual_seed(rank)
    nn.functional.mse_loss(model(inputs), target).backward()
    ks = [layer.drawn_k.tolist() for layer in td.tail_dropouts(model).values()]
    named = {name.removeprefix("module."): full(p.grad) for name, p in model.named_parameters()}
    return handle.drawn_u.tolist(), ks, {name: grad.tolist() for name, grad in named.items()}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("wrapped_before", [True, False])
@pytest.mark.parametrize("wrap", [data_parallel, fully_sharded_blocks])
def test_drawn_together_each_process_has_its_own_pass(
    processes, wrap, wrapped_before, checkpointed
):
    results = processes.run(gradients_together, wrap, wrapped_before, checkpointed)
    assert len({tuple(uniforms) for uniforms, *_ in results}) == processes.world
    model = two_layers()
    for (uniforms, ks, _), n in ((result, n) for result in results for n in (N, 9)):
        expected = inverse_cdf(
            Exponential(0.5), n, Draw(torch.tensor(uniforms).double(), None, CPU)
        )
        assert_close(torch.tensor(ks[(N, 9).index(n)]), expected)
    for layer, index in zip(td.tail_dropouts(model).values(), (0, 1), strict=True):
        layer.set_k(torch.tensor([k for _, ks, _ in results for k in ks[index]]))
    inputs, target = rows(0, processes.world * SIZE)
    nn.functional.mse_loss(model(inputs), target).backward()
    expected = {name: p.grad.tolist() for name, p in model.named_parameters()}
    for *_, actual in results:
        assert_equal_gradients(actual, expected)


# --- activation checkpointing ---------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("block", [network, tail_mlp])
def test_checkpointing_draws_the_same_k_again(block, use_reentrant):
    def run_with(run):
        model = block()
        inputs = rows(0, 60)[0].requires_grad_()
        torch.manual_seed(3)
        output = run(model, inputs)
        torch.rand(100)  # what the program draws between forward and backward
        output.square().mean().backward()
        (layer,) = td.tail_dropouts(model).values()
        return [output, layer.drawn_k, inputs.grad, *(p.grad for p in model.parameters())]

    def run_checkpointed(model, inputs):
        return checkpoint(model, inputs, use_reentrant=use_reentrant)

    assert_close(run_with(run_checkpointed), run_with(lambda model, inputs: model(inputs)))


# --- Elastic ---------------------------------------------------------------------------------------


def deep():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(4, 16), nn.Tanh(), TailDropout(), nn.Linear(16, 12), nn.Tanh(), TailDropout()),
        nn.Linear(12, 3),
    )


def gradients_of_the_mean(wrap):
    """Of all processes' samples together, as the wrapped Elastic leaves them in each."""
    x, _ = rows(0, 60)
    share = x.chunk(dist.get_world_size())[dist.get_rank()]
    elastic = wrap(td.Elastic(deep(), x, groups=3).train())
    torch.manual_seed(dist.get_rank())
    elastic(share).square().sum().backward()
    grads = [p.grad for p in elastic.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]


def as_it_is(elastic):
    return elastic


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard])
def test_an_elastic_averages_its_gradients_over_the_processes(processes, wrap):
    of_each = processes.run(gradients_of_the_mean, as_it_is)
    expected = [torch.stack(grads).mean(0) for grads in zip(*of_each, strict=True)]
    for grads in processes.run(gradients_of_the_mean, wrap):
        assert_close(grads, expected)
