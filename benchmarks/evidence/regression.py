"""The best approximations of every rank, from one two-layer linear network."""

import statistics

import torch

from .linear import Optimum, Pairs, methods, train
from .report import CONTROLS, Numbers, Settings, median, power, table

TITLE = "Best approximations of every rank"
SEEDS = 3
SAMPLES, INPUTS, TARGETS, WIDTH = 5000, 24, 16, 10
PS = [0.5, 0.1, 0.01]

DONE = f"""\
y = Bx + noise: {SAMPLES:,} pairs, {INPUTS} correlated inputs, {TARGETS} targets, B with singular
values 0.8^j before mixing, as much noise as signal. The network is y ≈ W₂ W₁ x with {WIDTH}
features between, trained as above ({{steps:,}} steps, batches of 256 where sampled). The control is
the closed form, reduced-rank regression: the least-squares fit projected on the first b right
singular vectors of its fitted values, the best map of rank b on these pairs. A column is
‖Ŷ_b - Ŷ*_b‖ / ‖Ŷ*_b‖, the distance of the fitted values of the first b features from the closed
form's, median over the seeds (each with its own B and pairs). The last two columns are controls of
the same network (`td.scree` with `features="random"` and `"principal"`): the largest distance at
b < {WIDTH} of as many random features instead of the first, and of the projection of its features
on their first b principal components."""

SHOWN = """\
Distances are of the maps, not of the losses: a distance of 0.01 is 0.0001 of the explained sum of
squares. Sampled training stays at the noise of its batches of 256, at every b, which includes b = n
and the control with `nn.Dropout`. Not shown: anything on new pairs; closed form and network are
compared on the pairs that both were fitted to."""


def measure(settings: Settings, seeds: list[int]) -> Numbers:
    """Method -> "first", "random", "principal": distances, one list by b for each seed."""
    numbers: Numbers = {}
    for seed in seeds:
        data = pairs(seed)
        optimum = Optimum(data)
        for name, method in methods(WIDTH, PS, PS).items():
            weights = train(data, method, WIDTH, steps(settings), seed)
            of_method = numbers.setdefault(name, {"first": [], **{f: [] for f in CONTROLS}})
            for features, distances in of_method.items():
                distances.append(optimum.distances(*weights, features))
    return numbers


def steps(settings: Settings) -> int:
    return 1000 if settings.quick else 8000


def text(numbers: Numbers, settings: Settings) -> str:
    rows = []
    for name, run in numbers.items():
        cells = median(run["first"])
        cells += [statistics.median(max(by_b[:-1]) for by_b in run[f]) for f in CONTROLS]
        rows.append([name, *map(power, cells)])
    head = ["k from", *[f"b = {b}" for b in range(1, WIDTH + 1)]]
    head += [f"largest, {words}" for words in CONTROLS.values()]
    return "\n\n".join([DONE.format(steps=steps(settings)), table(head, rows), SHOWN])


def pairs(seed: int) -> Pairs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = normal(SAMPLES, INPUTS) @ normal(INPUTS, INPUTS) / INPUTS**0.5
    left, right = (torch.linalg.qr(normal(size, TARGETS)).Q for size in (TARGETS, INPUTS))
    signal = inputs @ (left * 0.8 ** torch.arange(TARGETS) @ right.T).T
    targets = signal + normal(SAMPLES, TARGETS) * signal.std()
    return Pairs(inputs - inputs.mean(0), targets - targets.mean(0))
