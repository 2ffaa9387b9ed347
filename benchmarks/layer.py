"""What does the layer cost, beside nn.Dropout, a straightforward mask, and the floor?

The floor of a forward and a backward pass is two copies of the tensor: each reads and writes
every number once. All rivals take turns in one process; printed are medians, as multiples of the
floor, and how many times faster TailDropout is than nn.Dropout. "saved" is what autograd keeps for
the backward pass, by saved-tensor hooks.

    python benchmarks/layer.py [--quick] [--json FILE]
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import devices, human, machine, parser, take_turns, write_json
from torch import Tensor, nn

from taildropout import TailDropout


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dropout_dim: int = -1
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    compiled: bool = False

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        words += ["channels_last"] if self.memory_format == torch.channels_last else []
        words += ["compiled"] if self.compiled else []
        return " ".join(words)


IMAGES = (64, 128, 28, 28)
QUICK = [Case((128, 64)), Case((1024, 512)), Case((4096, 1024))]
ALL = [
    *QUICK,
    Case((1024, 512), dtype=torch.bfloat16),
    Case((4096, 1024), dtype=torch.bfloat16),
    Case(IMAGES, 1),
    Case(IMAGES, 1, memory_format=torch.channels_last),
    Case((32, 128, 512)),
    Case((1024, 512), compiled=True),
    Case((4096, 1024), compiled=True),
]


class StraightforwardMask(nn.Module):
    """What one writes first: uniform k, a mask by comparison, where."""

    def __init__(self, dropout_dim: int) -> None:
        super().__init__()
        self.dropout_dim = dropout_dim

    def forward(self, input: Tensor) -> Tensor:
        n = input.shape[self.dropout_dim]
        along = [1] * input.ndim
        along[self.dropout_dim] = n
        k = torch.randint(n + 1, (len(input), *[1] * (input.ndim - 1)), device=input.device)
        position = torch.arange(n, device=input.device).view(along)
        return torch.where(position < k, input, 0.0)


def step(layer: Callable[[Tensor], Tensor], input: Tensor, grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(layer(input), input, grad)


def saved_bytes(layer: nn.Module, input: Tensor) -> int:
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.append(tensor.nbytes), lambda _: None
    ):
        layer(input)
    return sum(sizes)


def measure(case: Case, device: str, rounds: int) -> dict[str, object]:
    def random() -> Tensor:
        numbers = torch.randn(case.shape, dtype=case.dtype, device=device)
        return numbers.to(memory_format=case.memory_format)

    plain, grad = random(), random()
    input = random().requires_grad_()
    layers: dict[str, nn.Module] = {
        "nn.Dropout": nn.Dropout(),
        "mask": StraightforwardMask(case.dropout_dim),
        "TailDropout": TailDropout(dropout_dim=case.dropout_dim),
    }
    saved = {name: saved_bytes(layer, input) / len(input) for name, layer in layers.items()}
    if case.compiled:
        layers = {name: torch.compile(layer, fullgraph=True) for name, layer in layers.items()}

    def floor() -> tuple[Tensor, Tensor]:
        return plain.clone(), grad.clone()

    steps = {name: step(layer, input, grad) for name, layer in layers.items()}
    times = take_turns({"floor": floor, **steps}, rounds)
    return {"case": str(case), "device": device, "times": times, "saved_per_sample": saved}


def measure_eval(rounds: int) -> dict[str, object]:
    x = torch.randn(4, 4)
    tail, plain = TailDropout().eval(), nn.Dropout().eval()
    times = take_turns({"TailDropout": lambda: tail(x), "nn.Dropout": lambda: plain(x)}, rounds)
    return {"case": "eval", "device": "cpu", "times": times}


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    rounds = 5 if args.quick else 15
    print(machine())
    print(
        "| forward + backward | floor | nn.Dropout | mask | TailDropout (quartiles) "
        "| faster than nn.Dropout | saved per sample: nn.Dropout, TailDropout |"
    )
    print("|---|---|---|---|---|---|---|")
    results = []
    for device in devices():
        for case in QUICK if args.quick else ALL:
            result = measure(case, device, rounds)
            results.append(result)
            times, saved = result["times"], result["saved_per_sample"]
            floor, tail = times["floor"].median, times["TailDropout"]
            print(
                f"| {case} {device} | {human(floor)} | {times['nn.Dropout'].median / floor:.1f} | "
                f"{times['mask'].median / floor:.1f} | {tail.median / floor:.2f} "
                f"({tail.low / floor:.2f} to {tail.high / floor:.2f}) | "
                f"{times['nn.Dropout'].median / tail.median:.1f} times | "
                f"{saved['nn.Dropout']:.0f} B, {saved['TailDropout']:.0f} B |",
                flush=True,
            )
    result = measure_eval(rounds)
    results.append(result)
    print(
        "eval, one call:", ", ".join(f"{n} {human(t.median)}" for n, t in result["times"].items())
    )
    write_json(args.json, results)


if __name__ == "__main__":
    main()
