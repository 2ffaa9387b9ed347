"""How does the cost grow with the size of the input?

Time per element of a forward and backward pass against the number of elements, 10^3 to 10^8, for
TailDropout, nn.Dropout and the floor of two copies; and the time of drawing k against the batch
size for several n. Written as a picture.

    python benchmarks/growth.py [--quick] [--json FILE] [--picture docs/images/growth.png]
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from timing import Time, machine, parser, take_turns, write_json
from torch import nn

from taildropout import TailDropout
from taildropout.draws import draw
from taildropout.lengths import Exponential

FEATURES = 512
SIZES = [10**exponent for exponent in range(3, 9)]
BATCHES = [2**exponent for exponent in range(0, 21, 4)]
WIDTHS = [16, 512, 16_384]


def time_passes(size: int, rounds: int) -> dict[str, Time]:
    shape = (max(size // FEATURES, 1), min(FEATURES, size))
    grad, input = torch.randn(shape), torch.randn(shape, requires_grad=True)
    plain = input.detach()
    tail, dropout = TailDropout(), nn.Dropout()
    rivals = {
        "TailDropout": lambda: torch.autograd.grad(tail(input), input, grad),
        "nn.Dropout": lambda: torch.autograd.grad(dropout(input), input, grad),
        "floor: two copies": lambda: (plain.clone(), grad.clone()),
    }
    return take_turns(rivals, rounds)


def time_draws(batch: int, rounds: int) -> dict[str, Time]:
    lengths = Exponential(0.5)
    return take_turns(
        {f"n = {n:,}": lambda n=n: draw(lengths, n, batch) for n in WIDTHS},  # type: ignore[misc]
        rounds,
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--picture", type=Path, default=Path("docs/images/growth.png"))
    args = options.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    rounds = 3 if args.quick else 7
    sizes = SIZES[:4] if args.quick else SIZES
    passes = {size: time_passes(size, rounds) for size in sizes}
    draws = {batch: time_draws(batch, rounds) for batch in BATCHES}

    fig = Figure(figsize=(11, 4), layout="constrained")
    left, right = fig.subplots(1, 2)
    for name in passes[sizes[0]]:
        per_element = [passes[size][name].median / size * 1e9 for size in sizes]
        left.loglog(sizes, per_element, marker=".", label=name)
    left.set(
        xlabel="elements of the input", ylabel="ns per element", title="Forward and backward pass"
    )
    for name in draws[1]:
        micro = [draws[batch][name].median * 1e6 for batch in BATCHES]
        right.loglog(BATCHES, micro, marker=".", label=name)
    right.set(xlabel="samples in the batch", ylabel="µs", title="Drawing k for every sample")
    for ax in (left, right):
        ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    fig.text(0, 0, machine(), fontsize=6, color="0.5")
    fig.savefig(args.picture, dpi=120)
    print(f"{machine()}\n{args.picture}")
    write_json(args.json, {"passes": passes, "draws": draws})


if __name__ == "__main__":
    main()
