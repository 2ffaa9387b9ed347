"""What does a network cost at a width, as an Elastic and cut to it?

The time of a call in eval, and the memory of its weights, at several widths: of an `Elastic` inside
`at_width`, which serves all widths from one set of weights, and of the network that `prune` makes
for that width. Both take turns in one process; printed are medians.

    python benchmarks/serving.py [--quick] [--json FILE]
"""

from typing import Any

import torch
from elastic import conv_blocks, gpt2, mlp
from timing import devices, human, machine, parser, take_turns, write_json
from torch import nn

import taildropout as td
from taildropout import Elastic

WIDTHS = [1 / 8, 1 / 4, 1 / 2, 1.0]
BATCHES = [1, 64]
CASES = {
    "MLP, 3 layers of 2048": (mlp, lambda batch: torch.randn(batch, 784)),
    "GPT-2, 4 layers of 256, 64 tokens": (gpt2, lambda batch: torch.randint(0, 256, (batch, 64))),
    "4 blocks of convolutions, 128 channels, images of 16": (
        conv_blocks,
        lambda batch: torch.randn(batch, 3, 16, 16),
    ),
}


def megabytes(model: nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


@torch.no_grad()
def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    print(machine())
    print("| network | batch | width | cut | Elastic | times slower | MB cut | MB of all widths |")
    print("|---|---|---|---|---|---|---|---|")
    results: list[Any] = []
    for device in devices():
        for name, (make, inputs) in list(CASES.items())[: 1 if args.quick else None]:
            model = make().to(device).eval()
            td.nest(model, inputs(2).to(device))
            elastic = Elastic(model, inputs(2).to(device), groups=1).eval()
            for width in WIDTHS[1:2] if args.quick else WIDTHS:
                small = td.finalize(td.prune(model, width, inputs(2).to(device))).eval()
                for batch in BATCHES:
                    x = inputs(batch).to(device)
                    with td.at_width(elastic, width):
                        times = take_turns(
                            {
                                "cut": lambda s=small, x=x: s(x),
                                "Elastic": lambda e=elastic, x=x: e(x),
                            },
                            3 if args.quick else 15,
                        )
                    cut, ours = times["cut"].median, times["Elastic"].median
                    print(
                        f"| {name} {device} | {batch} | {width:g} | {human(cut)} | {human(ours)} | "
                        f"{ours / cut:.2f} | {megabytes(small):.1f} | {megabytes(model):.1f} |",
                        flush=True,
                    )
                    results.append(
                        {"network": name, "batch": batch, "width": width, "times": times}
                    )
    write_json(args.json, results)


if __name__ == "__main__":
    main()
