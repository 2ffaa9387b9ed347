"""Moments against numpy on all samples at once."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from taildropout.measuring.moments import Moments, of_all_processes


def moments_of(vectors, sizes):
    moments = Moments(len(vectors))
    for part in vectors.split(sizes, 1):
        moments.add(part)
    return moments


@pytest.mark.parametrize("sizes", [[9], [4, 5], [1, 1, 7], [0, 3, 0, 6], [1] * 9])
def test_mean_and_covariance_do_not_depend_on_the_batches(sizes):
    vectors = torch.randn(3, 9, dtype=torch.float64) + torch.tensor([[0.0], [5.0], [-1e6]])
    moments = moments_of(vectors, sizes)
    assert moments.count == 9
    assert_close(moments.mean, vectors.mean(1))
    assert_close(moments.covariance(), torch.tensor(np.cov(vectors)), rtol=1e-6, atol=1e-9)


def test_two_parts_add_up_to_the_whole():
    vectors = torch.randn(3, 20, dtype=torch.float64)
    whole, one, other = (moments_of(v, 4) for v in (vectors, vectors[:, :7], vectors[:, 7:]))
    one.merge(other.count, other.mean, other.squares)
    assert one.count == 20
    assert_close(one.mean, whole.mean)
    assert_close(one.covariance(), whole.covariance())


def test_one_sample_has_a_mean_and_no_covariance():
    moments = moments_of(torch.ones(2, 1, dtype=torch.float64), 1)
    assert_close(moments.mean, torch.ones(2, dtype=torch.float64))
    assert moments.covariance().isnan().all()


def test_one_process_alone_has_what_it_measured():
    moments = Moments(2)
    assert of_all_processes([0, 1], moments) == ([0, 1], moments)
