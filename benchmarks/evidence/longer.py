"""Whether what one network for all widths gains lasts, when all train for longer."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from .report import Numbers, Settings, mean_text, table
from .widths import (
    BATCH,
    BUDGET,
    CLASSIFIER,
    KS,
    METHODS,
    RATES,
    WIDTH,
    Method,
    Task,
    fitted,
    scores,
    tasks,
    training_flops,
)

TITLE = "Does it last with longer training?"
SEEDS = 3
TIMES = {1: None, 3: None, 10: 1}  # of the first T, and how many of the seeds: None for all

DEDICATED = f"control: a network of width k, T each, {BUDGET} T in all"
NESTED = f"nested, the recipe, {BUDGET} T"
PLAIN = f"control: plain, {BUDGET} T"
DONE = f"""\
The classifier of the section before, with its recipe, but with more steps: T for each of the {BUDGET}
networks of width k, {BUDGET} T for the nested one and for the plain one of width {WIDTH}. The learning
rate of each network was chosen at the smallest T (of {" and ".join(f"{rate:g}" for rate in RATES)}, on
the 10,000 held-out images, with the first seed) and stays, since trying all of them at every T takes
too long; so does the largest T with more than one seed. 1,000 steps of {BATCH} images are 5 epochs of
the 50,000 images. Accuracy on the 10,000 test images in per cent, mean ± standard error over the
seeds; *plain* has all features but the first k set to zero. A *difference* is in points, paired by
seed. FLOPs are those of all matrix products of the training, two for each multiplication; the seconds
are of one processor."""


@dataclass
class Row:
    """Of a method: the rate of each network, the scores by k of each seed, what one seed took."""

    rates: list[float]
    scores: list[list[float]]
    seconds: float
    flops: int


def networks() -> dict[str, dict[str, Method]]:
    """Of each method those that are trained: one, or one for each k."""
    return {
        DEDICATED: {str(k): Method(width=k) for k in KS},
        NESTED: {NESTED: METHODS[NESTED]},
        PLAIN: {PLAIN: METHODS[PLAIN]},
    }


def measure(settings: Settings, seeds: list[int]) -> Numbers:
    """T -> method -> the fields of `Row`."""
    task = tasks(settings)[CLASSIFIER]
    times = list(TIMES.items())[:2] if settings.quick else list(TIMES.items())
    numbers: Numbers = {str(times_t * task.steps): {} for times_t, _ in times}
    for name, methods in networks().items():
        rates = {each: chosen(task, method, seeds[0]) for each, method in methods.items()}
        for times_t, count in times:
            longer = replace(task, steps=times_t * task.steps)
            row = trained(longer, list(methods.values()), list(rates.values()), seeds[:count])
            numbers[str(longer.steps)][name] = asdict(row)
    return numbers


def chosen(task: Task, method: Method, seed: int) -> float:
    def on_held_out(rate: float) -> float:
        return task.better(scores(task, fitted(task, method, rate, seed), task.valid))

    return max(RATES, key=on_held_out)


def trained(task: Task, methods: list[Method], rates: list[float], seeds: list[int]) -> Row:
    start = time.process_time()
    models = [
        [fitted(task, each, rate, seed) for each, rate in zip(methods, rates, strict=True)]
        for seed in seeds
    ]
    seconds = (time.process_time() - start) / len(seeds)
    found = [[score for m in of_seed for score in scores(task, m, task.test)] for of_seed in models]
    flops = sum(
        training_flops(task, model, task.steps * each.budget)
        for model, each in zip(models[0], methods, strict=True)
    )
    return Row(rates, found, seconds, flops)


def text(numbers: Numbers, settings: Settings) -> str:
    head = ["", "", *[f"k = {k}" for k in KS], "training FLOPs", "seconds"]
    cells = [
        [f"T = {int(t):,}{_of_seeds(rows)}", words, *_means(row["scores"]), *_costs(row)]
        for t, rows in numbers.items()
        for words, row in rows.items()
    ]
    gains = [
        [f"T = {int(t):,}{_of_seeds(rows)}", f"{what} - a network of width k", *_means(values)]
        for t, rows in numbers.items()
        for what, values in [
            ("nested", _differences(rows[NESTED], rows[DEDICATED])),
            ("plain", _differences(rows[PLAIN], rows[DEDICATED])),
        ]
    ]
    parts = [DONE, table(head, cells), "The differences:", table(head[:-2], gains)]
    return "\n\n".join([*parts, " ".join(_shown(numbers))])


def _of_seeds(rows: Numbers) -> str:
    count = len(rows[NESTED]["scores"])
    return f" ({count} seed{'s' if count > 1 else ''})"


def _means(by_seed: list[list[float]]) -> list[str]:
    return [mean_text(column, 2) for column in zip(*by_seed, strict=True)]


def _costs(row: Numbers) -> list[str]:
    return [f"{row['flops']:.1e}", f"{row['seconds']:.0f}"]


def _differences(row: Numbers, other: Numbers) -> list[list[float]]:
    """By k, of each seed."""
    return [
        [score - own for score, own in zip(scores, owns, strict=True)]
        for scores, owns in zip(row["scores"], other["scores"], strict=True)
    ]


def _shown(numbers: Numbers) -> Iterator[str]:
    """What became of the gain at each T, in words."""
    for t, rows in numbers.items():
        gains = _mean_by_k(_differences(rows[NESTED], rows[DEDICATED]))
        worse = [f"k = {k} (by {-gain:.2f})" for k, gain in zip(KS, gains, strict=True) if gain < 0]
        beside = rows[PLAIN]["scores"], rows[NESTED]["scores"]
        plain, nested = (statistics.fmean(scores[-1] for scores in each) for each in beside)
        yield (
            f"With T = {int(t):,} the nested network is {gains[0]:+.1f} points from a network of its "
            f"own at k = 1, and {min(gains[2:]):+.2f} to {max(gains[2:]):+.2f} from k = {KS[2]} on; it is "
            f"worse at {', '.join(worse) or 'no k'}. The plain network with the whole budget has "
            f"{plain:.2f} % at full width, the nested one {nested:.2f} %."
        )
    flops = {words: row["flops"] for words, row in rows.items()}
    yield (
        "At equal numbers of steps the nested network takes "
        f"{flops[NESTED] / flops[DEDICATED]:.2f} times the FLOPs of the six together, whose last layers "
        "are narrower."
    )


def _mean_by_k(by_seed: list[list[float]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*by_seed, strict=True)]
