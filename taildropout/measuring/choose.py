"""From a Scree to a k.

All ks are measured on the same samples, so two of them are compared sample by sample: the
difference of their losses has a far smaller standard error than either loss.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ..models.width import Choice, ChosenWidth

_SIMULATIONS = 20_000
_AT_ONCE = 2**16  # errors, which fit the cache of a CPU


class Curve(Protocol):
    """What is read of a `Scree`."""

    @property
    def layer(self) -> str: ...
    @property
    def features(self) -> str: ...
    @property
    def ks(self) -> Sequence[float]: ...
    @property
    def loss(self) -> Tensor: ...
    @property
    def stderr(self) -> Tensor: ...
    @property
    def count(self) -> int: ...
    @property
    def cov(self) -> Tensor: ...


def choose(scree: Curve, tolerance: float = 0.01, confidence: float = 0.95) -> Choice | ChosenWidth:
    """The smallest k that surely loses at most a fraction `tolerance` against the full width.

    With L_k the expected loss at k, n the largest measured k, and d_k = L_k - L_n, it is the
    smallest k for which the upper confidence bound of d_k - tolerance * |L_n| is at most 0, and
    for which this holds at every larger measured k too. The bounds are one-sided and hold
    simultaneously for all ks: their common factor is the `confidence` quantile of the maximum
    over k of the studentised errors, simulated as a multivariate t with count - 1 degrees of
    freedom and the measured covariance. So with probability `confidence` no k that is worse
    than the tolerance is chosen. Where nothing smaller can be vouched for, the answer is n.

    Args:
        scree: a measurement on held-out data that includes k = n.
        tolerance: accepted increase of the loss, as a fraction of |L_n|.
        confidence: probability that the choice keeps the tolerance, in (0, 1).

    Returns:
        The k, an int that also carries the name of its layer: `prune`, `plan_pruning` and
        `at_width` take it for a model with several layers too. Of several layers that were
        measured together the width, a float.

    Raises:
        ValueError: one sample, losses that are NaN or infinite, a negative tolerance, a
            confidence outside (0, 1).

    Source: simultaneous bounds by the maximum of studentised errors: Hothorn, Bretz and Westfall,
    Simultaneous Inference in General Parametric Models, Biometrical Journal 50 (2008).

    Example:
        >>> from taildropout import Scree
        >>> losses = torch.tensor([4.0, 2.0, 1.001, 1.0], dtype=torch.float64)
        >>> s = Scree("1", [0, 1, 2, 3], losses, count=100, cov=0.01 * torch.eye(4).double())
        >>> choose(s, tolerance=0.1)
        2
    """
    _check(scree, tolerance, confidence)
    return _smallest(scree, _Errors.simulated(scree).bounds(tolerance, confidence))


def differences(scree: Curve, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """How much more each k loses than the largest, and at most so: float64, `(len(ks),)` each.

    The upper bounds are those of `choose`: they hold simultaneously for all ks. Errors as there.

    Example:
        >>> from taildropout import Scree
        >>> losses = torch.tensor([4.0, 1.0], dtype=torch.float64)
        >>> s = Scree("1", [0, 1], losses, count=100, cov=0.01 * torch.eye(2).double())
        >>> [round(float(numbers[0]), 2) for numbers in differences(s)]
        [3.0, 3.02]
    """
    _check(scree, 0.0, confidence)
    bounds = _Errors.simulated(scree).bounds(0.0, confidence)
    of_largest = torch.zeros(1, dtype=torch.float64)
    upper = bounds.excess + bounds.factor * bounds.stderr
    return torch.cat([bounds.excess, of_largest]), torch.cat([upper, of_largest])


def explain(scree: Curve, tolerance: float = 0.01, confidence: float = 0.95) -> str:
    """What `choose` answers and why, and what it would take to go one k further down.

    Args and errors as in `choose`. The number of samples is what would do if the measured losses
    and variances stayed as they are.

    Example:
        >>> from taildropout import Scree
        >>> losses = torch.tensor([4.0, 2.0, 1.08, 1.0], dtype=torch.float64)
        >>> s = Scree("1", [0, 1, 2, 3], losses, count=100, cov=0.1 * torch.eye(4).double())
        >>> print(explain(s, tolerance=0.1))
        k = 3 of 3: nothing smaller can be vouched for with 95% confidence from 100 samples.
        k = 2 measures +8.0%, but may be up to +17.8% where +10.0% is allowed: it would take about 2,400 samples or a tolerance of 19%.
    """
    _check(scree, tolerance, confidence)
    errors = _Errors.simulated(scree)
    bounds = errors.bounds(tolerance, confidence)
    chosen, full = _smallest(scree, bounds), float(scree.loss[-1])
    i, n = scree.ks.index(chosen), scree.ks[-1]
    samples = f"with {100 * confidence:.6g}% confidence from {scree.count:,} samples"
    allowed = _relative(tolerance * abs(full), full)
    k = "k" if isinstance(n, int) else "width"
    if chosen == n:
        text = f"{k} = {n} of {n}: nothing smaller can be vouched for {samples}."
    else:
        rise = _relative(float(scree.loss[i]) - full, full)
        text = f"{k} = {chosen} of {n}: {rise} against {k} = {n}, and at most {allowed} {samples}."
    if i == 0:
        return text
    excess, margin = float(bounds.excess[i - 1]), bounds.factor * float(bounds.stderr[i - 1])
    measured = float(scree.loss[i - 1]) - full
    text += f"\n{k} = {scree.ks[i - 1]} measures {_relative(measured, full)}"
    advice = []
    if excess < 0:
        bound = _relative(measured + margin, full)
        text += f", but may be up to {bound} where {allowed} is allowed"
        needed = _two_digits(scree.count * (margin / excess) ** 2)
        advice.append(f"about {needed:,} samples")
    else:
        text += f", where {allowed} is allowed"
    sufficient = _sufficient_tolerance(errors, confidence, measured, chosen)
    if sufficient is not None:
        advice.append(f"a tolerance of {sufficient}%")
    return text + (f": it would take {' or '.join(advice)}." if advice else ".")


def _sufficient_tolerance(
    errors: "_Errors", confidence: float, measured: float, chosen: float
) -> int | None:
    """The smallest whole percent at which a smaller k is chosen, up to three times the loss."""
    full = abs(float(errors.scree.loss[-1]))
    if full == 0:
        return None

    def suffices(percent: int) -> bool:
        return _smallest(errors.scree, errors.bounds(percent / 100, confidence)) < chosen

    # Bounds fall as the tolerance grows, unless even the sign of L_n is uncertain.
    percents = range(max(math.ceil(100 * measured / full), 0), 301)
    first = bisect_left(percents, True, key=suffices)
    return percents[first] if first < len(percents) else None


def _relative(difference: float, full: float) -> str:
    return f"{difference:+.3g}" if full == 0 else f"{difference / abs(full):+.1%}"


def _two_digits(number: float) -> int:
    """Rounded up."""
    unit: int = 10 ** max(0, math.floor(math.log10(max(number, 1))) - 1)
    return int(math.ceil(number / unit) * unit)


@dataclass(frozen=True)
class _Bounds:
    """Of the contrasts d_k - tolerance * |L_n| for all k below the largest: `(len(ks) - 1,)`."""

    excess: Tensor
    stderr: Tensor
    factor: float  # the bound is excess + factor * stderr


@dataclass(frozen=True, eq=False)
class _Errors:
    """What the differences d_k of all k below n, and L_n, may be off by.

    Simulated once, for all tolerances: a contrast is off by what d_k is off by, less its part of
    what L_n is off by.
    """

    scree: Curve
    cov: Tensor  # of (d_0, ..., L_n): `(len(ks), len(ks))`
    draws: Tensor  # of their errors, multivariate t: `(simulations, len(ks))`

    @classmethod
    def simulated(cls, scree: Curve) -> "_Errors":
        cov = scree.cov.double() / scree.count
        cov = torch.cat([cov[:-1] - cov[-1:], cov[-1:]])
        cov = torch.cat([cov[:, :-1] - cov[:, -1:], cov[:, -1:]], 1)
        uncertain = cov.diagonal() > 0  # not NaN, for which nothing is vouched anyway
        scale = cov.diagonal()[uncertain].sqrt()
        correlation = cov[uncertain][:, uncertain] / scale.outer(scale)
        values, vectors = torch.linalg.eigh(correlation)
        root = torch.zeros(len(cov), len(scale), dtype=torch.float64)
        root[uncertain] = scale[:, None] * vectors * values.clamp(min=0).sqrt()
        degrees = torch.tensor(scree.count - 1, dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the same question has the same answer
            normal = torch.randn(_SIMULATIONS, len(scale), dtype=torch.float64)
            chi_square = torch.distributions.Chi2(degrees).sample((_SIMULATIONS, 1))
        return cls(scree, cov, normal @ root.T / (chi_square / degrees).sqrt())

    def bounds(self, tolerance: float, confidence: float) -> _Bounds:
        full = self.scree.loss[-1].double()
        part = tolerance * full.sign()  # of L_n that is allowed, with its sign
        variance = self.cov.diagonal()[:-1] - 2 * part * self.cov[:-1, -1]
        stderr = (variance + part.square() * self.cov[-1, -1]).clamp(min=0).sqrt()
        excess = self.scree.loss[:-1].double() - (1 + part) * full
        return _Bounds(excess, stderr, self._quantile_of_maximum(part, stderr, confidence))

    def _quantile_of_maximum(self, part: Tensor, stderr: Tensor, confidence: float) -> float:
        """The `confidence` quantile of max_k t_k, t the studentised errors: a multivariate t."""
        uncertain = stderr > 0
        if not uncertain.any():
            return 0.0
        largest = [
            ((draws[:, :-1] - part * draws[:, -1:])[:, uncertain] / stderr[uncertain]).amax(1)
            for draws in self.draws.split(max(1, _AT_ONCE // self.draws.shape[1]))
        ]
        return float(torch.cat(largest).quantile(confidence))


def _smallest(scree: Curve, bounds: _Bounds) -> Choice | ChosenWidth:
    upper = (bounds.excess + bounds.factor * bounds.stderr).tolist()
    smallest = scree.ks[-1]
    for k, bound in zip(reversed(scree.ks[:-1]), reversed(upper), strict=True):
        if not bound <= 0:
            break
        smallest = k
    return _chosen(scree, smallest)


def _chosen(scree: Curve, k: float) -> Choice | ChosenWidth:
    if isinstance(k, int):
        return Choice(k, scree.layer, scree.features)
    return ChosenWidth(k, scree.layer, scree.features)


def one_standard_error(scree: Curve) -> Choice | ChosenWidth:
    """The smallest k whose loss is within one standard error of the smallest loss.

    The rule of Breiman, Friedman, Olshen and Stone, Classification and Regression Trees (1984),
    with the standard error of the smallest loss itself. It states no confidence.

    Raises:
        ValueError: one sample, losses that are NaN or infinite.

    Example:
        >>> from taildropout import Scree
        >>> losses = torch.tensor([4.0, 1.05, 1.1, 1.0], dtype=torch.float64)
        >>> s = Scree("1", [0, 1, 2, 3], losses, count=100, cov=torch.eye(4).double())
        >>> one_standard_error(s)
        1
    """
    _check_finite(scree)
    if scree.count < 2:
        raise ValueError("a standard error needs at least two samples, got one")
    best = int(scree.loss.argmin())
    limit = scree.loss[best] + scree.stderr[best]
    return _chosen(scree, scree.ks[int((scree.loss <= limit).nonzero()[0])])


def knee(scree: Curve) -> Choice | ChosenWidth | None:
    """The k where the curve bends most; None where it does not bend.

    Kneedle with sensitivity 1 for a convex, decreasing curve: after scaling both axes to [0, 1],
    a k at which the curve lies farthest below the line from its start to its end, if it comes
    back towards the line behind it by more than the mean step of k.

    Raises:
        ValueError: losses that are NaN or infinite.

    Source: Satopää, Albrecht, Irwin and Raghavan, Finding a "Kneedle" in a Haystack (2011).

    Example:
        >>> from taildropout import Scree
        >>> losses = torch.tensor([8.0, 2.0, 1.5, 1.2, 1.0], dtype=torch.float64)
        >>> knee(Scree("1", [0, 1, 2, 3, 4], losses, count=9, cov=torch.eye(5).double()))
        1
    """
    _check_finite(scree)
    ks = torch.tensor(scree.ks, dtype=torch.float64)
    if scree.loss.max() == scree.loss.min():
        return None
    x = (ks - ks[0]) / (ks[-1] - ks[0])
    y = (scree.loss.max() - scree.loss) / (scree.loss.max() - scree.loss.min())
    gain = (y - x).tolist()
    candidate: int | None = None
    threshold = 0.0
    for i, (here, after) in enumerate(pairwise(gain)):
        before = gain[max(i - 1, 0)]
        if here >= before and here >= after:
            candidate, threshold = i, here - float(x.diff().mean())
        if here <= before and here <= after:
            candidate = None
        if candidate is not None and after < threshold:
            return _chosen(scree, scree.ks[candidate])
    return None


def _check(scree: Curve, tolerance: float, confidence: float) -> None:
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    _check_finite(scree)
    if scree.count < 2:
        raise ValueError("choose needs at least two samples, to know how sure it can be, got one")


def _check_finite(scree: Curve) -> None:
    bad = [k for k, loss in zip(scree.ks, scree.loss.isfinite().tolist(), strict=True) if not loss]
    if bad or not scree.cov.nan_to_num(nan=0.0).isfinite().all():
        raise ValueError(f"losses must be finite, got NaN or infinity at k = {bad}")
