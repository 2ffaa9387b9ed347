"""How long does a classifier train to a given accuracy, with and without the tail?

An MLP (784 pixels, 2048 hidden, 10 classes) on Fashion-MNIST: without dropout, with nn.Dropout,
with TailDropout, with TailMLP. All are trained alike, with the same seeds; after each epoch the
held-out accuracy is measured, outside the clock. Printed are the seconds until each target is
first reached (median over the seeds), the seconds of one epoch, and the best accuracy.

    python benchmarks/training.py [--quick] [--json FILE]
"""

import gzip
import math
import statistics
import time
from collections.abc import Callable

import torch
from timing import machine, parser, write_json
from torch import Tensor, nn

from taildropout import TailDropout, TailMLP
from taildropout.demo.data import DEBIAN_FOLDER, load_fashion_mnist

HIDDEN, BATCH, P = 2048, 512, 0.5
TARGETS = [0.84, 0.85, 0.86]


def labels(part: str) -> Tensor:
    raw = gzip.decompress((DEBIAN_FOLDER / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    return torch.frombuffer(bytearray(raw[8:]), dtype=torch.uint8).long()


def sequential(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(784, HIDDEN), nn.GELU(), *between, nn.Linear(HIDDEN, 10))


RIVALS: dict[str, Callable[[], nn.Module]] = {
    "no dropout": sequential,
    "nn.Dropout": lambda: sequential(nn.Dropout(P)),
    "TailDropout": lambda: sequential(TailDropout(P)),
    "TailMLP": lambda: TailMLP(784, HIDDEN, 10, P),
}


class Run:
    """One network in training: an epoch at a time, so that the rivals can take turns."""

    def __init__(self, model: Callable[[], nn.Module], seed: int) -> None:
        torch.manual_seed(seed)
        self.model = model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.generator = torch.Generator().manual_seed(seed)
        self.seconds: list[float] = []
        self.accuracies: list[float] = []

    def epoch(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
        images, classes = train
        self.model.train()
        start = time.perf_counter()
        for batch in torch.randperm(len(images), generator=self.generator).split(BATCH):
            loss = nn.functional.cross_entropy(self.model(images[batch]), classes[batch])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.model.eval()
        with torch.no_grad():
            right = self.model(test[0]).argmax(1) == test[1]
        self.accuracies.append(right.double().mean().item())

    def seconds_to(self, accuracy: float) -> float:
        total = 0.0
        for seconds, reached in zip(self.seconds, self.accuracies, strict=True):
            total += seconds
            if reached >= accuracy:
                return total
        return math.inf


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    epochs, seeds = (2, 1) if args.quick else (8, 3)
    images = load_fashion_mnist()
    train, test = (images.train, labels("train")), (images.test, labels("t10k"))
    runs = {name: [Run(model, seed) for seed in range(seeds)] for name, model in RIVALS.items()}
    for _ in range(epochs):
        for seed in range(seeds):
            for name in RIVALS:
                runs[name][seed].epoch(train, test)
    print(machine())
    print(f"{epochs} epochs, {seeds} seeds")
    print(f"| | one epoch | {' | '.join(f'to {t:.0%}' for t in TARGETS)} | best accuracy |")
    print("|---|---|" + "---|" * len(TARGETS) + "---|")
    results = {}
    for name, of_seeds in runs.items():
        epoch = statistics.median(seconds for run in of_seeds for seconds in run.seconds)
        to = [statistics.median(run.seconds_to(target) for run in of_seeds) for target in TARGETS]
        best = statistics.median(max(run.accuracies) for run in of_seeds)
        cells = " | ".join(f"{s:.1f} s" if math.isfinite(s) else "not reached" for s in to)
        print(f"| {name} | {epoch:.2f} s | {cells} | {best:.1%} |")
        results[name] = {
            "seconds": [run.seconds for run in of_seeds],
            "accuracies": [run.accuracies for run in of_seeds],
        }
    write_json(args.json, results)


if __name__ == "__main__":
    main()
