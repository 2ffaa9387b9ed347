"""FLOPs, counted by hand."""

import pytest
import torch
from torch import nn

import taildropout as td
from taildropout import TailDropout


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
