"""Networks that cast to float32 inside, run in float64 throughout."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import taildropout as td
from taildropout import TailDropout
from taildropout.pruning.precision import InFloat64, precisely

X = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

CASTS = {
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "to by name": lambda x: x.to(dtype=torch.bfloat16),
    "half": lambda x: x.half(),
    "softmax": lambda x: x.softmax(-1, dtype=torch.float32),
    "new": lambda x: torch.zeros(3, dtype=torch.float32) + x[:, 0],
}


@pytest.mark.parametrize("name", CASTS)
def test_casts_to_fewer_bits_are_casts_to_float64(name):
    with InFloat64():
        result = CASTS[name](X) / 3
    assert result.dtype == torch.float64


def test_other_casts_are_as_they_were():
    with InFloat64():
        assert X.long().dtype == torch.int64
        assert X.to(torch.int32).dtype == torch.int32
        assert X.to("cpu") is X
    assert X.float().dtype == torch.float32


def test_code_that_relies_on_its_casts_runs_with_them():
    def run():
        assert X.float().dtype == torch.float32

    with precisely(torch.float64, run):
        assert X.float().dtype == torch.float32
    with pytest.raises(ZeroDivisionError):
        precisely(torch.float64, lambda: 1 / 0)


class InFloat32(nn.Module):
    def forward(self, x):
        return x.float().tanh().to(x.dtype)


def test_a_plan_is_verified_to_more_than_the_rounding_of_a_cast_inside():
    model = nn.Sequential(nn.Linear(5, 64), TailDropout(), InFloat32(), nn.Linear(64, 3)).double()
    plan = td.plan_pruning(model, 20, X)
    small = plan.apply(model)
    (verification,) = plan.verifications
    assert verification.dtype == torch.float64
    assert all(c.difference < 1e-13 for c in verification.comparisons)
    with td.at_width(model.eval(), 20), InFloat64():
        assert_close(small.eval()(X), model(X), rtol=1e-12, atol=1e-12)
