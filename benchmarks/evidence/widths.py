"""One network for all widths against a network for each, on Fashion-MNIST."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import taildropout as td
from taildropout import TailDropout
from taildropout.lengths import Sizes, Uniform
from taildropout.measuring.cuts import Features

from .images import Labelled, fashion_mnist
from .report import CONTROLS, Numbers, Settings, mean_text, table

TITLE = "One network for all widths against a network for each"
SEEDS = 3
AUTOENCODER = "autoencoder, held-out error in thousandths"
CLASSIFIER = "classifier, held-out accuracy in %"
KS = [1, 2, 4, 8, 16, 32]
WIDTH, BATCH = KS[-1], 512


class Network(nn.Module):
    """Encoder, a layer on the features, and a head: a decoder or a classifier."""

    def __init__(self, encoder: nn.Module, layer: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.layer, self.head = encoder, layer, head

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.head(self.layer(self.encoder(images)))
        return output


class HeadPerSize(nn.Module):
    """A linear head for each size in `KS`; each sample takes that of the k it has in `layer`."""

    def __init__(self, layer: TailDropout, classes: int) -> None:
        super().__init__()
        self.layer = [layer]  # in a list: not a child of this module too
        heads = [nn.Linear(WIDTH, classes) for _ in KS]
        self.weight = nn.Parameter(torch.stack([head.weight.detach() for head in heads]))
        self.bias = nn.Parameter(torch.stack([head.bias.detach() for head in heads]))

    def forward(self, features: Tensor) -> Tensor:
        (layer,) = self.layer
        k = layer.drawn_k if layer.k is None else torch.full((len(features),), layer.k)
        size = torch.searchsorted(torch.tensor(KS), k)
        return torch.einsum("bf,bcf->bc", features, self.weight[size]) + self.bias[size]


@dataclass(frozen=True)
class Task:
    """What is learned: the network at a width, the loss, and each sample's score."""

    encoder: Callable[[int], nn.Module]
    head: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    epochs: int

    def network(self, layer: nn.Module, width: int = WIDTH) -> Network:
        return Network(self.encoder(width), layer, self.head(width))


def autoencoding(data: Labelled, epochs: int) -> Task:
    def encoder(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(784, 128), nn.GELU(), nn.Linear(128, width))

    def decoder(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, 784), nn.Sigmoid())

    def score(output: Tensor, target: Tensor) -> Tensor:
        return 1000 * (output - target).square().mean(1)

    train, test = (data.train, data.train), (data.test, data.test)
    return Task(encoder, decoder, mse_loss, score, train, test, epochs)


def classifying(data: Labelled, epochs: int) -> Task:
    def encoder(width: int) -> nn.Module:
        return nn.Sequential(
            *(nn.Linear(784, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU()),
            nn.Linear(128, width),
        )

    def head(width: int) -> nn.Module:
        return nn.Linear(width, 10)

    def score(output: Tensor, target: Tensor) -> Tensor:
        return 100 * (output.argmax(1) == target).double()

    train, test = (data.train, data.train_labels), (data.test, data.test_labels)
    return Task(encoder, head, cross_entropy, score, train, test, epochs)


def fit(task: Task, model: nn.Module, seed: int) -> None:
    inputs, targets = task.train
    generator = torch.Generator().manual_seed(seed)
    steps = task.epochs * -(-len(inputs) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(task.epochs):
        for batch in torch.randperm(len(inputs), generator=generator).split(BATCH):
            loss = task.loss(model(inputs[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def score(task: Task, model: Network) -> float:
    return float(task.score(model(task.test[0]), task.test[1]).mean())


@torch.no_grad()
def at_each_width(task: Task, model: Network, layer: TailDropout) -> list[float]:
    """The score of the first k features, for each k."""
    result = []
    for k in KS:
        with layer.using_k(k):
            result.append(score(task, model))
    return result


def by_features(task: Task, model: Network, features: Features) -> list[float]:
    """The score of k features, for each k: any network can be swept."""
    layer = model.layer if isinstance(model.layer, TailDropout) else TailDropout()
    swept = Network(model.encoder, layer, model.head)
    scree = td.scree(swept, task.score, [task.test], ks=KS, features=features, progress=False)
    return scree.loss.tolist()


def rivals(task: Task, seed: int, heads: bool) -> Iterator[tuple[str, list[float]]]:
    """Each name with its scores by k, one seed."""

    def fitted(layer: nn.Module, width: int = WIDTH, head: nn.Module | None = None) -> Network:
        torch.manual_seed(seed)
        model = task.network(layer, width)
        if head is not None:
            model.head = head
        fit(task, model, seed)
        return model

    dedicated = [fitted(nn.Identity(), k) for k in KS]
    yield DEDICATED, [score(task, model) for model in dedicated]
    networks = {"control: plain": dedicated[-1]} | {
        name: fitted(layer)
        for name, layer in {
            "nested, p = 0.5": TailDropout(0.5),
            "nested, `Uniform()`": TailDropout(lengths=Uniform()),
            f"nested, `Sizes({KS})`": TailDropout(lengths=Sizes(KS)),
        }.items()
    }
    for name, network in networks.items():
        yield name, by_features(task, network, "first")
        for features, words in CONTROLS.items():
            yield f"{name}, {words}", by_features(task, network, features)
    if heads:
        layer = TailDropout(lengths=Sizes(KS))
        torch.manual_seed(seed)
        model = fitted(layer, head=HeadPerSize(layer, 10))
        yield f"nested, `Sizes({KS})`, a head for each", at_each_width(task, model, layer)


DEDICATED = "control: a network of width k"
DONE = f"""\
Fashion-MNIST, 60,000 images to train on, held-out scores on 10,000, means over the seeds. All
networks have the same layers but for the {WIDTH} features in the middle, and the same optimiser,
batches ({BATCH}) and {{epochs}} epochs: the six *of width k* together take six times the training
of any other row. *Plain* is the network of width {WIDTH} with all features but the first k set to
zero. Under each network that serves all widths stand two controls of itself (`td.scree` with
`features="random"` and `"principal"`), with the same decoder or classifier, which is not trained
again: k *random features* instead of the first, and its features projected on their first k
*principal components* (of the held-out images).

The autoencoder is 784 → 128 → {WIDTH} → 128 → 784, its score the mean squared error in thousandths, smaller
is better. The classifier is 784 → 128 → 128 → {WIDTH} → 10, its score the accuracy in per cent,
larger is better; *a head for each* has one linear classifier for each size instead of one for
all."""


def measure(settings: Settings, seeds: list[int]) -> Numbers:
    """Task -> rival -> scores, one list by k for each seed."""
    data = fashion_mnist()
    if settings.quick:
        data = Labelled(*(part[:2000] for part in vars(data).values()))
    tasks = {
        AUTOENCODER: autoencoding(data, epochs(settings)),
        CLASSIFIER: classifying(data, epochs(settings)),
    }
    numbers: Numbers = {}
    for name, task in tasks.items():
        numbers[name] = {}
        for seed in seeds:
            for rival, scores in rivals(task, seed, heads=name == CLASSIFIER):
                numbers[name].setdefault(rival, []).append(scores)
    return numbers


def epochs(settings: Settings) -> int:
    return 1 if settings.quick else 10


def text(numbers: Numbers, settings: Settings) -> str:
    parts = [DONE.format(epochs=epochs(settings))]
    head = ["", *[f"k = {k}" for k in KS]]
    for name, runs in numbers.items():
        rows = [
            [rival, *[mean_text(column, 2) for column in zip(*scores, strict=True)]]
            for rival, scores in runs.items()
        ]
        parts += [f"**{name}**", table(head, rows)]
        unit = ", in points" if name == CLASSIFIER else ""
        parts += [f"The same, against the networks of width k{unit}:"]
        parts += [table(head, _deficits(name, runs))]
    return "\n\n".join([*parts, SHOWN])


def _deficits(name: str, runs: dict[str, list[list[float]]]) -> list[list[str]]:
    """What each row loses against the networks of width k."""
    means = {
        rival: [statistics.fmean(column) for column in zip(*scores, strict=True)]
        for rival, scores in runs.items()
    }
    dedicated = means.pop(DEDICATED)
    rows = []
    for rival, scores in means.items():
        pairs = zip(scores, dedicated, strict=True)
        if name == AUTOENCODER:
            cells = [f"{100 * (score / best - 1):+.1f} %" for score, best in pairs]
        else:
            cells = [f"{score - best:+.2f}" for score, best in pairs]
        rows.append([rival, *cells])
    return rows


SHOWN = """One network for all widths pays for it. With k drawn from p = 0.5 or uniformly, the
autoencoder's error is within an eighth of that of a network trained for the width from k = 8 on, and the
classifier within half a point; below, a network for the width is clearly better. At k = 1 the
classifier is far from it, since one linear classifier has to serve all sizes: log-spaced sizes make
up for a third of that deficit, with a head for each size for two thirds, and cost a little at the
large sizes. PCA of a plain classifier's features is as good from k = 8 on, where there are fewer
classes than features."""
