"""Whether what one network for all widths gains lasts, when all train for longer."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from .report import Numbers, Settings, differences, means, table, verdict
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
The classifier of the tables above, with the same recipe, but with more steps: T for each of the {BUDGET}
networks of width k, {BUDGET} T for the nested one and for the plain one of width {WIDTH}. The learning
rate of each network is chosen at the smallest T (of {" and ".join(f"{rate:g}" for rate in RATES)}, on
the 10,000 held-out images, with the first seed) and kept at the others, for time; and for time the
largest T has one seed. 1,000 steps of {BATCH} images are 5 epochs of
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
    names = [f"k = {k}" for k in KS]
    head = ["", "", *names]
    cells: list[list[str]] = []
    gains: list[list[str]] = []
    for t, rows in numbers.items():
        when = f"T = {int(t):,}{_of_seeds(rows)}"
        for words, row in rows.items():
            cells.append([when, words, *means(row["scores"]), *_costs(row)])
        gains += [[when, words, *means(_gain(rows, words))] for words in (NESTED, PLAIN)]
    return "\n\n".join(
        [
            DONE,
            table([*head, "training FLOPs", "seconds"], cells),
            "The same, less the networks of width k, in points, paired by seed:",
            table(head, gains),
            " ".join([*_shown(names, numbers), _of_costs(rows)]),
        ]
    )


def _gain(rows: Numbers, words: str) -> list[list[float]]:
    return differences(rows[words]["scores"], rows[DEDICATED]["scores"])


def _of_seeds(rows: Numbers) -> str:
    count = len(rows[NESTED]["scores"])
    return f" ({count} seed{'s' if count > 1 else ''})"


def _costs(row: Numbers) -> list[str]:
    return [f"{row['flops']:.1e}", f"{row['seconds']:.0f}"]


def _shown(names: list[str], numbers: Numbers) -> Iterator[str]:
    """What became of the gain at each T, in words."""
    for t, rows in numbers.items():
        at_full = [
            statistics.fmean(scores[-1] for scores in rows[words]["scores"])
            for words in (PLAIN, NESTED, DEDICATED)
        ]
        yield (
            f"T = {int(t):,}{_of_seeds(rows)}: the nested network is "
            f"{verdict(names, _gain(rows, NESTED))}; at full width the plain network with the whole "
            "budget has {:.2f} %, the nested one {:.2f} %, that of T steps {:.2f} %.".format(
                *at_full
            )
        )


def _of_costs(rows: Numbers) -> str:
    ratio = rows[NESTED]["flops"] / rows[DEDICATED]["flops"]
    return (
        f"(Better and worse: by more than two standard errors.) For {ratio:.2f} times the FLOPs of all "
        f"{BUDGET} networks."
    )
