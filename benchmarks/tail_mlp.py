"""How much faster does an MLP train when the tail is not computed?

A training step (forward and backward, all gradients) of two Linear layers with GELU between
them, and of a gated MLP as Llama has it: without any dropout, with nn.Dropout, with TailDropout
(which computes the tail and zeroes it), and TailMLP, for several p. All take turns in one process;
printed are medians, as speed against the network without dropout. The ideal is 1 / (1 - p).

    python benchmarks/tail_mlp.py [--quick] [--json FILE]
"""

from collections.abc import Callable

import torch
from timing import Time, devices, human, machine, parser, take_turns, write_json
from torch import Tensor, nn

from taildropout import TailDropout, TailMLP

SHAPES = [(4096, 768, 3072), (1024, 1024, 4096), (2048, 256, 1024)]
GATED_SHAPES = [(2048, 768, 2048)]
PS = [0.2, 0.5, 0.8]


class GatedMLP(nn.Module):
    def __init__(self, features: int, hidden: int, *between: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Linear(features, hidden, bias=False)
        self.up = nn.Linear(features, hidden, bias=False)
        self.down = nn.Sequential(*between, nn.Linear(hidden, features, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def measure(
    shape: tuple[int, int, int], gated: bool, device: str, dtype: torch.dtype, rounds: int
) -> dict[str, Time]:
    batch, features, hidden = shape
    input = torch.randn(batch, features, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(batch, features, device=device, dtype=dtype)

    def network(*between: nn.Module) -> nn.Module:
        if gated:
            return GatedMLP(features, hidden, *between)
        return nn.Sequential(
            nn.Linear(features, hidden), nn.GELU(), *between, nn.Linear(hidden, features)
        )

    def step(model: nn.Module) -> Callable[[], object]:
        model = model.to(device, dtype)
        variables = [input, *model.parameters()]
        return lambda: torch.autograd.grad(model(input), variables, grad)

    rivals = {"no dropout": step(network()), "nn.Dropout": step(network(nn.Dropout()))}
    for p in PS:
        rivals[f"TailDropout {p}"] = step(network(TailDropout(p)))
        as_in_llama = {"activation": nn.SiLU, "bias": False, "gated": True}
        rivals[f"TailMLP {p}"] = step(
            TailMLP(features, hidden, p=p, **(as_in_llama if gated else {}))
        )
    return take_turns(rivals, rounds)


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    print(machine())
    names = ["nn.Dropout", *[f"{layer} {p}" for p in PS for layer in ("TailDropout", "TailMLP")]]
    print(f"| batch, features, hidden | no dropout | {' | '.join(names)} |")
    print("|---|---|" + "---|" * len(names))
    results = []
    for device in devices():
        dtypes = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16]
        for dtype in dtypes:
            shapes = [(shape, False) for shape in (SHAPES[1:] if args.quick else SHAPES)]
            for shape, gated in [*shapes, *((shape, True) for shape in GATED_SHAPES)]:
                times = measure(shape, gated, device, dtype, 3 if args.quick else 9)
                base = times["no dropout"].median
                speeds = " | ".join(f"{base / times[name].median:.2f}" for name in names)
                kind = f"{'gated ' if gated else ''}{device} {str(dtype).removeprefix('torch.')}"
                print(f"| {shape} {kind} | {human(base)} | {speeds} |", flush=True)
                results.append({"shape": shape, "kind": kind, "times": times})
    write_json(args.json, results)


if __name__ == "__main__":
    main()
