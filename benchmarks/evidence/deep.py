"""All layers of a deep network at one width, with the tails skipped, at equal FLOPs."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

import taildropout as td
from taildropout import Elastic, TailDropout, TailLinear
from taildropout.lengths import Sizes

from .images import Labelled, fashion_mnist
from .report import Numbers, Settings, count_flops, differences, means, table, verdict
from .widths import BATCH, Task, behind, classifying, train

TITLE = "A deep network, all layers at one width"
SEEDS = 3
WIDTHS = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]
FEATURES, LAYERS = 256, 4
RATES = [3e-3, 6e-3, 1e-2]

Reading = Callable[[int, int], nn.Module]
Wrap = Callable[[nn.Module], nn.Module]

DONE = f"""\
Fashion-MNIST with the split of the tables above. A classifier with {LAYERS} hidden layers of
{FEATURES} features and GELU; at a width w each of them has {FEATURES} w. A network for each width takes T =
{{steps:,}} steps of {BATCH} images, and every other row is given the FLOPs of all {len(WIDTHS)} together.
*Skipped* is `Elastic(model, x, widths=[...])`: a batch is cut into {len(WIDTHS)} groups, and each group
is computed at exactly one width. *Masked* is the same network, with the same widths, whose layers
compute everything and zero the tails, so that there are fewer steps for the FLOPs. With *sqrt(n/k)*
every Linear that reads hidden features is a `TailLinear(..., scale="sqrt")`; without it a `TailDropout` and a
Linear. *Plain* is trained at full width and then cut to its first features.

The learning rate of each network is chosen on the 10,000 held-out images (of {", ".join(f"{r:g}" for r in RATES)},
with the first seed). Accuracy on the 10,000 test images in per cent, mean ± standard error over the
seeds; *differences* are in points, paired by seed. FLOPs are those of all matrix products of the
training; seconds are of one processor, for one training at one rate."""


@dataclass(frozen=True)
class Method:
    """What reads hidden features, how the network is trained, and at which width it is made."""

    reading: Reading = nn.Linear
    wrap: Wrap = nn.Module.train
    width: float = 1.0


def dropping(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(TailDropout(lengths=Sizes(WIDTHS)), nn.Linear(inputs, outputs))


def scaling(inputs: int, outputs: int) -> nn.Module:
    return TailLinear(inputs, outputs, lengths=Sizes(WIDTHS), scale="sqrt")


def skipped(model: nn.Module) -> nn.Module:
    return Elastic(model, torch.zeros(2, 784), widths=WIDTHS)


def masked(model: nn.Module) -> nn.Module:
    td.draw_together(model)
    return model


DEDICATED = "control: a network of each width"
METHODS = {
    "nested, skipped, sqrt(n/k)": Method(scaling, skipped),
    "nested, skipped": Method(dropping, skipped),
    "control: nested, masked, sqrt(n/k)": Method(scaling, masked),
    "control: plain": Method(behind(0)),
}


def network(method: Method) -> nn.Module:
    n = int(FEATURES * method.width)
    layers: list[nn.Module] = [nn.Linear(784, n)]
    for outputs in [n] * (LAYERS - 1) + [10]:
        layers += [nn.GELU(), method.reading(n, outputs)]
    return nn.Sequential(*layers)


@dataclass
class Row:
    """The rate that was chosen, the scores by width of each seed; of a training its cost."""

    rates: list[float]
    scores: list[list[float]]
    steps: int
    flops: int
    seconds: float


def measure(settings: Settings, seeds: list[int]) -> Numbers:
    """Method -> the fields of `Row`."""
    data = fashion_mnist()
    if settings.quick:
        data = Labelled(*(part[:3000] for part in vars(data).values()))
    task = classifying(data, steps(settings))
    own = [row(task, Method(width=width), seeds, [width]) for width in WIDTHS]
    budget = sum(one.flops for one in own)
    rows = {
        DEDICATED: Row(
            [one.rates[0] for one in own],
            [
                [score for (score,) in by_width]
                for by_width in zip(*(o.scores for o in own), strict=True)
            ],
            task.steps,
            budget,
            sum(one.seconds for one in own),
        )
    }
    for name, method in METHODS.items():
        rows[name] = row(
            replace(task, steps=round(budget / step_flops(task, method))), method, seeds, WIDTHS
        )
    return {name: asdict(one) for name, one in rows.items()}


def row(task: Task, method: Method, seeds: list[int], widths: list[float]) -> Row:
    start = time.process_time()
    tried = {rate: fitted(task, method, rate, seeds[0]) for rate in RATES}
    seconds = (time.process_time() - start) / len(RATES)
    rate = max(RATES, key=lambda rate: sum(scores(task, tried[rate], task.valid, widths)))
    models = [tried[rate], *(fitted(task, method, rate, seed) for seed in seeds[1:])]
    found = [scores(task, model, task.test, widths) for model in models]
    return Row([rate], found, task.steps, task.steps * step_flops(task, method), seconds)


def fitted(task: Task, method: Method, rate: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = network(method)
    train(task, method.wrap(model), task.steps, rate, seed)
    return model


def step_flops(task: Task, method: Method) -> int:
    inputs, targets = (part[:BATCH] for part in task.train)
    model = method.wrap(network(method)).train()
    return count_flops(lambda: task.loss(model(inputs), targets).backward())


@torch.no_grad()
def scores(
    task: Task, model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], widths: list[float]
) -> list[float]:
    """At each width; a network without layers has one."""
    if not td.tail_dropouts(model):
        return [float(task.score(model(data[0]), data[1]).mean())]
    found = []
    for width in widths:
        with td.at_width(model, width):
            found.append(float(task.score(model(data[0]), data[1]).mean()))
    return found


def steps(settings: Settings) -> int:
    return 20 if settings.quick else 800


def text(numbers: Numbers, settings: Settings) -> str:
    names = [f"1/{round(1 / width)}" if width < 1 else "1" for width in WIDTHS]
    head = ["", *names]
    cells = [
        [
            *(
                name,
                *means(row["scores"]),
                ", ".join(dict.fromkeys(f"{r:g}" for r in row["rates"])),
            ),
            *(f"{row['steps']:,}", f"{row['flops']:.1e}", f"{row['seconds']:.0f}"),
        ]
        for name, row in numbers.items()
    ]
    gains = {
        name: differences(row["scores"], numbers[DEDICATED]["scores"])
        for name, row in numbers.items()
        if name != DEDICATED
    }
    return "\n\n".join(
        [
            DONE.format(steps=steps(settings)),
            table([*head, "learning rate", "steps", "training FLOPs", "seconds"], cells),
            "The same, less the networks of each width:",
            table(head, [[name, *means(gain)] for name, gain in gains.items()]),
            " ".join(_shown(names, gains)),
        ]
    )


def _shown(names: list[str], gains: dict[str, list[list[float]]]) -> Iterator[str]:
    yield "Against the networks of each width (better and worse: by more than two standard errors):"
    for name, gain in gains.items():
        yield f"*{name}* is {verdict(names, gain)}{'.' if name == list(gains)[-1] else ';'}"
