"""How well does each distribution of k order the features?

A linear autoencoder (64 pixels, 16 features) learns scikit-learn's digits under the exact
objective, the expected error over all prefixes, so that nothing here is noise of sampling. Full
order means that each prefix does as well as PCA with as many components. Printed is, for each
distribution, how much worse the worst prefix is than PCA, and the mean distance of the features'
directions from the principal axes, 1 - cos^2. The control trains all features always.

    python benchmarks/order.py [--steps 8000] [--seeds 3] [--json FILE]
"""

import argparse
import json
import os
import platform
import statistics
from datetime import date
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from taildropout.lengths import Exponential, Lengths, Sizes, Uniform

WIDTH = 16
RIVALS: dict[str, Lengths] = {
    "Uniform()": Uniform(),
    "p = 0.5": Exponential(0.5),
    "p = 0.1": Exponential(0.1),
    "p = 0.01": Exponential(0.01),
    "p = 0.001": Exponential(0.001),
    "none (control)": Sizes([WIDTH]),
}


def covariance() -> Tensor:
    pixels = torch.tensor(load_digits().data) / 16
    return torch.cov(pixels.T, correction=0)


def train(cov: Tensor, lengths: Lengths, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Encoder and decoder at the end of Adam on the exact objective, annealed.

    With s_j = P(K >= j) and S_ij = s_max(i,j) the expected squared error is
    tr C - 2 tr(W diag(s) E C) + tr((W'W * S) E C E'); Bao, Lucas, Sachdeva and Grosse (2020).
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = len(cov)
    encoder = torch.randn(WIDTH, pixels, generator=generator).double() / pixels**0.5
    decoder = encoder.T.clone()
    encoder.requires_grad_()
    decoder.requires_grad_()
    reaches = lengths.pmf(WIDTH).flip(0).cumsum(0).flip(0)[1:]
    both = torch.minimum(reaches[:, None], reaches)
    optimizer = torch.optim.Adam([encoder, decoder], lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        code = encoder @ cov
        gram = (decoder.T @ decoder) * both
        error = cov.trace() - 2 * (decoder * reaches * code.T).sum() + (gram @ code * encoder).sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
    return encoder.detach(), decoder.detach()


def compare_with_pca(cov: Tensor, encoder: Tensor, decoder: Tensor) -> tuple[float, float]:
    """Excess error of the worst prefix, as a fraction of PCA's error, and the axis error."""
    values, axes = (part.flip(-1) for part in torch.linalg.eigh(cov))
    excess = []
    for k in range(1, WIDTH + 1):
        residual = torch.eye(len(cov)).double() - decoder[:, :k] @ encoder[:k]
        error = (residual @ cov * residual).sum()
        pca = values[k:].sum()
        excess.append(float(error / pca - 1))
    directions = decoder / decoder.norm(dim=0)
    cosines = (directions * axes[:, :WIDTH]).sum(0)
    return max(excess), float((1 - cosines.square()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cov = covariance()
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}, torch {torch.__version__}, {date.today()}")
    print(f"{arguments.steps} steps, median of {arguments.seeds} seeds")
    print(f"{'lengths':<16} {'worst prefix above PCA':>24} {'axis error':>12}")
    rows = {}
    for name, lengths in RIVALS.items():
        runs = [
            compare_with_pca(cov, *train(cov, lengths, arguments.steps, seed))
            for seed in range(arguments.seeds)
        ]
        excess, axis = (statistics.median(column) for column in zip(*runs, strict=True))
        rows[name] = {"excess": excess, "axis_error": axis}
        print(f"{name:<16} {excess:>23.4%} {axis:>12.2e}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
