"""Distributions of k.

A distribution of lengths is its pmf: any object with a method `pmf(n)` that returns
P(K = 0), ..., P(K = n) as n + 1 float64 numbers. Three are here; `taildropout.draws` samples from
them, or from your own.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor


class Lengths(Protocol):
    """What every distribution of lengths answers; bring your own by writing this one method.

    A second one, `above(n, k)`, is used where there is one: P(K > k) as a float, by a formula.
    TailMLP, which otherwise sums the pmf, can only be compiled with such lengths.
    """

    def pmf(self, n: int) -> Tensor:
        """P(K = k) for k = 0, ..., n: float64, shape `(n + 1,)`, summing to 1."""
        ...


@dataclass(frozen=True)
class Exponential:
    """Censored exponential lengths (geometric, since k is an integer): the default.

    P(K >= j) = r^j for j = 1, ..., n, so each further feature is a constant factor less likely
    to be kept, and all n are kept with probability r^n. r is solved for each n such that the
    expected fraction of dropped features, E[1 - K/n], is exactly `p`.

    Args:
        p: expected fraction of features dropped, in [0, 1]. 0 keeps everything, 1 drops everything.
        min_k: features that are always kept; the geometric part then starts behind them, and
            `p` is still the expected fraction of all n.

    Raises:
        ValueError: `p` is outside [0, 1] or NaN, `min_k` is negative; from `pmf`, if keeping
            `min_k` of n features cannot drop a fraction `p`.

    Example:
        >>> pmf = Exponential(p=0.5).pmf(2)
        >>> pmf
        tensor([0.3820, 0.2361, 0.3820], dtype=torch.float64)
        >>> float((pmf * torch.tensor([1, 0.5, 0])).sum())  # the expected dropped fraction
        0.5
    """

    p: float = 0.5
    min_k: int = 0

    def __post_init__(self) -> None:
        # While compiling, p may be a tensor, whose value is then no part of what is compiled.
        if not (isinstance(self.p, Tensor) and torch.compiler.is_compiling()):
            object.__setattr__(self, "p", check_p(self.p))
        object.__setattr__(self, "min_k", _check_size(self.min_k, "min_k"))

    def pmf(self, n: int) -> Tensor:
        p = torch.as_tensor(self.p, dtype=torch.float64, device="cpu")
        m = n - self.min_k  # the features that may be dropped
        if m == 0 or m < 0 or not isinstance(self.p, Tensor):
            _check_reachable(self, n)
        always = p.new_zeros(self.min_k)
        if m == 0:
            return torch.cat([always, p.new_ones(1)])
        rate = _decay_rate_op((p * (n / m)).clamp(max=1.0), m)
        j = torch.arange(m, dtype=torch.float64, device="cpu")
        return torch.cat(
            [always, torch.exp(-rate * j) * -torch.expm1(-rate), torch.exp(-rate * m).reshape(1)]
        )

    def above(self, n: int, k: int) -> float:
        """P(K > k)."""
        _check_reachable(self, n)
        if k < self.min_k or k >= n:
            return float(k < self.min_k)
        m = n - self.min_k
        # The compiler traces through the cache, and warns that it does.
        decay_rate = _decay_rate.__wrapped__ if torch.compiler.is_compiling() else _decay_rate
        return math.exp(-decay_rate(min(self.p * (n / m), 1.0), m) * (k + 1 - self.min_k))


@dataclass(frozen=True)
class Uniform:
    """Every k from `min_k` to n is equally likely: the strongest pull towards an order.

    Args:
        min_k: the smallest k.

    Raises:
        ValueError: `min_k` is negative; from `pmf`, if it is above n.

    Example:
        >>> Uniform().pmf(4)
        tensor([0.0000, 0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """

    min_k: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "min_k", _check_size(self.min_k, "min_k"))

    def pmf(self, n: int) -> Tensor:
        if n < self.min_k:
            raise ValueError(f"min_k must be at most the number of features, got {self} for n={n}")
        count = n + 1 - self.min_k
        return torch.cat(
            [
                torch.zeros(self.min_k, dtype=torch.float64, device="cpu"),
                torch.full((count,), 1 / count, dtype=torch.float64, device="cpu"),
            ]
        )

    def above(self, n: int, k: int) -> float:
        """P(K > k)."""
        return min((n - k) / (n + 1 - self.min_k), 1.0)


@dataclass(frozen=True)
class Sizes:
    """A few fixed sizes, as in Matryoshka training (Kusupati et al. 2022, arXiv 2205.13147).

    Args:
        sizes: the values that k takes.
        weights: their probabilities, up to a common factor. None: all equal.

    Raises:
        ValueError: no sizes, a negative size, weights that are not one finite non-negative number
            per size or are all zero; from `pmf`, if a size is above n.

    Example:
        >>> Sizes([1, 3], weights=[1, 3]).pmf(4)
        tensor([0.0000, 0.2500, 0.0000, 0.7500, 0.0000], dtype=torch.float64)
    """

    sizes: Sequence[int]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        sizes = tuple(_check_size(size, "a size") for size in self.sizes)
        if not sizes:
            raise ValueError("sizes must name at least one k, got none")
        object.__setattr__(self, "sizes", sizes)
        if self.weights is None:
            return
        weights = tuple(float(weight) for weight in self.weights)
        valid = all(weight >= 0 and math.isfinite(weight) for weight in weights)
        if len(weights) != len(sizes) or not valid or sum(weights) == 0:
            raise ValueError(
                "weights must be one finite number >= 0 for each size, not all of them 0, "
                f"got weights={weights} for sizes={sizes}"
            )
        object.__setattr__(self, "weights", weights)

    def pmf(self, n: int) -> Tensor:
        if max(self.sizes) > n:
            raise ValueError(f"sizes must be at most the number of features, got {self} for n={n}")
        weights = self.weights or (1.0,) * len(self.sizes)
        weight = torch.tensor(weights, dtype=torch.float64, device="cpu")
        size = torch.tensor(self.sizes, dtype=torch.int64, device="cpu")
        return torch.zeros(n + 1, dtype=torch.float64, device="cpu").index_add(
            0, size, weight / weight.sum()
        )

    def above(self, n: int, k: int) -> float:
        """P(K > k)."""
        weights = self.weights or (1.0,) * len(self.sizes)
        larger = [w for size, w in zip(self.sizes, weights, strict=True) if size > k]
        return sum(larger) / sum(weights)


def check_lengths(lengths: Lengths) -> Lengths:
    if isinstance(lengths, type) or not hasattr(lengths, "pmf"):
        raise TypeError(f"lengths must have a pmf(n), as lengths.Uniform() has, got {lengths!r}")
    return lengths


def lengths_or_exponential(lengths: Lengths | None, p: float | Tensor) -> Lengths:
    """The lengths, checked; None: the default ones of this p."""
    return Exponential(p) if lengths is None else check_lengths(lengths)  # type: ignore[arg-type]


_NEWTON_STEPS = 3


@lru_cache(maxsize=1024)
def _decay_rate(p: float, n: int) -> float:
    """The a >= 0 for which r = exp(-a) has (1/n) sum_{j=1..n} r^j = 1 - p.

    With z = 1/r - 1 the sum is (1 - (1+z)^-n) / (n z), so the equation reads H(z) = p / (1 - p)
    for H(z) = n z / (1 - (1+z)^-n) - 1. H is convex and increasing, close to (n+1) z / 2 for
    small z and to n z - 1 for large z. Both are lower bounds, so the smaller of their solutions
    lies above the root and Newton's steps fall towards it, quadratically: two are off by up to
    5e-6 in E[1 - K/n], three by less than 1e-11.
    Where p is so small that H would cancel, the first three terms of the inverse power series
    of p(z) = m1 z - m2 z^2 + m3 z^3 - ... are exact to p^3.
    """
    if p == 1:
        return 1000.0  # exp(-1000) is 0 in float64
    if p < 1e-4:
        m1, m2, m3 = (n + 1) / 2, (n + 1) * (n + 2) / 6, (n + 1) * (n + 2) * (n + 3) / 24
        z = p / m1 * (1 + p * (m2 / m1**2 + p * (2 * m2**2 / m1 - m3) / m1**3))
        return math.log1p(z)
    odds = p / (1 - p)
    z = min(odds * 2 / (n + 1), (odds + 1) / n)
    for _ in range(_NEWTON_STEPS):
        kept = -math.expm1(-n * math.log1p(z))  # 1 - (1+z)^-n
        excess = n * z / kept - 1 - odds
        slope = n / kept * (1 - n * z * math.exp(-(n + 1) * math.log1p(z)) / kept)
        z -= excess / slope
    return math.log1p(z)


@torch.library.custom_op("taildropout::decay_rate", mutates_args=())
def _decay_rate_op(p: Tensor, n: int) -> Tensor:
    """`_decay_rate` as one opaque step of a compiled graph, with p as an input, not a constant."""
    return torch.tensor(_decay_rate(p.item(), n), dtype=torch.float64)


@_decay_rate_op.register_fake
def _(p: Tensor, n: int) -> Tensor:
    return torch.empty((), dtype=torch.float64)


def check_p(p: float) -> float:
    try:
        value = float(p)
    except (TypeError, ValueError):
        raise TypeError(f"p must be a number in [0, 1], got {p!r}") from None
    if not 0 <= value <= 1:
        raise ValueError(
            f"p is the expected fraction of features dropped and must be in [0, 1], got {p!r}"
        )
    return value


def _check_size(size: int, name: str) -> int:
    try:
        value = operator.index(size)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {size!r}") from None
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return value


def _check_reachable(lengths: Exponential, n: int) -> None:
    if n < lengths.min_k:
        raise ValueError(f"min_k must be at most the number of features, got {lengths} for n={n}")
    largest = 1 - lengths.min_k / n if n else 1.0
    if lengths.p > largest + 1e-12:
        raise ValueError(
            f"p must be at most 1 - min_k/n = {largest:g}, since min_k features are never "
            f"dropped, got {lengths} for n={n}"
        )
