"""How much faster is the loss at all ks in one pass than one run of the network for each k?

The plain loop sets k, runs the network and takes the loss, for each k of each batch. It is timed
on every eighth k and multiplied, since all take the same time. `td.scree` measures all ks, with
its checks of the first batch. Both take turns; printed are medians for 10,000 samples. The floor
is one run of the network over the data.

    python benchmarks/scree.py [--quick] [--json FILE]
"""

import statistics
from collections.abc import Callable

import torch
from timing import _seconds, human, machine, parser, write_json
from torch import Tensor, nn

import taildropout as td

BATCH = 500


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), td.TailDropout(), nn.Linear(128, 10)),
    )


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), td.TailDropout(), nn.Linear(512, 10))


def autoencoder() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 32), td.TailDropout()),
        *(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 784)),
    )


def measure(model: nn.Module, n: int, classifies: bool, samples: int, rounds: int) -> dict:
    images = torch.rand(samples, 784)
    targets = torch.randint(10, (samples,)) if classifies else images
    loss = nn.CrossEntropyLoss() if classifies else nn.MSELoss()
    data = list(zip(images.split(BATCH), targets.split(BATCH), strict=True))
    (layer,) = td.tail_dropouts(model.eval()).values()
    some = range(0, n + 1, 8)

    @torch.no_grad()
    def loop() -> None:
        for k in some:
            with layer.using_k(k):
                for inputs, target in data[:2]:
                    per_sample(model(inputs), target)

    def per_sample(output: Tensor, target: Tensor) -> Tensor:
        if classifies:
            return nn.functional.cross_entropy(output, target, reduction="none")
        return nn.functional.mse_loss(output, target, reduction="none").mean(1)

    @torch.no_grad()
    def once() -> None:
        for inputs, _ in data:
            model(inputs)

    def together() -> None:
        td.scree(model, loss, data, ks=range(n + 1), progress=False)

    rivals: dict[str, Callable[[], object]] = {"loop": loop, "scree": together, "one run": once}
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, call in rivals.items():
            times[name].append(_seconds(call, 1))
    median = {name: statistics.median(values) for name, values in times.items()}
    median["loop"] *= len(data) / len(data[:2]) * (n + 1) / len(some)
    return median


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    print(machine())
    print("| network | ks | plain loop | scree | times faster | runs of the network |")
    print("|---|---|---|---|---|---|")
    cases = {
        "CNN, layer of 128 before the last Linear": (convolutional(), 128, True),
        "MLP 784-512-10, layer of 512": (perceptron(), 512, True),
        "autoencoder 784-256-32-256-784": (autoencoder(), 32, False),
    }
    results = []
    for name, (model, n, classifies) in cases.items():
        times = measure(model, n, classifies, 2000 if args.quick else 10_000, rounds=5)
        print(
            f"| {name} | {n + 1} | {human(times['loop'])} | {human(times['scree'])} | "
            f"{times['loop'] / times['scree']:.0f} | {times['scree'] / times['one run']:.1f} |",
            flush=True,
        )
        results.append({"network": name, "seconds": times})
    write_json(args.json, results)


if __name__ == "__main__":
    main()
