"""How much faster does `choose_widths` go the way that a scree of every layer in each round goes?

Both take turns; printed are medians of the CPU time, and whether the widths are the same.

    python benchmarks/widths.py [--quick] [--json FILE]
"""

import statistics
import time

import torch
from by_screes import by_screes
from timing import human, machine, parser, write_json
from torch import Tensor, nn

import taildropout as td


def chain(layers: int, width: int) -> nn.Module:
    blocks = [
        (nn.Linear(64 if i == 0 else width, width), nn.ReLU(), td.TailDropout())
        for i in range(layers)
    ]
    return nn.Sequential(*(module for block in blocks for module in block), nn.Linear(width, 10))


def trained(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(20):
        for inputs, classes in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), classes).backward()
            optimizer.step()
    return model.eval()


def measure(
    model: nn.Module, data: list[tuple[Tensor, Tensor]], inputs: Tensor, rounds: int
) -> tuple[dict[str, float], dict[str, list[dict[str, int]]]]:
    """Of both ways the median time, and the widths on the way to half of the parameters."""
    loss = nn.CrossEntropyLoss()

    def choose() -> list[dict[str, int]]:
        path = td.choose_widths(model, loss, data, 0.5, inputs, progress=False)
        return [step.widths for step in path.steps]

    rivals = {"screes": lambda: by_screes(model, loss, data, 0.5, inputs), "choose_widths": choose}
    times: dict[str, list[float]] = {name: [] for name in rivals}
    paths = {}
    for _ in range(rounds):
        for name, call in rivals.items():
            start = time.process_time()  # which other programs on the machine don't change much
            paths[name] = call()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}, paths


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine())
    print("| network | rounds | a scree of every layer | `choose_widths` | times faster | same |")
    print("|---|---|---|---|---|---|")
    teacher = nn.Linear(64, 10)
    inputs = torch.randn(1200, 64)
    data = list(zip(inputs.split(200), teacher(inputs).argmax(1).split(200), strict=True))
    results = []
    for width in (64,) if args.quick else (64, 256):
        model = trained(chain(8, width), data[:4])
        times, paths = measure(model, data[4:], inputs[:2], rounds=1 if args.quick else 3)
        same = paths["screes"] == paths["choose_widths"]
        name = f"8 layers of {width}"
        print(
            f"| {name} | {len(paths['screes']) - 1} | {human(times['screes'])} | "
            f"{human(times['choose_widths'])} | {times['screes'] / times['choose_widths']:.1f} | "
            f"{same} |",
            flush=True,
        )
        results.append({"network": name, "seconds": times, "same": same})
    write_json(args.json, results)


if __name__ == "__main__":
    main()
