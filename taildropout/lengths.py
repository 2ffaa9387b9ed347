"""Distributions of k.

A distribution of lengths is its pmf: any object with a method `pmf(n)` that returns
P(K = 0), ..., P(K = n) as n + 1 float64 numbers. Some are here; `taildropout.draws` samples from
them, or from your own.

A size is an int, which counts features, or a float in (0, 1], which is a fraction of n: so one
distribution serves layers of any n. 1 is one feature, 1.0 are all.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Protocol

import torch
from torch import Tensor

Size = int | float


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
        min_k: size that is always kept; the geometric part then starts behind it, and `p` is
            still the expected fraction of all n.

    Raises:
        ValueError: `p` is outside [0, 1] or NaN, `min_k` is negative; from `pmf`, if keeping `min_k` of n features cannot drop a fraction `p`.

    Example:
        >>> pmf = Exponential(p=0.5).pmf(2)
        >>> pmf
        tensor([0.3820, 0.2361, 0.3820], dtype=torch.float64)
        >>> float((pmf * torch.tensor([1, 0.5, 0])).sum())  # the expected dropped fraction
        0.5
    """

    p: float = 0.5
    min_k: Size = 0

    def __post_init__(self) -> None:
        # While compiling, p may be a tensor, whose value is then no part of what is compiled.
        if not (isinstance(self.p, Tensor) and torch.compiler.is_compiling()):
            object.__setattr__(self, "p", check_p(self.p))
        object.__setattr__(self, "min_k", _check_size(self.min_k, "min_k"))

    def pmf(self, n: int) -> Tensor:
        p = torch.as_tensor(self.p, dtype=torch.float64, device="cpu")
        min_k = size_of(self.min_k, n)
        m = n - min_k  # the features that may be dropped
        if m == 0 or m < 0 or not isinstance(self.p, Tensor):
            _check_reachable(self, n)
        always = p.new_zeros(min_k)
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
        min_k = size_of(self.min_k, n)
        if k < min_k or k >= n:
            return float(k < min_k)
        m = n - min_k
        # The compiler traces through the cache, and warns that it does.
        decay_rate = _decay_rate.__wrapped__ if torch.compiler.is_compiling() else _decay_rate
        return math.exp(-decay_rate(min(self.p * (n / m), 1.0), m) * (k + 1 - min_k))


@dataclass(frozen=True)
class Uniform:
    """Every k from `min_k` to n is equally likely: the strongest pull towards an order.

    Args:
        min_k: the smallest size.

    Raises:
        ValueError: `min_k` is negative; from `pmf`, if it is above n.
        TypeError: `min_k` is neither an int nor a fraction in (0, 1].

    Example:
        >>> Uniform().pmf(4)
        tensor([0.0000, 0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """

    min_k: Size = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "min_k", _check_size(self.min_k, "min_k"))

    def pmf(self, n: int) -> Tensor:
        min_k = _smallest(self.min_k, n, self)
        count = n + 1 - min_k
        return torch.cat(
            [
                torch.zeros(min_k, dtype=torch.float64, device="cpu"),
                torch.full((count,), 1 / count, dtype=torch.float64, device="cpu"),
            ]
        )

    def above(self, n: int, k: int) -> float:
        """P(K > k)."""
        return min((n - k) / (n + 1 - size_of(self.min_k, n)), 1.0)


@dataclass(frozen=True)
class LogUniform:
    """P(K = k) is proportional to 1/k from `min_k` to n: as much training for every doubling of k.

    The small sizes, which lose the most when they are trained seldom, get the largest share.

    Args:
        min_k: the smallest size, at least 1.

    Raises:
        ValueError: `min_k` is below 1; from `pmf`, if it is above n.
        TypeError: `min_k` is neither an int nor a fraction in (0, 1].

    Example:
        >>> pmf = LogUniform().pmf(4)
        >>> (pmf / pmf[4]).round()  # 1/1, 1/2, 1/3 and 1/4, over 1/4
        tensor([0., 4., 2., 1., 1.], dtype=torch.float64)
    """

    min_k: Size = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "min_k", _check_size(self.min_k, "min_k"))
        if self.min_k == 0:
            raise ValueError("min_k must be at least 1, since P(K = k) ~ 1/k has no k = 0, got 0")

    def pmf(self, n: int) -> Tensor:
        min_k = _smallest(self.min_k, n, self)
        weight = 1 / torch.arange(min_k, n + 1, dtype=torch.float64, device="cpu")
        zeros = torch.zeros(min_k, dtype=torch.float64, device="cpu")
        return torch.cat([zeros, weight / weight.sum()])

    def above(self, n: int, k: int) -> float:
        """P(K > k)."""
        below = size_of(self.min_k, n) - 1
        return (_harmonic(n) - _harmonic(max(k, below))) / (_harmonic(n) - _harmonic(below))


@dataclass(frozen=True)
class Sizes:
    """A few fixed sizes, as in Matryoshka training (Kusupati et al. 2022, arXiv 2205.13147).

    Args:
        sizes: the values that k takes.
        weights: their probabilities, up to a common factor. None: all equal.

    Raises:
        ValueError: no sizes, a negative size, weights that are not one finite non-negative number
            per size or are all zero; from `pmf`, if a size is above n.
        TypeError: a size that is neither an int nor a fraction in (0, 1].

    Example:
        >>> Sizes([1, 3], weights=[1, 3]).pmf(4)
        tensor([0.0000, 0.2500, 0.0000, 0.7500, 0.0000], dtype=torch.float64)
        >>> Sizes([0.5, 1.0]).pmf(4)
        tensor([0.0000, 0.0000, 0.5000, 0.0000, 0.5000], dtype=torch.float64)
    """

    sizes: Sequence[Size]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        sizes = tuple(_check_size(size, "a size") for size in self.sizes)
        if not sizes:
            raise ValueError("sizes must name at least one k, got none")
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "weights", _check_weights(self.weights, "size", sizes))

    def pmf(self, n: int) -> Tensor:
        sizes = [size_of(size, n) for size in self.sizes]
        if max(sizes) > n:
            raise ValueError(f"sizes must be at most the number of features, got {self} for n={n}")
        weight = torch.tensor(_shares(self.weights, sizes), dtype=torch.float64, device="cpu")
        size = torch.tensor(sizes, dtype=torch.int64, device="cpu")
        return torch.zeros(n + 1, dtype=torch.float64, device="cpu").index_add(0, size, weight)

    def above(self, n: int, k: int) -> float:
        """P(K > k)."""
        shares = _shares(self.weights, self.sizes)
        above = [s for size, s in zip(self.sizes, shares, strict=True) if size_of(size, n) > k]
        return sum(above)


@dataclass(frozen=True)
class Full:
    """Always all n features: a part of a mixture.

    Example:
        >>> Full().pmf(2)
        tensor([0., 0., 1.], dtype=torch.float64)
    """

    def pmf(self, n: int) -> Tensor:
        zeros = torch.zeros(n, dtype=torch.float64, device="cpu")
        return torch.cat([zeros, torch.ones(1, dtype=torch.float64, device="cpu")])

    def above(self, n: int, k: int) -> float:
        """P(K > k)."""
        return float(k < n)


@dataclass(frozen=True)
class Mixed:
    """A mixture: each sample draws from one of several distributions of lengths.

    With a share of `Full` the whole network loses nothing, or little, by learning an order.

    Args:
        parts: the distributions.
        weights: their probabilities, up to a common factor. None: all equal.

    Raises:
        ValueError: no parts, weights that are not one finite non-negative number per part or are
            all zero; from `pmf`, what the parts raise.
        TypeError: a part without a pmf.

    Example:
        >>> Mixed([Full(), Uniform()], weights=[0.2, 0.8]).pmf(4)
        tensor([0.0000, 0.2000, 0.2000, 0.2000, 0.4000], dtype=torch.float64)
    """

    parts: Sequence[Lengths]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        parts = tuple(check_lengths(part) for part in self.parts)
        if not parts:
            raise ValueError("parts must name at least one distribution of lengths, got none")
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "weights", _check_weights(self.weights, "part", parts))

    def pmf(self, n: int) -> Tensor:
        shares = _shares(self.weights, self.parts)
        pmfs = [share * part.pmf(n) for share, part in zip(shares, self.parts, strict=True)]
        return torch.stack(pmfs).sum(0)

    def above(self, n: int, k: int) -> float:
        """P(K > k)."""
        shares = _shares(self.weights, self.parts)
        parts = zip(shares, self.parts, strict=True)
        return sum([share * probability_above(part, n, k) for share, part in parts])


@dataclass(frozen=True)
class AtLeast:
    """Other lengths, none of them below `min_k`: what would be shorter has this size.

    Args:
        lengths: the others.
        min_k: the smallest size.

    Raises:
        ValueError: `min_k` is negative; from `pmf`, if it is above n, and what the others raise.
        TypeError: `min_k` is neither an int nor a fraction in (0, 1]; lengths without a pmf.

    Example:
        >>> AtLeast(Uniform(), min_k=0.5).pmf(4)
        tensor([0.0000, 0.0000, 0.5000, 0.2500, 0.2500], dtype=torch.float64)
    """

    lengths: Lengths
    min_k: Size

    def __post_init__(self) -> None:
        check_lengths(self.lengths)
        object.__setattr__(self, "min_k", _check_size(self.min_k, "min_k"))

    def pmf(self, n: int) -> Tensor:
        min_k, pmf = _smallest(self.min_k, n, self), self.lengths.pmf(n)
        return torch.cat(
            [torch.zeros_like(pmf[:min_k]), pmf[: min_k + 1].sum()[None], pmf[min_k + 1 :]]
        )

    def above(self, n: int, k: int) -> float:
        """P(K > k)."""
        return 1.0 if k < size_of(self.min_k, n) else probability_above(self.lengths, n, k)


@dataclass(frozen=True)
class InGroups:
    """K is a multiple of `group`: n features are n/group groups, of which `lengths` draws."""

    lengths: Lengths
    group: int

    def pmf(self, n: int) -> Tensor:
        of_groups = self.lengths.pmf(n // self.group)
        return torch.nn.functional.pad(of_groups[:, None], (0, self.group - 1)).flatten()[: n + 1]

    def above(self, n: int, k: int) -> float:
        """P(K > k)."""
        return probability_above(self.lengths, n // self.group, k // self.group)


def probability_above(lengths: Lengths, n: int, k: int) -> float:
    """P(K > k), as a number: also while compiling, where the lengths have a formula for it."""
    if hasattr(lengths, "above"):
        return float(lengths.above(n, k))
    return float(lengths.pmf(n)[k + 1 :].sum())


def size_of(size: Size, n: int) -> int:
    """How many of n features: a fraction is rounded up, though not by a rounding error."""
    return math.ceil(size * n - 1e-9 * n) if isinstance(size, float) else size


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


def _check_size(size: Size, name: str) -> Size:
    if isinstance(size, Real) and not isinstance(size, Integral) and 0 < size <= 1:
        return float(size)
    try:
        value = operator.index(size)  # type: ignore[arg-type]  # or no number at all
    except TypeError:
        raise TypeError(
            f"{name} must be an integer, or a fraction of the features in (0, 1], got {size!r}"
        ) from None
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return value


def _smallest(min_k: Size, n: int, lengths: Lengths) -> int:
    size = size_of(min_k, n)
    if size > n:
        raise ValueError(f"min_k must be at most the number of features, got {lengths} for n={n}")
    return size


def _check_weights(
    weights: Sequence[float] | None, of: str, parts: Sequence[object]
) -> tuple[float, ...] | None:
    if weights is None:
        return None
    weights = tuple(float(weight) for weight in weights)
    valid = all(weight >= 0 and math.isfinite(weight) for weight in weights)
    if len(weights) != len(parts) or not valid or sum(weights) == 0:
        raise ValueError(
            f"weights must be one finite number >= 0 for each {of}, not all of them 0, "
            f"got weights={weights} for {of}s={parts}"
        )
    return weights


def _shares(weights: Sequence[float] | None, parts: Sequence[object]) -> list[float]:
    """The weights, such that they sum to 1."""
    weights = [1.0] * len(parts) if weights is None else weights
    total = sum(weights)
    return [weight / total for weight in weights]


def _harmonic(n: int) -> float:
    """1 + 1/2 + ... + 1/n. From 30 on by its asymptotic series (Euler and Maclaurin), whose next
    term, 1/(132 n^10), is below 1e-16."""
    if n < 30:
        return sum([1 / j for j in range(n, 0, -1)])
    series = 1 / (2 * n) - 1 / (12 * n**2) + 1 / (120 * n**4) - 1 / (252 * n**6) + 1 / (240 * n**8)
    return math.log(n) + _EULER + series


_EULER = 0.57721566490153286


def _check_reachable(lengths: Exponential, n: int) -> None:
    min_k = _smallest(lengths.min_k, n, lengths)
    largest = 1 - min_k / n if n else 1.0
    if lengths.p > largest + 1e-12:
        raise ValueError(
            f"p must be at most 1 - min_k/n = {largest:g}, since min_k features are never "
            f"dropped, got {lengths} for n={n}"
        )
