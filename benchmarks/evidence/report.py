"""Numbers as text, and what the command line sets for all tables."""

import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from taildropout.measuring.cuts import Features

Numbers = dict[str, Any]  # as they go to JSON
Columns = Sequence[Sequence[float]]  # a row for each seed

# What `td.scree` keeps of a network whose curve is printed, to see what its order is worth.
CONTROLS: dict[Features, str] = {"random": "random features", "principal": "principal components"}


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    quick: bool = False
    rho: float = 0.7


def count_flops(call: Callable[[], object]) -> int:
    """Of all matrix products and convolutions in a call; in a backward pass too."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def listed(words: Iterable[object]) -> str:
    """`a, b and c`."""
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last


def wrapped(text: str) -> str:
    """Each paragraph in lines of at most 100 characters, as the page has it."""
    paragraphs = (textwrap.fill(part, 100, break_on_hyphens=False) for part in text.split("\n\n"))
    return "\n\n".join(paragraphs)


def median(columns: Iterable[Iterable[float]]) -> list[float]:
    """Of each column: the rows are seeds."""
    return [statistics.median(column) for column in zip(*columns, strict=True)]


def mean_text(values: Sequence[float], digits: int) -> str:
    """The mean, and its standard error where there is one: `0.812 ± 0.003`."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {standard_error(values):.{digits}f}"


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def differences(one: Columns, other: Columns) -> list[list[float]]:
    """Of two tables of equal shape, entry by entry: a list for each seed."""
    return [
        [value - subtracted for value, subtracted in zip(row, others, strict=True)]
        for row, others in zip(one, other, strict=True)
    ]


def means(by_seed: Columns, digits: int = 2) -> list[str]:
    """Of each column, with its standard error."""
    return [mean_text(column, digits) for column in zip(*by_seed, strict=True)]


def verdict(names: Sequence[str], gains: Columns) -> str:
    """Where a gain is more than two standard errors from zero (of one seed: its sign), in words."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "about the same": []}
    for name, column in zip(names, zip(*gains, strict=True), strict=True):
        mean, error = statistics.fmean(column), standard_error(column)
        clear = abs(mean) > 2 * (0 if math.isnan(error) else error)
        found["about the same" if not clear else "better" if mean > 0 else "worse"].append(name)
    return ", ".join(f"{word} at {listed(where)}" for word, where in found.items() if where)


def power(value: float) -> str:
    """Two digits and a power of ten where that is shorter: 0.12, 3e-07."""
    return f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}"


def percent(fraction: float) -> str:
    """Two significant digits at least: 88 %, 3.3 %, 0.0003 %, and less than that as a power."""
    value = 100 * fraction
    if abs(value) < 1e-4:
        return f"{value:.0e} %"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 4)}f} %"
