"""How much faster does a whole network train when the tails are not computed?

A training step (forward and backward, all gradients) of a network without any dropout, of the same
nested with masks, and of it as an Elastic, in turn in one process; printed are medians, as speed
against the network without dropout, and what the FLOPs alone would allow. Then what it costs: the
time of a step against the number of groups, and of layers, as a picture.

    python benchmarks/elastic.py [--quick] [--json FILE] [--picture docs/images/elastic.png]
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from evidence.report import count_flops
from matplotlib.figure import Figure
from timing import Time, devices, human, machine, parser, take_turns, write_json
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import taildropout as td
from taildropout import Elastic
from taildropout.lengths import Exponential

GROUPS = [1, 2, 4, 8, 16, 32]
LAYERS = [1, 2, 4, 8, 16]
PS = [0.5, 0.8]


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    groups: int = 8


def mlp(layers: int = 3, width: int = 2048) -> nn.Module:
    widths = [784, *[width] * layers]
    hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def gpt2(width: int = 256, layers: int = 4) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        **{"n_embd": width, "n_layer": layers, "n_head": 4, "vocab_size": 256, "n_positions": 128},
        **{"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "use_cache": False},
        **{"bos_token_id": 0, "eos_token_id": 0},
    )
    return GPT2LMHeadModel(config)


class Block(nn.Module):
    """Two convolutions beside a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            *(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()),
            *(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.inside(x))


def conv_blocks(channels: int = 128) -> nn.Module:
    blocks = [Block(channels) for _ in range(4)]
    return nn.Sequential(
        *(nn.Conv2d(3, channels, 3, padding=1), *blocks),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)),
    )


CASES = {
    "MLP, 3 layers of 2048, batch 4096": Case(mlp, lambda: torch.randn(4096, 784)),
    "GPT-2, 4 layers of 256, 32 texts of 128": Case(
        gpt2, lambda: torch.randint(0, 256, (32, 128)), groups=4
    ),
    "4 blocks of convolutions, 128 channels, 64 images of 16": Case(
        conv_blocks, lambda: torch.randn(64, 3, 16, 16), groups=4
    ),
}
QUICK = {
    "MLP, 3 layers of 512, batch 1024": Case(
        lambda: mlp(width=512), lambda: torch.randn(1024, 784), groups=4
    )
}


def step(forward: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """BatchNorm with fixed statistics; the gradient of the mean of what comes out."""
    forward.train()
    for module in forward.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    parameters = list(forward.parameters())

    def run() -> object:
        output = forward(x)
        output = output if isinstance(output, torch.Tensor) else output.logits
        return torch.autograd.grad(output.square().mean(), parameters)

    return run


def nested(
    case: Case, p: float, device: str, groups: int | None = None
) -> tuple[nn.Module, Elastic]:
    """A model with masks, and it as an Elastic."""
    model, x = case.make().to(device), case.inputs().to(device)[:4]
    td.nest(model, x, lengths=Exponential(p))
    return model, Elastic(model, x, groups=groups or case.groups)


def measure(case: Case, device: str, rounds: int) -> tuple[dict[str, Time], dict[str, float]]:
    x = case.inputs().to(device)
    plain = case.make().to(device)
    rivals = {"no dropout": step(plain, x)}
    for p in PS:
        model, elastic = nested(case, p, device)
        rivals[f"masks {p}"] = step(copy.deepcopy(model), x)
        rivals[f"Elastic {p}"] = step(elastic, x)
    flops = {name: count_flops(run) for name, run in rivals.items()}
    allowed = {name: flops["no dropout"] / count for name, count in flops.items()}
    return take_turns(rivals, rounds), allowed


def growth(quick: bool, rounds: int) -> dict[str, dict[int, dict[str, Time]]]:
    """Of small networks, where the calls of the groups cost most."""
    width = 256
    found: dict[str, dict[int, dict[str, Time]]] = {"groups": {}, "layers": {}}
    for groups in GROUPS[:3] if quick else GROUPS:
        case = Case(lambda: mlp(4, width), lambda: torch.randn(1024, 784))
        _, elastic = nested(case, 0.5, "cpu", groups)
        rivals = {
            "Elastic": step(elastic, case.inputs()),
            "no dropout": step(case.make(), case.inputs()),
        }
        found["groups"][groups] = take_turns(rivals, rounds)
    for layers in LAYERS[:3] if quick else LAYERS:
        case = Case(lambda layers=layers: mlp(layers, width), lambda: torch.randn(1024, 784))  # type: ignore[misc]
        _, elastic = nested(case, 0.5, "cpu")
        rivals = {
            "Elastic": step(elastic, case.inputs()),
            "no dropout": step(case.make(), case.inputs()),
        }
        found["layers"][layers] = take_turns(rivals, rounds)
    return found


def draw(found: dict[str, dict[int, dict[str, Time]]], picture: Path) -> None:
    fig = Figure(figsize=(11, 4), layout="constrained")
    for ax, (what, times) in zip(fig.subplots(1, 2), found.items(), strict=True):
        for name in ("no dropout", "Elastic"):
            ms = [of_both[name].median * 1e3 for of_both in times.values()]
            ax.plot(list(times), ms, marker=".", label=name)
        ax.set(xscale="log", xlabel=f"number of {what}", ylabel="ms for a training step")
        ax.set_xticks(list(times), map(str, times), minor=False)
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    fig.text(
        0, 0, f"hidden layers of 256, 1,024 samples, p = 0.5. {machine()}", fontsize=6, color="0.5"
    )
    fig.savefig(picture, dpi=120)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--picture", type=Path, default=Path("docs/images/elastic.png"))
    args = options.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    print(machine())
    names = [f"{kind} {p}" for p in PS for kind in ("masks", "Elastic")]
    print(
        f"| network | no dropout | {' | '.join(names)} | FLOPs allow at {' and '.join(map(str, PS))} |"
    )
    print("|---|---|" + "---|" * (len(names) + 1))
    results: list[Any] = []
    for device in devices():
        for name, case in (QUICK if args.quick else CASES).items():
            times, allowed = measure(case, device, 3 if args.quick else 9)
            base = times["no dropout"].median
            speeds = " | ".join(f"{base / times[name].median:.2f}" for name in names)
            best = " and ".join(f"{allowed[f'Elastic {p}']:.2f}" for p in PS)
            print(f"| {name} {device} | {human(base)} | {speeds} | {best} |", flush=True)
            results.append({"network": name, "device": device, "times": times, "allowed": allowed})
    found = growth(args.quick, 3 if args.quick else 9)
    draw(found, args.picture)
    print(args.picture)
    write_json(args.json, {"training": results, "growth": found})


if __name__ == "__main__":
    main()
