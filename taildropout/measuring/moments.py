"""Mean and covariance of per-sample losses as they come, over all processes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Moments:
    """Count, mean and covariance of vectors that come in batches, in constant memory.

    Chan, Golub and LeVeque (1979): two sets' sums of squares around their own means add up with
    a correction for the distance of the means.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.squares = torch.zeros(size, size, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:  # (size, batch)
        if vectors.shape[1] > 0:
            mean = vectors.mean(1)
            centred = vectors - mean[:, None]
            self.merge(vectors.shape[1], mean, centred @ centred.T)

    def merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if count == 0:
            return
        shift = mean - self.mean
        total = self.count + count
        self.squares += squares + shift.outer(shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def covariance(self) -> Tensor:
        """NaN for one sample, which has none."""
        divisor = self.count - 1 if self.count > 1 else float("nan")
        return self.squares / divisor

    def stderr(self) -> Tensor:
        """Of each mean."""
        return (self.covariance().diagonal() / self.count).sqrt()


def of_all_processes(
    ks: Sequence[float] | None, moments: Moments | None
) -> tuple[Sequence[float] | None, Moments | None]:
    """The moments of all processes' data together, the same in each; alone, what is given."""
    if not (dist.is_available() and dist.is_initialized()):
        return ks, moments
    mine = None if moments is None else (ks, moments.count, moments.mean, moments.squares)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    shares = [share for share in shares if share is not None]
    if not shares:
        return None, None
    measured: Sequence[float] = shares[0][0]
    if any(share[0] != measured for share in shares):
        raise ValueError("all processes must measure the same ks of the same layer")
    together = Moments(len(measured))
    for _, count, mean, squares in shares:
        together.merge(count, mean, squares)
    return measured, together


def sum_of_all_processes(values: Tensor) -> Tensor:
    """The sum over all processes, the same in each to the last bit; alone, what is given."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, values.cpu())
    return torch.stack(shares).sum(0)
