"""One network for all widths against a network for each, at the same total compute."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import taildropout as td
from taildropout import TailDropout, TailLinear
from taildropout.lengths import Full, Mixed, Sizes
from taildropout.measuring.cuts import Features

from .images import Labelled, fashion_mnist
from .report import CONTROLS, Numbers, Settings, count_flops, mean_text, table

TITLE = "One network for all widths against a network for each"
SEEDS = 3
AUTOENCODER = "autoencoder, held-out error in thousandths"
CLASSIFIER = "classifier, held-out accuracy in %"
KS = [1, 2, 4, 8, 16, 32]
WIDTH, BATCH = KS[-1], 256
ORDERED_BY = 5000  # of the training images
RATES = [5e-3, 1e-2]
RECIPE = Mixed([Full(), Sizes(KS)], [0.2, 0.8])


@dataclass(frozen=True)
class Task:
    """What is learned: the network at a width, the loss, and each sample's score.

    `network` is given what reads the features: `nn.Linear`, or what has a layer in front of it.
    """

    network: Callable[[int, Callable[[int, int], nn.Module]], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    better: Callable[[list[float]], float]
    steps: int


def held_out(train: Tensor) -> tuple[Tensor, ...]:
    """What is learned, and the last sixth, on which the rate is chosen."""
    return train.split([len(train) * 5 // 6, len(train) // 6])


def autoencoding(data: Labelled, steps: int) -> Task:
    def network(width: int, reading: Callable[[int, int], nn.Module]) -> nn.Module:
        return nn.Sequential(
            *(nn.Linear(784, 128), nn.GELU(), nn.Linear(128, width)),
            *(reading(width, 128), nn.GELU(), nn.Linear(128, 784), nn.Sigmoid()),
        )

    def score(output: Tensor, target: Tensor) -> Tensor:
        return 1000 * (output - target).square().mean(1)

    def better(scores: list[float]) -> float:
        return -statistics.geometric_mean(scores)

    parts = [(part, part) for part in (*held_out(data.train), data.test)]
    return Task(network, mse_loss, score, *parts, better, steps)


def classifying(data: Labelled, steps: int) -> Task:
    def network(width: int, reading: Callable[[int, int], nn.Module]) -> nn.Module:
        return nn.Sequential(
            *(nn.Linear(784, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU()),
            *(nn.Linear(128, width), reading(width, 10)),
        )

    def score(output: Tensor, target: Tensor) -> Tensor:
        return 100 * (output.argmax(1) == target).double()

    parts = list(zip(held_out(data.train), held_out(data.train_labels), strict=True))
    test = (data.test, data.test_labels)
    return Task(network, cross_entropy, score, *parts, test, statistics.fmean, steps)


def behind(p: float) -> Callable[[int, int], nn.Module]:
    """A Linear behind a layer."""
    return lambda width, outputs: nn.Sequential(TailDropout(p), nn.Linear(width, outputs))


@dataclass(frozen=True)
class Method:
    """How a network is trained: at which width, what reads the features, how many times T steps."""

    reading: Callable[[int, int], nn.Module] = nn.Linear
    budget: int = 1
    width: int = WIDTH
    controls: bool = False


BUDGET = len(KS)
METHODS = {
    "control: plain": Method(behind(0), controls=True),
    f"control: plain, {BUDGET} T": Method(behind(0), BUDGET, controls=True),
    "nested, p = 0.5, T": Method(behind(0.5)),
    f"nested, p = 0.5, {BUDGET} T": Method(behind(0.5), BUDGET),
    "nested, the recipe, T": Method(partial(TailLinear, lengths=RECIPE)),
    f"nested, the recipe, {BUDGET} T": Method(
        partial(TailLinear, lengths=RECIPE), BUDGET, controls=True
    ),
}


def fitted(task: Task, method: Method, rate: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = task.network(method.width, method.reading)
    train(task, model, task.steps * method.budget, rate, seed)
    return model


def train(
    task: Task,
    model: nn.Module,
    steps: int,
    rate: float,
    seed: int,
    *,
    batch_size: int = BATCH,
    plain: float = 0.0,
) -> None:
    """With a share of plain steps, then in order and nested, as `td.Schedule` has it."""
    inputs, targets = task.train
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    nesting = None
    if plain:
        data = [(inputs[:ORDERED_BY], targets[:ORDERED_BY])]
        nesting = td.Schedule(model, steps, plain=plain, data=data, optimizer=optimizer)
    model.train()
    batches: Iterator[Tensor] = iter(())
    for _ in range(steps):
        batch = next(batches, None)
        if batch is None or len(batch) < batch_size:
            batches = iter(torch.randperm(len(inputs), generator=generator).split(batch_size))
            batch = next(batches)
        loss = task.loss(model(inputs[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if nesting is not None:
            nesting.step()
    model.eval()


def training_flops(task: Task, model: nn.Module, steps: int, batch_size: int = BATCH) -> int:
    """Of the matrix products and convolutions of so many steps."""
    inputs, targets = (part[:batch_size] for part in task.train)
    step = copy.deepcopy(model)
    return steps * count_flops(lambda: task.loss(step(inputs), targets).backward())


@torch.no_grad()
def scores(
    task: Task, model: nn.Module, data: tuple[Tensor, Tensor], features: Features = "first"
) -> list[float]:
    """Of the first k features, for each k, or of others; one number without a layer."""
    if not td.tail_dropouts(model):
        return [float(task.score(model(data[0]), data[1]).mean())]
    scree = td.scree(model, task.score, [data], ks=KS, features=features, progress=False)
    return scree.loss.tolist()


@dataclass
class Row:
    """What became of a method: the rate that was chosen, the scores by k of each seed, seconds."""

    rate: float
    scores: list[list[float]]
    seconds: float


def measured(task: Task, methods: dict[str, Method], seeds: list[int]) -> Iterator[tuple[str, Row]]:
    """Each method and its controls. The rate is chosen on held-out images, with the first seed."""
    for name, method in methods.items():
        start = time.process_time()
        tried = {rate: fitted(task, method, rate, seeds[0]) for rate in RATES}
        seconds = (time.process_time() - start) / len(RATES)
        rate = max(RATES, key=lambda rate: task.better(scores(task, tried[rate], task.valid)))
        models = [tried[rate], *(fitted(task, method, rate, seed) for seed in seeds[1:])]
        shown: dict[Features, str] = {"first": name}
        if method.controls:
            shown |= {features: f"{name}, {words}" for features, words in CONTROLS.items()}
        for features, words in shown.items():
            yield words, Row(rate, [scores(task, m, task.test, features) for m in models], seconds)


def dedicated(task: Task, seeds: list[int]) -> Row:
    """A network for each k, each with a rate of its own."""
    methods = {str(k): Method(width=k) for k in KS}
    rows = [row for _, row in measured(task, methods, seeds)]
    by_seed = zip(*(row.scores for row in rows), strict=True)
    return Row(
        rows[-1].rate,
        [[score for (score,) in seed] for seed in by_seed],
        sum(row.seconds for row in rows),
    )


def measure(settings: Settings, seeds: list[int]) -> Numbers:
    """Task -> method -> the fields of `Row`."""
    return {
        name: {
            words: vars(row)
            for words, row in [
                (DEDICATED, dedicated(task, seeds)),
                *measured(task, METHODS, seeds),
            ]
        }
        for name, task in tasks(settings).items()
    }


def tasks(settings: Settings) -> dict[str, Task]:
    """Also those of `trained`."""
    data = fashion_mnist()
    if settings.quick:
        data = Labelled(*(part[:3000] for part in vars(data).values()))
    return {
        AUTOENCODER: autoencoding(data, steps(settings)),
        CLASSIFIER: classifying(data, steps(settings)),
    }


def steps(settings: Settings) -> int:
    return 20 if settings.quick else 1000


DEDICATED = f"control: a network of width k, T each, {BUDGET} T in all"
DONE = f"""\
Fashion-MNIST: 50,000 images to train on, 10,000 to choose the learning rate on (of
{" and ".join(f"{rate:g}" for rate in RATES)}, with the first seed; of each network by itself), and
scores on the 10,000 test images, mean ± standard error over the seeds. All networks have the same
layers but for the {WIDTH} features in the middle, the same optimiser (AdamW, one cycle of the
learning rate) and batches of {BATCH}. T is {{steps:,}} steps, so a network for each of the
{BUDGET} widths takes {BUDGET} T, and so do the rows of {BUDGET} T: the same number of steps in all.
The seconds are of one processor, for one training.

*Plain* is the network of width {WIDTH} without an order, with all features but the first k set to
zero. *The recipe* is `TailLinear(..., lengths=Mixed([Full(), Sizes({KS})], [0.2, 0.8]))` where
a Linear reads the features. Under a network that serves all widths stand two controls of itself
(`td.scree` with `features="random"` and `"principal"`), with the same decoder or classifier, which
is not trained again: k *random features* instead of the first, and its features projected on their
first k *principal components* (of the test images).

The autoencoder is 784 → 128 → {WIDTH} → 128 → 784, its score the mean squared error in thousandths,
smaller is better. The classifier is 784 → 128 → 128 → {WIDTH} → 10, its score the accuracy in per
cent, larger is better."""


def text(numbers: Numbers, settings: Settings) -> str:
    parts = [DONE.format(steps=steps(settings))]
    head = ["", *[f"k = {k}" for k in KS]]
    for name, rows in numbers.items():
        full = [
            [
                words,
                *[mean_text(column, 2) for column in zip(*row["scores"], strict=True)],
                f"{row['rate']:g}" if words != DEDICATED else "each its own",
                f"{row['seconds']:.0f}",
            ]
            for words, row in rows.items()
        ]
        parts += [f"**{name}**", table([*head, "learning rate", "seconds"], full)]
        unit = ", in points" if name == CLASSIFIER else ""
        parts += [f"The same, against the networks of width k{unit}:"]
        parts += [table(head, _differences(name, rows))]
    return "\n\n".join([*parts, SHOWN])


def _differences(name: str, rows: Numbers) -> list[list[str]]:
    """Of the means of each row, to those of the networks of width k."""
    means = {
        words: [statistics.fmean(column) for column in zip(*row["scores"], strict=True)]
        for words, row in rows.items()
    }
    own = means.pop(DEDICATED)
    return [
        [
            words,
            *[
                f"{100 * (score / best - 1):+.1f} %"
                if name == AUTOENCODER
                else f"{score - best:+.2f}"
                for score, best in zip(scores, own, strict=True)
            ],
        ]
        for words, scores in means.items()
    ]


SHOWN = """At the same total compute one network by the recipe replaces all six. The classifier
is better than each of them at every k, by 5.7 points at k = 1 and by about one point from k = 4 on; the autoencoder is
3 to 12 % worse up to k = 8, and 4 and 21 % better at 16 and 32.

Full width is not free. A plain network that gets the whole budget is better there than the nested
one: an error of 9.6 against 11.3, 89.4 % against 88.8 %. From k = 8 on, principal components of that
plain classifier are as good as the nested one, with ten classes to tell apart. For the autoencoder
they are far behind up to k = 16, and so is every truncation of a plain network at small k.

With a sixth of the compute (T) the recipe is 11 to 22 % worse than six autoencoders, and within 0.7
points of six classifiers but for k = 1, where it loses 7. Without the tail bias and the share of full
width, with k from p = 0.5, the classifier loses 29 points at k = 1 even in 6 T, and the autoencoder
a third."""
