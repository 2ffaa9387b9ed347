"""Slices whose gradients arrive in one tensor, against what autograd makes of plain indexing."""

import pytest
import torch
from torch.testing import assert_close

from taildropout.functional.slices import slices_of

ALL = slice(None)
REGIONS = {
    "disjoint": ((slice(0, 2), ALL), (slice(2, 5), ALL)),
    "nested": ((slice(0, 2), slice(0, 1)), (slice(0, 4), slice(0, 3)), (ALL, ALL)),
    "overlapping": ((slice(0, 3), ALL), (slice(1, 5), slice(0, 2))),
    "empty": ((slice(0, 0), ALL), (slice(0, 1), slice(3, 4))),
}


@pytest.mark.parametrize("regions", REGIONS.values(), ids=REGIONS)
def test_values_gradients_and_second_derivatives_are_those_of_indexing(regions):
    tensor = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def derivatives(slices):
        total = sum((i + 1) * part.pow(3).sum() for i, part in enumerate(slices))
        (first,) = torch.autograd.grad(total, tensor, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), tensor)
        return first, second

    ours, plain = slices_of(tensor, regions), [tensor[region] for region in regions]
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert_close(derivatives(ours), derivatives(plain))


def test_they_are_views():
    tensor = torch.randn(5, 4, requires_grad=True)
    data = tensor.untyped_storage().data_ptr()
    for part in slices_of(tensor, REGIONS["nested"]):
        assert part.untyped_storage().data_ptr() == data


def test_slices_that_nothing_reads_give_no_gradient():
    tensor = torch.ones(5, 4, requires_grad=True)
    first, _ = slices_of(tensor, REGIONS["disjoint"])
    first.sum().backward()
    expected = torch.zeros(5, 4)
    expected[:2] = 1
    assert torch.equal(tensor.grad, expected)
