"""From uniform numbers to k: one inverse-CDF look-up, the same for all lengths."""

import math
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .lengths import Exponential, Full, Lengths, LogUniform, Uniform, probability_above


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
        >>> from taildropout.lengths import Uniform
        >>> _ = torch.manual_seed(0)
        >>> draw(Uniform(), n=8, count=8).sort().values
        tensor([1, 2, 3, 4, 5, 6, 7, 8])
    """
    uniforms = draw_uniforms(count, stratified=stratified, device=device, generator=generator)
    return uniforms.by_sample(inverse_cdf(lengths, n, uniforms))


@dataclass(eq=False, slots=True)
class Draw:
    """A uniform number for each sample, of which any lengths at any n make a k.

    A stratified draw stands in increasing order, the entry i in [i, i + 1) / count, and knows the
    rank of each sample. Independent numbers stand in the order of the samples, without a rank.
    Where samples have several rows each, that holds for the samples, and their numbers are
    repeated.
    """

    uniforms: Tensor  # (count,), float64
    rank: Tensor | None  # (count,), int64
    device: torch.device  # where the ks live
    times: int = 1  # rows per sample

    def by_sample(self, values: Tensor) -> Tensor:
        """What was made of the uniforms, in the order of the samples."""
        return values if self.rank is None else values.gather(0, self.rank)

    def most_above(self, lengths: Lengths, n: int, k: int) -> int:
        """How many rows of a stratified draw are above k at most."""
        return self.times * most_above(lengths, n, k, len(self.uniforms) // self.times)

    def repeated(self, times: int, *, adjacent: bool) -> "Draw":
        """A stratified draw for rows of which each sample has several, side by side or not."""
        assert self.rank is not None
        copies = torch.arange(times, device=self.rank.device)
        first = self.rank * times
        rank = first[:, None] + copies if adjacent else first + copies[:, None]
        uniforms = self.uniforms.repeat_interleave(times)
        return Draw(uniforms, rank.flatten(), self.device, times)

    def to(self, device: torch.device) -> "Draw":
        """The draw for samples on another device."""
        rank = None if self.rank is None else self.rank.to(device)
        return Draw(self.uniforms.to(_place(device)), rank, device, self.times)


def draw_uniforms(
    count: int,
    *,
    stratified: bool = True,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Draw:
    """A draw for `count` samples; the arguments are those of `draw`."""
    device = torch.device(device)
    place, options = _place(device), _from(generator)
    u = torch.rand(count, dtype=torch.float64, device=place, **options)
    if not stratified:
        return Draw(u, None, device)
    strata = _kept_strata if is_plain(u) and count <= _FEW else _strata
    first, size = strata(count, place)
    u = u.add_(first).div_(size)
    return Draw(u, torch.randperm(count, device=device, **options), device)


def _place(device: torch.device) -> torch.device:
    """Where the uniforms of samples on a device live: MPS has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


_FEW = 2**12


def _strata(count: int, device: torch.device) -> tuple[Tensor, Tensor | int]:
    """What is added to uniforms, and what they are divided by then, to have one in each stratum."""
    return torch.arange(count, dtype=torch.float64, device=device), max(count, 1)


@lru_cache(maxsize=32)
def _kept_strata(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first, size = _strata(count, device)
    return first, torch.tensor(size, dtype=torch.float64, device=device)  # as torch makes of it


def is_plain(u: Tensor) -> bool:
    """Whether what is made on its device can be kept between calls: not while tracing, also under a
    fake-tensor mode; and not in a CUDA graph, which fills it only when it is replayed."""
    return (
        not torch.compiler.is_compiling()
        and type(u) in (Tensor, nn.Parameter)
        and u.is_cpu
        and not torch._C._are_functorch_transforms_active()
    )


def inverse_cdf(lengths: Lengths, n: int, draw: Draw) -> Tensor:
    """The k in 0, ..., n of each of the draw's uniforms, in their order: `(count,)`, int64.

    A larger uniform never has a smaller k. No randomness is used: several layers may share a draw.
    """
    u = draw.uniforms
    if n == 0:
        return torch.zeros(len(u), dtype=torch.int64, device=draw.device)
    # A table is kept between calls only where it is a plain tensor for sure: not while tracing
    # (also under a fake-tensor mode); and only of lengths that can't change between calls.
    plain = type(u) is Tensor and not torch.compiler.is_compiling()
    if plain and (type(lengths) in _OF_NUMBERS or _hashes_by_value(lengths)):
        table = _cached_cdf(lengths, n, u.device)  # type: ignore[arg-type]  # it is hashable
    else:
        table = _cdf(lengths, n, u.device)
    k = torch.searchsorted(table, u, right=True)
    return k if draw.device == u.device else k.to(draw.device)


def most_above(lengths: Lengths, n: int, k: int, count: int) -> int:
    """How many of `count` stratified draws are above k at most: a number known before drawing.

    ceil(count * P(K > k)), since the entry i of a draw comes from a number below (i + 1) / count.
    The slack is for rounding, of that number to (i + 1) / count itself and of the table, a running
    sum of n + 1 terms: one too many costs little, one too few would be wrong.
    """
    slack = 1e-15 * (n + 10)
    return min(count, math.ceil(count * (probability_above(lengths, n, k) + slack)))


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


_OF_NUMBERS = {Exponential, Uniform, LogUniform, Full}  # which hash by value


def _hashes_by_value(x: Any) -> bool:
    """Whether x hashes by what it holds, and so do its parts: then it can't change unseen."""
    if type(x) in (int, float, str, type(None)):
        return True
    own_hash: Any = type(x).__hash__
    if own_hash in (None, object.__hash__, Tensor.__hash__):  # none, or by identity
        return False
    if isinstance(x, tuple):
        return all(map(_hashes_by_value, x))
    if is_dataclass(x):
        names = x.__dataclass_fields__.keys()
        if not getattr(x, "__dict__", {}).keys() <= names:  # of a subclass: more than is hashed
            return False
        return all(_hashes_by_value(getattr(x, name)) for name in names)
    return True
