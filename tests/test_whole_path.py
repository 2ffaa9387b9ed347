"""From data of a known rank to that rank: train, measure, choose, cut."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.testing import assert_close

import taildropout as td

pytestmark = pytest.mark.slow

SIZE, WIDTH = 64, 16  # of the data, and of the hidden layer
NOISE = 0.5
TRAINING, HELD_OUT, FRESH = 4000, 2000, 20_000

# The tolerance is the default of `choose`, 1 % of the loss, for all ranks. It must lie between what
# a feature is worth that carries nothing, 0 or less, and what the weakest planted direction is
# worth: with a singular value of 1 it adds 1 / 64 to an error of NOISE ** 2 = 0.25, or 6 %. On 2000
# samples the standard errors of these differences are about 0.05 % and 0.3 %.
TOLERANCE = 0.01


def planted(rank, seed):
    """Targets that depend on `rank` directions of the inputs, with singular values 2, ..., 1.

    Three pairs (inputs, targets): to train, to choose, and to check. Rank 0 is pure noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def orthonormal():
        return torch.linalg.qr(torch.randn(SIZE, rank, generator=generator)).Q

    matrix = (orthonormal() * torch.linspace(2, 1, rank)) @ orthonormal().T
    inputs = torch.randn(TRAINING + HELD_OUT + FRESH, SIZE, generator=generator)
    noise = NOISE * torch.randn(len(inputs), SIZE, generator=generator)
    sizes = [TRAINING, HELD_OUT, FRESH]
    return list(zip(inputs.split(sizes), (inputs @ matrix.T + noise).split(sizes), strict=True))


def trained(inputs, targets, layer, steps=400):
    model = nn.Sequential(
        nn.Linear(SIZE, WIDTH, bias=False), layer, nn.Linear(WIDTH, SIZE, bias=False)
    )
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(inputs), (256,))
        optimizer.zero_grad()
        mse_loss(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()
        schedule.step()
    return model


def tail_dropout():
    return td.TailDropout(lengths=td.lengths.Uniform())


def measured(rank, seed, layer):
    """A trained network, its scree on held-out data, and fresh data."""
    torch.manual_seed(seed)
    training, held_out, fresh = planted(rank, seed)
    model = trained(*training, layer)
    scree = td.scree(model, nn.MSELoss(), [held_out], progress=False)
    return model.eval(), scree, fresh


@torch.no_grad()
def error_at(model, k, inputs, targets):
    with model[1].using_k(k):
        return mse_loss(model(inputs), targets).item()


@pytest.mark.parametrize("rank", [3, 5, 10])
def test_the_planted_rank_is_found_in_at_least_18_of_20_networks(rank):
    chosen = Counter()
    for seed in range(20):
        model, scree, fresh = measured(rank, seed, tail_dropout())
        k = scree.choose(TOLERANCE)
        chosen[k] += 1
        assert error_at(model, k, *fresh) <= (1 + TOLERANCE) * error_at(model, WIDTH, *fresh)
        if seed == 0:
            small = td.prune(model, k, fresh[0][:2]).eval()
            assert (small[0].out_features, small[2].in_features) == (k, k)
            with model[1].using_k(k):
                assert_close(small(fresh[0]), model(fresh[0]), rtol=1e-4, atol=1e-5)
    assert chosen[rank] >= 18, chosen


def test_without_the_layer_in_training_the_rank_is_spread_over_all_features():
    """The data alone do not make the order."""
    for seed in range(5):
        _, scree, _ = measured(3, seed, td.TailDropout(p=0))
        assert scree.choose(TOLERANCE) > 10


def test_of_pure_noise_no_feature_is_chosen():
    for seed in range(10):
        _, scree, _ = measured(0, seed, tail_dropout())
        assert scree.choose(TOLERANCE) == 0
        assert scree.explain(TOLERANCE).startswith(f"k = 0 of {WIDTH}: ")
