"""FLOPs, counted by hand."""

import pytest
import torch
from helpers.oracle import Net
from torch import nn
from torch.testing import assert_close

import taildropout as td
from taildropout import PruningError, TailDropout
from taildropout.pruning.cost import costs_by_module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flops_count_recurrent_layers_and_attention(dtype):
    model = nn.Sequential(
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
        TailDropout(),
        nn.LSTM(16, 8, num_layers=2, bidirectional=True, batch_first=True),
    )
    model = model.to(dtype).eval()
    plan = td.plan_pruning(model, 4, torch.randn(2, 5, 16, dtype=dtype))
    projections, pairs, feed_forward = 4 * 16 * 16, 2 * 5 * 16, 2 * 16 * 32
    encoder = 10 * (projections + pairs + feed_forward)

    def lstm(n):
        return 10 * 2 * 4 * (8 * (n + 8) + 8 * (16 + 8))

    assert plan.before.flops == 2 * (encoder + lstm(16))
    assert plan.after.flops == 2 * (encoder + lstm(4))


class Exportable(nn.Module):
    """It can be exported, and not be run."""

    def forward(self, x):
        if not torch.compiler.is_exporting():
            raise RuntimeError("no run today")
        return x


def test_a_model_that_does_not_run_is_refused_in_words():
    model = nn.Sequential(nn.Linear(5, 4), TailDropout(), Exportable(), nn.Linear(4, 3))
    with pytest.raises(PruningError, match=r"must run on its example inputs, but .* no run today"):
        td.plan_pruning(model, 2, torch.randn(3, 5))


def test_a_parameter_may_be_what_a_module_is_called_with():
    """Latents of a Perceiver, say, for each sample."""

    class Latents(nn.Module):
        def __init__(self):
            super().__init__()
            self.latents, self.norm = nn.Parameter(torch.randn(5, 4)), nn.LayerNorm(4)
            self.fc1, self.tail, self.fc2 = nn.Linear(4, 8), TailDropout(), nn.Linear(8, 3)

        def forward(self, x):
            latents = self.norm(self.latents.expand(len(x), -1, -1))
            return self.fc2(self.tail(self.fc1(latents + x)))

    model = Latents()
    plan = td.plan_pruning(model, 2, torch.randn(3, 5, 4))
    assert (plan.before.flops, plan.after.flops) == (2 * 15 * 8 * 7, 2 * 15 * 2 * 7)
    assert model.latents.requires_grad


def test_counting_leaves_inputs_and_random_numbers_as_they_are():
    """Also where the numbers themselves decide about shapes, and so something is computed."""
    model, x = Net(lambda m, x: m.consumer(x.add_(torch.rand(())))[x[:, 0] > 0]), torch.randn(3, 4)
    before, state = x.clone(), torch.get_rng_state()
    costs_by_module(model, x)
    assert_close(x, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
