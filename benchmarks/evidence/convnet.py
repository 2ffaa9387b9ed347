"""A whole network nested in one line, against a network for each width."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

import taildropout as td
from taildropout.lengths import Full, Mixed, Sizes

from .images import Labelled, fashion_mnist
from .report import Numbers, Settings, count_flops, differences, means, table, verdict
from .widths import ORDERED_BY, Task, classifying, train, training_flops

TITLE = "A whole network nested in one line"
SEEDS = 3
WIDTHS = [1 / 8, 1 / 4, 1 / 2, 1.0]
BUDGET = len(WIDTHS)
RECIPE = Mixed([Full(), Sizes(WIDTHS)], [0.2, 0.8])
RATES = [5e-3, 1e-2]
SHARE = 10  # of the whole budget, one in so many comes after it
RENEWED_BY = 2000  # of the training images: BatchNorm's statistics
CHOSEN_BY = 4000  # of the held-out images
TOGETHER = 250


class Block(nn.Module):
    """Two convolutions, and around them what came in."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            fitting = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(fitting, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(hidden)) + self.shortcut(x)).relu()


def residual(width: float) -> nn.Module:
    few, many = int(16 * width), int(32 * width)
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, few, 3, 2, padding=1, bias=False)),
        *(nn.BatchNorm2d(few), nn.ReLU()),
        *(Block(few, many, 2), Block(many, many, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(many, 10)),
    ).to(memory_format=torch.channels_last)


def perceptron(width: float) -> nn.Module:
    many, few = int(128 * width), int(32 * width)
    return nn.Sequential(
        *(nn.Linear(784, many), nn.GELU(), nn.Linear(many, many), nn.GELU()),
        *(nn.Linear(many, few), nn.Linear(few, 10)),
    )


@dataclass(frozen=True)
class Kind:
    """What is trained: the network of each width, and on what."""

    build: Callable[[float], nn.Module]
    task: Task
    batch_size: int
    normed: bool = False

    @property
    def example(self) -> Tensor:
        return self.task.train[0][:2]

    def nest(self, model: nn.Module) -> None:
        """In one line; and with TailDropouts in all places it has every width."""
        td.nest(model, self.example, lengths=RECIPE, min_width=min(WIDTHS), streams=True)

    def inference_flops(self, width: float) -> int:
        model = self.build(width).eval()
        return count_flops(lambda: model(self.example[:1]))

    def training_flops(self, model: nn.Module, steps: int) -> int:
        return training_flops(self.task, model, steps, self.batch_size)


@dataclass(frozen=True)
class Method:
    """How a network is trained: its width, whether nested, how many times T, the plain share."""

    width: float = 1.0
    nested: bool = False
    budget: float = BUDGET
    plain: float = 0.0
    one_width: bool = False  # for each step, and not for each sample


DEDICATED = f"control: a network of each width, T each, {BUDGET} T in all"
PLAIN = f"control: plain, {BUDGET} T"
NESTED = f"nested, {BUDGET} T"
SCHEDULED = f"plain, ordered, nested (`td.Schedule`), {BUDGET} T"
SAME_FLOPS = "nested, as many FLOPs as the networks of each width"
ONE_WIDTH = f"nested, one width in each step, {BUDGET} T"
ONE_WIDTH_SAME_FLOPS = "nested, one width in each step, as many FLOPs"
SCHEDULED_LESS_NESTED = "`td.Schedule`, less nested from the start"
ONE_LESS_OWN = "one width in each step, less one for each sample"
JUST_NESTED = f"{PLAIN}, then nested for {BUDGET / SHARE:g} T"
ORDERED = f"plain, {BUDGET} T, ordered by"
ORDERED_NESTED = f"{ORDERED} saliency, then nested for {BUDGET / SHARE:g} T"


@dataclass
class Trained:
    """Of each seed a network, and what one took."""

    models: list[nn.Module]
    rate: float
    seconds: float
    flops: int


def fitted(kind: Kind, method: Method, rate: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = kind.build(method.width)
    if method.nested:
        kind.nest(model)
    if method.one_width:
        for layer in td.tail_dropouts(model).values():
            layer.batch_dim = ()
        td.draw_together(model)
    steps = round(method.budget * kind.task.steps)
    train(kind.task, model, steps, rate, seed, batch_size=kind.batch_size, plain=method.plain)
    return model


def trained(kind: Kind, method: Method, seeds: list[int], rates: list[float]) -> Trained:
    """With the rate that is best on held-out images, with the first seed."""
    start = time.process_time()
    tried = {rate: fitted(kind, method, rate, seeds[0]) for rate in rates}
    seconds = (time.process_time() - start) / len(rates)
    rate = max(rates, key=lambda rate: best_on_held_out(kind, tried[rate])[0])
    models = [tried[rate], *(fitted(kind, method, rate, seed) for seed in seeds[1:])]
    flops = kind.training_flops(models[0], round(method.budget * kind.task.steps))
    return Trained(models, rate, seconds, flops)


def best_on_held_out(kind: Kind, model: nn.Module) -> tuple[float, bool]:
    """The mean accuracy, and whether for that BatchNorm's statistics are renewed at each width."""
    several = kind.normed and len(td.tail_dropouts(model)) > 0
    held_out = (kind.task.valid[0][:CHOSEN_BY], kind.task.valid[1][:CHOSEN_BY])
    return max(
        (statistics.fmean(accuracies(kind, model, held_out, renewed)), renewed)
        for renewed in ([False, True] if several else [False])
    )


@torch.no_grad()
def accuracies(
    kind: Kind, model: nn.Module, data: tuple[Tensor, Tensor], renewed: bool
) -> list[float]:
    """By width; one, if it has one."""
    model = copy.deepcopy(model).eval()
    found = []
    for width in WIDTHS if td.tail_dropouts(model) else [None]:
        with td.at_width(model, width) if width else torch.no_grad():
            if renewed:
                images = kind.task.train[0][:RENEWED_BY].split(TOGETHER)
                td.recalibrate(model, images, progress=False)
            parts = zip(*(part.split(TOGETHER) for part in data), strict=True)
            found.append(float(torch.cat([kind.task.score(model(x), y) for x, y in parts]).mean()))
    return found


def rows(kind: Kind, seeds: list[int]) -> Iterator[tuple[str, "Row"]]:
    """The rate is chosen for the networks of each width, for the plain and for the nested one."""
    yield DEDICATED, dedicated(kind, seeds)
    plain = trained(kind, Method(), seeds, RATES)
    for model in plain.models:
        kind.nest(model)  # to have all widths
    yield PLAIN, row(kind, plain)
    yield from afterwards(kind, plain, seeds)
    nested = trained(kind, Method(nested=True), seeds, RATES)
    yield NESTED, row(kind, nested)
    sizes = {width: kind.inference_flops(width) for width in WIDTHS}
    same = sum(sizes.values()) / sizes[1.0]
    others = {
        "nested, T": Method(nested=True, budget=1),
        SAME_FLOPS: Method(nested=True, budget=same),
        SCHEDULED: Method(nested=True, plain=0.4),  # the default
        ONE_WIDTH: Method(nested=True, one_width=True),
        ONE_WIDTH_SAME_FLOPS: Method(nested=True, budget=same, one_width=True),
    }
    for words, method in others.items():
        yield words, row(kind, trained(kind, method, seeds, [nested.rate]))


@dataclass
class Row:
    """Accuracies by width of each seed, with the statistics that were better on held-out images."""

    scores: list[list[float]]
    renewed: bool
    others: list[list[float]]  # with the other statistics, of the first seed
    rate: float | None
    seconds: float
    flops: int


def row(kind: Kind, found: Trained) -> Row:
    _, renewed = best_on_held_out(kind, found.models[0])
    scores = [accuracies(kind, model, kind.task.test, renewed) for model in found.models]
    others = []
    if kind.normed:
        others = [accuracies(kind, found.models[0], kind.task.test, not renewed)]
    return Row(scores, renewed, others, found.rate, found.seconds, found.flops)


def dedicated(kind: Kind, seeds: list[int]) -> Row:
    all_found = [trained(kind, Method(width, budget=1), seeds, RATES) for width in WIDTHS]
    by_width = [
        [accuracies(kind, model, kind.task.test, False)[0] for model in found.models]
        for found in all_found
    ]
    scores = [list(scores) for scores in zip(*by_width, strict=True)]
    seconds, flops = (sum(getattr(found, of) for found in all_found) for of in ("seconds", "flops"))
    return Row(scores, False, [], None, seconds, int(flops))


def afterwards(kind: Kind, found: Trained, seeds: list[int]) -> Iterator[tuple[str, Row]]:
    """From trained networks: their features in order, and a short nested training."""
    inputs, targets = kind.task.train
    data = [(inputs[:ORDERED_BY], targets[:ORDERED_BY])]
    loss = nn.CrossEntropyLoss(reduction="none")
    by_saliency = [td.order(model, data, loss=loss, by="saliency") for model in found.models]
    by_variance = [td.order(model, data) for model in found.models]
    for words, before in [("variance", by_variance), ("saliency", by_saliency)]:
        ordered = Trained(before, found.rate, 0, 0)
        yield f"{ORDERED} {words}", row(kind, ordered)
    steps = round(BUDGET * kind.task.steps / SHARE)
    for words, before in [
        (JUST_NESTED, found.models),
        (ORDERED_NESTED, by_saliency),
    ]:
        start = time.process_time()
        models = copy.deepcopy(before)
        for model, seed in zip(models, seeds, strict=True):
            rate, size = found.rate / 2, kind.batch_size
            train(kind.task, model, steps, rate, seed + 1000, batch_size=size)
        seconds = (time.process_time() - start) / len(seeds)
        flops = kind.training_flops(models[0], steps)
        further = Trained(models, found.rate / 2, seconds, flops)
        yield words, row(kind, further)


RESIDUAL = "residual network with BatchNorm"
PERCEPTRON = "perceptron"
TRAININGS = {RESIDUAL: (300, 128), PERCEPTRON: (600, 256)}  # T and the size of a batch
DONE = f"""\
Fashion-MNIST, 50,000 images to train on, 10,000 to choose on, accuracy on the 10,000 test images,
mean ± standard error over the seeds. Two networks are nested by
`td.nest(model, x, lengths=Mixed([Full(), Sizes([1/8, 1/4, 1/2, 1.0])], [0.2, 0.8]), streams=True)`: all
widths of all places are drawn together. The *residual network* has a convolution of stride 2 with 16
channels and two blocks of 32 (two convolutions each, BatchNorm, a residual stream), and a Linear; the
*perceptron* is 784 → 128 → 128 → 32 → 10 with GELU. The network of a width has the shapes that
`td.prune` gives at that width. AdamW, one cycle of the learning rate; the rate is chosen from
{" and ".join(f"{rate:g}" for rate in RATES)} on held-out images with the first seed, for the network of
each width, the plain one and the nested one in {BUDGET} T, whose rate the other nested ones have.

T is what a network of one width takes, so the networks of each width take {BUDGET} T; it is short, less
than an epoch for the residual network and three for the perceptron. *Plain* is the
network of full width, trained without an order; at the other widths it has its first features.
*Ordered* is `td.order` of it, on {ORDERED_BY:,} images, by variance or by saliency; full width is
unchanged, and nothing is trained. *Then nested* is trained further, for a tenth of the budget, at half
the learning rate. `td.Schedule` takes the first 40 % of its steps at full width, orders by variance,
and nests for the rest. *Renewed* BatchNorm has its statistics at each width from {RENEWED_BY:,} images it was trained
on (`td.recalibrate`), where that is better on held-out images. Training FLOPs are those of the
matrix products and convolutions of one training, two for each multiplication; the seconds are of one
processor."""


def measure(settings: Settings, seeds: list[int]) -> Numbers:
    """Kind -> its sizes by width, and method -> the fields of `Row`."""
    return {
        name: {
            "parameters": [
                sum(parameter.numel() for parameter in kind.build(width).parameters())
                for width in WIDTHS
            ],
            "flops": [kind.inference_flops(width) for width in WIDTHS],
            "steps": kind.task.steps,
            "rows": {words: asdict(row) for words, row in rows(kind, seeds)},
        }
        for name, kind in kinds(settings).items()
    }


def kinds(settings: Settings) -> dict[str, Kind]:
    data = fashion_mnist()
    if settings.quick:
        data = Labelled(*(part[:1500] for part in vars(data).values()))
    builds = {RESIDUAL: residual, PERCEPTRON: perceptron}
    return {
        name: Kind(
            builds[name],
            classifying(data, 10 if settings.quick else steps),
            batch_size,
            normed=name == RESIDUAL,
        )
        for name, (steps, batch_size) in TRAININGS.items()
    }


def text(numbers: Numbers, settings: Settings) -> str:
    parts = [DONE]
    head = ["", *[f"width {_fraction(width)}" for width in WIDTHS]]
    costs = ["learning rate", "BatchNorm", "training FLOPs", "seconds"]
    for name, of_kind in numbers.items():
        found = of_kind["rows"]
        cells = [
            ["parameters", *[f"{count:,}" for count in of_kind["parameters"]], *[""] * 4],
            ["FLOPs of an image", *[f"{count:,}" for count in of_kind["flops"]], *[""] * 4],
            *([words, *means(row["scores"]), *_costs(name, row)] for words, row in found.items()),
        ]
        gains = [[words, *means(of)] for words, of in _gains(found).items()]
        between = [[words, *means(of)] for words, of in _between(name, found).items()]
        training = f"T is {of_kind['steps']:,} steps of {TRAININGS[name][1]} images"
        parts += [f"**{name}, held-out accuracy in %; {training}**"]
        parts += [table([*head, *costs], cells)]
        parts += ["The same, less the networks of each width, in points, paired by seed:"]
        parts += [table(head, gains), "And against each other:", table(head, between)]
        parts += ["\n".join(_shown(name, found))]
    return "\n\n".join(parts)


def _fraction(width: float) -> str:
    return f"1/{round(1 / width)}" if width < 1 else "1"


def _costs(name: str, row: Numbers) -> list[str]:
    return [
        f"{row['rate']:g}" if row["rate"] else "each its own",
        ("renewed" if row["renewed"] else "as trained") if name == RESIDUAL else "",
        f"{row['flops']:.1e}" if row["flops"] else "none",
        f"{row['seconds']:.0f}",
    ]


def _gains(rows: Numbers) -> dict[str, list[list[float]]]:
    own = rows[DEDICATED]["scores"]
    return {
        words: differences(row["scores"], own) for words, row in rows.items() if words != DEDICATED
    }


def _between(name: str, rows: Numbers) -> dict[str, list[list[float]]]:
    pairs = {
        f"{PLAIN}, less nested": (PLAIN, NESTED),
        SCHEDULED_LESS_NESTED: (SCHEDULED, NESTED),
        "ordered, then nested, less nested from the start": (ORDERED_NESTED, NESTED),
        "ordered, then nested, less the same without the order": (ORDERED_NESTED, JUST_NESTED),
        ONE_LESS_OWN: (ONE_WIDTH, NESTED),
    }
    found = {
        words: differences(rows[one]["scores"], rows[other]["scores"])
        for words, (one, other) in pairs.items()
    }
    if name == RESIDUAL:
        for words in (PLAIN, NESTED, ONE_WIDTH):
            found[f"{words}: BatchNorm renewed, less as trained (first seed)"] = _renewing(
                rows[words]
            )
    return found


def _renewing(row: Numbers) -> list[list[float]]:
    renewed, left = row["scores"][:1], row["others"]
    if not row["renewed"]:
        renewed, left = left, renewed
    return differences(renewed, left)


def _shown(name: str, rows: Numbers) -> Iterator[str]:
    """What came out, in words."""
    widths = [_fraction(width) for width in WIDTHS]
    yield "Against the networks of each width, by more than two standard errors:\n"
    for words in (NESTED, SAME_FLOPS, SCHEDULED, ONE_WIDTH, ONE_WIDTH_SAME_FLOPS, ORDERED_NESTED):
        yield f"- *{words}* is {verdict(widths, _gains(rows)[words])}."
    flops = rows[NESTED]["flops"] / rows[DEDICATED]["flops"]
    start = _between(name, rows)[SCHEDULED_LESS_NESTED]
    small, full = (_at(rows, PLAIN, column) for column in (0, -1))
    yield (
        "\nTails that are zeroed are computed all the same, so at equal numbers of steps nesting takes "
        f"{flops:.1f} times the FLOPs of the networks of each width. The plain network with the whole "
        f"budget has {full:.1f} % at full width, the nested one {_at(rows, NESTED, -1):.1f} %; at a "
        f"width of {widths[0]} it has {small:.1f} %, and after an order and nested training for a tenth "
        f"of the budget {_at(rows, ORDERED_NESTED, 0):.1f} %, against {_at(rows, NESTED, 0):.1f} %. A "
        f"start with plain steps and an order (`td.Schedule`) is {verdict(widths, start)}, compared with "
        "nesting from the start."
    )
    if name == RESIDUAL:
        nested, one_width = (
            [f"{gain:+.0f}" for gain in _renewing(rows[words])[0]] for words in (NESTED, ONE_WIDTH)
        )
        yield (
            "\nBatchNorm's statistics are no matter of course. Where each sample has a width of its own, "
            "training normalises by a batch of all widths, and the statistics that were gathered then "
            f"fit: renewed at each width they change the accuracy by {', '.join(nested)} points. Where "
            "all samples of a step have one width (`batch_dim=()` in each layer, then "
            "`td.draw_together`), training normalises by that width, and they must be renewed: "
            f"{', '.join(one_width)} points. Of the two, "
            f"one width in each step is {verdict(widths, _between(name, rows)[ONE_LESS_OWN])}."
        )


def _at(rows: Numbers, words: str, column: int) -> float:
    return statistics.fmean(scores[column] for scores in rows[words]["scores"])
