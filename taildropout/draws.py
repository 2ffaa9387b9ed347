"""From uniform numbers to k: one inverse-CDF look-up, the same for all lengths."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .lengths import Exponential, Lengths, Sizes, Uniform


def draw(
    lengths: Lengths,
    n: int,
    count: int,
    *,
    stratified: bool = True,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw `count` values of k in 0, ..., n.

    Each k has exactly its own probability, `lengths.pmf(n)`, at float64 resolution. Stratified
    draws use the uniforms u_i = (pi(i) + v_i) / count, pi a random permutation and v_i
    independent uniforms: each value by itself is distributed as before, and together they cover
    the distribution evenly, so a mean over the batch varies less.

    Args:
        lengths: the distribution of k.
        n: number of features.
        count: how many to draw.
        stratified: spread the draws of this call evenly; False makes them independent.
        device: where the result lives.
        generator: source of randomness, torch's global one by default.

    Returns:
        int64, shape `(count,)`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> draw(Uniform(), n=8, count=8).sort().values
        tensor([1, 2, 3, 4, 5, 6, 7, 8])
    """
    if stratified:
        k, rank = draw_ranked(lengths, n, count, device=device, generator=generator)
        return k.gather(0, rank)
    return _draw(lengths, n, count, torch.device(device), generator, in_order=False)


def draw_ranked(
    lengths: Lengths,
    n: int,
    count: int,
    *,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Stratified draws in increasing order, and the rank of each sample: `k[rank]` is `draw`.

    The entry i comes from u_i = (i + v_i) / count, so at most ceil(count * P(K >= j)) entries, the
    last ones, are at least j: a number that is known before drawing.
    """
    k = _draw(lengths, n, count, torch.device(device), generator, in_order=True)
    return k, torch.randperm(count, device=k.device, **_from(generator))


def probability_above(lengths: Lengths, n: int, k: int) -> float:
    """P(K > k), as a number: also while compiling, for the lengths of this module."""
    if isinstance(lengths, _IMMUTABLE):
        return lengths.above(n, k)
    return float(lengths.pmf(n)[k + 1 :].sum())


def _draw(
    lengths: Lengths,
    n: int,
    count: int,
    device: torch.device,
    generator: torch.Generator | None,
    in_order: bool,
) -> Tensor:
    if n == 0:
        return torch.zeros(count, dtype=torch.int64, device=device)
    if device.type == "mps":  # has no float64
        return _draw(lengths, n, count, torch.device("cpu"), generator, in_order).to(device)
    u = torch.rand(count, dtype=torch.float64, device=device, **_from(generator))
    if in_order:
        stratum = torch.arange(count, dtype=torch.float64, device=device)
        u = u.add_(stratum).div_(max(count, 1))
    # The table is kept between calls only where it is a plain tensor for sure: not while tracing
    # (also under a fake-tensor mode), nor for the user's own lengths, which may change.
    if type(u) is Tensor and not torch.compiler.is_compiling() and isinstance(lengths, _IMMUTABLE):
        cdf = _cached_cdf(lengths, n, device)
    else:
        cdf = _cdf(lengths, n, device)
    return torch.searchsorted(cdf, u, right=True)


def _from(generator: torch.Generator | None) -> dict[str, Any]:
    """Named only where given: the overloads with a generator refuse symbolic sizes."""
    return {} if generator is None else {"generator": generator}


def _cdf(lengths: Lengths, n: int, device: torch.device) -> Tensor:
    pmf = lengths.pmf(n)
    if pmf.shape != (n + 1,) or pmf.dtype != torch.float64:
        raise ValueError(
            f"pmf(n) must return n + 1 = {n + 1} float64 numbers, got shape {tuple(pmf.shape)} "
            f"and dtype {pmf.dtype} from {lengths}"
        )
    cdf = pmf.to(device).cumsum(0)
    # Whatever the sum's rounding, and a uniform's to 1.0: no draw is above the last possible k.
    return torch.where(cdf < cdf[-1], cdf / cdf[-1], math.inf)


_cached_cdf = lru_cache(maxsize=32)(torch.no_grad()(_cdf))
_IMMUTABLE = (Exponential, Uniform, Sizes)
