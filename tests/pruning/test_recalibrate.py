"""Statistics at a width, against torch's update_bn, plain means, and the large network with k set."""

import copy
import math

import pytest
import torch
from helpers.oracle import as_trained, assert_same, masked, snapshot
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import taildropout as td
from taildropout import TailDropout


def network(**options):
    return as_trained(
        nn.Sequential(
            nn.Conv2d(2, 6, 3),
            nn.BatchNorm2d(6, **options),
            *(nn.ReLU(), TailDropout(dropout_dim=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)),
            *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 9, 5), nn.BatchNorm1d(5)),
        ).double()
    )


def batches(*sizes):
    return [3 * torch.randn(size, 2, 5, 5, dtype=torch.float64) + 1 for size in sizes]


def norms_of(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def statistics(model):
    return {name: tensor.clone() for name, tensor in model.named_buffers()}


def recalibrate(model, data, **options):
    td.recalibrate(model, data, progress=False, **options)


def without_dropout(model):
    plain = td.finalize(model)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Dropout):
            plain.set_submodule(name, nn.Identity())
    return plain.train()


# -------------------------------------------------------------------------------- the statistics


def test_on_equal_batches_they_are_those_of_torch():
    model, data = network(), batches(7, 7, 7)
    expected = without_dropout(model)
    update_bn(data, expected)
    recalibrate(model, data)
    assert_close(statistics(model), statistics(expected), rtol=1e-10, atol=1e-12)


def test_batches_count_by_their_values():
    norm, data = nn.BatchNorm2d(2).double(), batches(50, 3, 20, 2)
    norm.running_var.fill_(torch.nan)  # nothing is left of what was there
    recalibrate(norm, data)
    assert_close(norm.running_mean, torch.cat(data).mean((0, 2, 3)), rtol=1e-10, atol=1e-12)
    total = sum(len(batch) * batch.var((0, 2, 3)) for batch in data)
    assert_close(norm.running_var, total / 75, rtol=1e-10, atol=1e-12)
    assert norm.num_batches_tracked == 4


def test_a_small_last_batch_hardly_counts():
    """Weighted alike, two samples would shift the mean by as much as 200 do."""
    norm = nn.BatchNorm1d(1).double()
    recalibrate(norm, [torch.randn(200, 1).double(), 100 + torch.randn(2, 1).double()])
    assert norm.running_mean.item() < 2


def test_images_of_several_sizes_count_by_their_pixels():
    norm = nn.BatchNorm2d(2).double()
    data = [torch.randn(4, 2, side, side, dtype=torch.float64) for side in (3, 8, 5)]
    recalibrate(norm, data)
    pixels = torch.cat([images.movedim(1, -1).flatten(0, 2) for images in data])
    assert_close(norm.running_mean, pixels.mean(0), rtol=1e-10, atol=1e-12)


def test_a_layer_that_is_called_twice_counts_both():
    norm = nn.BatchNorm1d(3).double()
    twice = nn.Sequential(norm, norm)
    (x,) = data = [torch.randn(9, 3, dtype=torch.float64) + 5]
    recalibrate(twice, data)
    second = norm(x)  # by the batch, in training mode
    expected = twice[0](x).mean(0)
    assert_close(expected, second.mean(0), rtol=1e-10, atol=1e-10)
    assert norm.num_batches_tracked == 2 + 2


@pytest.mark.parametrize("k", [2, 5])
def test_before_or_after_the_cut_is_the_same(k):
    """Where no BatchNorm behind the layer makes constants of zeros, which the cut has folded."""
    model, data = network(), batches(16, 16, 5)
    model[4] = nn.Tanh()
    small = td.prune(model, k, data[0])
    recalibrate(small, data)
    with td.at_width(model, k):
        recalibrate(model, data)
    for one, other in zip(norms_of(small), norms_of(model), strict=True):
        kept = len(one.running_mean)
        assert_close(one.running_mean, other.running_mean[:kept], rtol=1e-9, atol=1e-11)
        assert_close(one.running_var, other.running_var[:kept], rtol=1e-9, atol=1e-11)
    (x,) = batches(3)
    assert_close(small.eval()(x), masked(model, {"3": k}, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("k", [2, 5])
def test_a_network_that_is_calibrated_before_the_cut_needs_it_no_more(k):
    model, data = network(), batches(16, 16, 5)
    with td.at_width(model, k):
        recalibrate(model, data)
    small = td.prune(model, k, data[0])
    before = statistics(small)
    recalibrate(small, data)
    assert_close(statistics(small), before, rtol=1e-9, atol=1e-11)


def test_a_k_that_is_set_is_in_force_and_stays():
    model, data = network(), batches(16)
    by_width = copy.deepcopy(model)
    model[3].set_k(2)
    recalibrate(model, data)
    assert model[3].k == 2
    with td.at_width(by_width, 2):
        recalibrate(by_width, data)
    assert_same(statistics(model), statistics(by_width))
    assert not model[4].running_mean[2:].any()  # behind the layer, where all is zero


# ----------------------------------------------------------------------------------- what it leaves


@pytest.mark.parametrize("training", [True, False])
def test_all_else_stays(training):
    model, data = network(momentum=0.3).train(training), batches(8, 8)
    model[9].momentum = None
    model[1].eval()  # frozen
    before = snapshot(model)
    recalibrate(model, data)
    after = snapshot(model)
    assert after["identity"].keys() == before["identity"].keys()
    names = {name for name, _ in model.named_buffers()}
    for key in before.keys() - {"values", "identity"}:
        assert_same(after[key], before[key])
    for name in before["values"].keys() - names:
        assert after["identity"][name] == before["identity"][name]
    for name in names:
        assert after["identity"][name][:2] == before["identity"][name][:2]
    assert [norm.momentum for norm in norms_of(model)] == [0.3, 0.1, None]
    assert [norm.training for norm in norms_of(model)] == [False, training, training]


def test_layers_that_are_not_called_or_keep_none_stay():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)).double()
    model[0].unused = as_trained(nn.BatchNorm1d(3).double())
    before = statistics(model[0].unused)
    recalibrate(model, [torch.randn(8, 3).double()])
    assert_same(statistics(model[0].unused), before)
    assert model[1].running_mean is None


def test_sync_batch_norm():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    plain, data = network(), batches(6, 6)
    plain.load_state_dict(model.state_dict())
    recalibrate(model, data)
    recalibrate(plain, data)
    assert_close(statistics(model), statistics(plain), rtol=1e-10, atol=1e-12)


class Failing:
    """Data that breaks off."""

    def __init__(self, error):
        self.error = error

    def __iter__(self):
        yield from batches(8, 8)
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
def test_after_a_failure_all_is_as_it_was(error):
    model = network(momentum=0.2).train()
    before = snapshot(model)
    with pytest.raises(error):
        recalibrate(model, Failing(error))
    after = snapshot(model)
    for key in before.keys() - {"identity", "rng"}:
        assert_same(after[key], before[key])
    assert norms_of(model)[0].momentum == 0.2


def test_random_numbers_are_not_used_up():
    model = network()
    loader = DataLoader(TensorDataset(torch.cat(batches(20))), batch_size=8, shuffle=True)
    before = torch.get_rng_state()
    recalibrate(model, loader)
    assert_same(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------- how data comes


class TakesTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3).double()

    def forward(self, x, y):
        return self.norm(x + y)


def test_inputs_with_and_without_targets():
    x, y = torch.randn(2, 8, 3, dtype=torch.float64)
    for model, batch, expected in (
        (nn.BatchNorm1d(3).double(), x, x),
        (nn.BatchNorm1d(3).double(), (x,), x),
        (nn.BatchNorm1d(3).double(), (x, "a target"), x),
        (nn.BatchNorm1d(3).double(), [x, torch.zeros(8)], x),
        (TakesTwo(), ((x, y), torch.zeros(8)), x + y),
        (TakesTwo(), {"x": x, "y": y}, x + y),
        (TakesTwo(), ({"x": x, "y": y}, None), x + y),
    ):
        recalibrate(model, [batch])
        (norm,) = norms_of(model)
        assert_close(norm.running_mean, expected.mean(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (nn.Linear(3, 3), [torch.ones(2, 3)], "must contain a BatchNorm layer .* and has none"),
        (nn.BatchNorm1d(3, track_running_stats=False), [torch.ones(2, 3)], "must contain a Batch"),
        (nn.BatchNorm1d(3), [], "data must yield at least one batch, got none"),
        (nn.BatchNorm1d(3), iter(()), "data must yield at least one batch, got none"),
        (
            nn.Sequential(nn.BatchNorm1d(3)),
            [torch.ones(5, 3), torch.ones(1, 3)],
            r"more than one value .* got an input of shape \(1, 3\) in layer '0': .* drop_last=True",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(model, data, words):
    before = snapshot(model)["values"]
    with pytest.raises(ValueError, match=words):
        recalibrate(model, data)
    assert_same(snapshot(model)["values"], before)


# --------------------------------------------------------------------------------- what it is for


def test_a_layer_behind_the_dropout_is_normalised_at_its_width():
    """Trained at all widths, the statistics fit none: the outputs are off until they are."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(1)
    model = nn.Sequential(nn.Linear(8, 16), TailDropout(0.5), nn.Linear(16, 1), norm)
    data = [torch.randn(256, 8) for _ in range(20)]
    for x in data:
        model.train()(x)
    small = td.prune(model, 4, data[0]).eval()
    before = small(torch.cat(data)).std().item()
    recalibrate(small, data)
    after = small(torch.cat(data)).std().item()
    assert math.isclose(after, 1, rel_tol=0.02)
    assert not math.isclose(before, 1, rel_tol=0.1)
