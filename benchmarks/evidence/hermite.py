"""A nonlinear truth: the features of jointly Gaussian pairs are the Hermite polynomials.

For x, y with E y|x = rho x the operator that takes g to E[g(y) | x] has the singular functions
He_j, with the singular values |rho|^j (Mehler 1866). Its best approximation of rank k minimises
-2 E[f(x).g(y)] + tr(Cov f Cov g) over f and g with k features each: the squared Hilbert-Schmidt
distance, up to a constant.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from taildropout import TailDropout
from taildropout.lengths import Lengths, Uniform

from .report import Numbers, Settings, table

TITLE = "Hermite polynomials from correlated Gaussians"
SEEDS = 3
WIDTH, HIDDEN, BATCH, FRESH = 6, 64, 4096, 200_000
TARGETS = [0.999, 0.995, 0.98, 0.93]  # |correlation| with He_1, He_2, ...

DONE = f"""\
x and y are jointly Gaussian with correlation {{rho:g}}. Two networks, f(x) and g(y), 1 → {HIDDEN} →
{HIDDEN} → {WIDTH} with SiLU, minimise -2 E[f·g] + tr(Cov f Cov g) of their centred features: the
best approximation of the operator g ↦ E[g(y) | x], whose singular functions are, in order, the
Hermite polynomials He_j, with singular values |rho|^j. (Centred, since the first singular function
of all is the constant, which is trivial.) {{steps:,}} steps of Adam, one cycle, each with {BATCH:,}
fresh pairs.

A covariance belongs to a batch, so k is one for the whole batch, and the same for f and g:
`TailDropout(lengths=Uniform(), batch_dim=())` on the two stacked. *Exact* is the expectation over
k instead, -2 Σ_j s_j C_jj + Σ_ij S_ij A_ij B_ij with s_j = P(K ≥ j), S_ij = s_max(i,j). The control
has no layer. Printed is the |correlation| of feature j of f, and of g, with He_j under the Gaussian
(by numerical integration): the smallest over the seeds. 1 is He_j up to scale and sign. The second
control orders the features of the first afterwards, by a singular value decomposition of the
cross-covariance of the whitened features on {FRESH:,} fresh pairs (canonical correlations)."""

SHOWN = """\
{verdict} Without a layer, single features are nothing in particular. But the second control shows
that they span the functions: where a linear rotation of the features can be computed afterwards, as
here, it is a rival to training in order. For He_5 and He_6 nothing was set: a singular value of
|rho|^j leaves ever less to learn from. Covariances want large batches: cut into 16 groups of 256
pairs, each with its own k and covariances, whose product is biased, sampled features came out worse
in a trial (He_4: 0.94)."""


def measure(settings: Settings, seeds: list[int]) -> Numbers:
    """Loss -> "f" or "g" -> |correlations| with He_j, one list by j for each seed."""
    losses = {
        "`Uniform()`, exact": expected_loss(Uniform()),
        "`Uniform()`, sampled": sampled_loss(TailDropout(lengths=Uniform(), batch_dim=())),
        "p = 0.5, sampled": sampled_loss(TailDropout(0.5, batch_dim=())),
        "control: no layer": sampled_loss(nn.Identity()),
    }
    networks = {
        name: [train(loss, settings.rho, steps(settings), seed) for seed in seeds]
        for name, loss in losses.items()
    }
    networks["control: SVD afterwards"] = [
        rotated(f, g, settings.rho) for f, g in networks["control: no layer"]
    ]
    return {
        name: {
            "f": [correlations_with_hermite(f) for f, _ in runs],
            "g": [correlations_with_hermite(g) for _, g in runs],
        }
        for name, runs in networks.items()
    }


def steps(settings: Settings) -> int:
    return 300 if settings.quick else 4000


def text(numbers: Numbers, settings: Settings) -> str:
    rows, missed = [], []
    for name, runs in numbers.items():
        for of, correlations in runs.items():
            smallest = [min(column) for column in zip(*correlations, strict=True)]
            rows.append([name, of, *[f"{value:.4f}" for value in smallest]])
            if "control" not in name:
                missed += [
                    f"He_{j} of {of} from {name} ({value:.4f})"
                    for j, (value, target) in enumerate(zip(smallest, TARGETS, strict=False), 1)
                    if value < target
                ]
    verdict = f"Set in advance for He_1 to He_4: at least {', '.join(map(str, TARGETS))}; "
    verdict += f"missed by {'; '.join(missed)}." if missed else "reached with the layer throughout."
    head = ["k from", "", *[f"He_{j}" for j in range(1, WIDTH + 1)]]
    done = DONE.format(rho=settings.rho, steps=steps(settings))
    return "\n\n".join([done, table(head, rows), SHOWN.format(verdict=verdict)])


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(1, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU()),
        nn.Linear(HIDDEN, WIDTH),
    )


def train(
    loss: Callable[[Tensor, Tensor], Tensor], rho: float, steps: int, seed: int
) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    f, g = network(), network()
    optimizer = torch.optim.Adam([*f.parameters(), *g.parameters()], lr=5e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 5e-3, total_steps=steps, pct_start=0.05
    )
    for _ in range(steps):
        x, y = pairs(BATCH, rho)
        optimizer.zero_grad()
        loss(f(x), g(y)).backward()
        optimizer.step()
        schedule.step()
    return f, g


def pairs(count: int, rho: float) -> tuple[Tensor, Tensor]:
    x, independent = torch.randn(2, count, 1)
    return x, rho * x + math.sqrt(1 - rho**2) * independent


@torch.no_grad()
def rotated(f: nn.Module, g: nn.Module, rho: float) -> tuple[nn.Module, nn.Module]:
    """f and g followed by the linear maps to their canonical variables."""
    x, y = pairs(FRESH, rho)
    features, others = (part.double() - part.double().mean(0) for part in (f(x), g(y)))
    whiten, whiten_others = (
        torch.linalg.inv(torch.linalg.cholesky(part.T @ part / FRESH)).T
        for part in (features, others)
    )
    left, _, right = torch.linalg.svd(whiten.T @ (features.T @ others / FRESH) @ whiten_others)
    return Rotated(f, whiten @ left), Rotated(g, whiten_others @ right.T)


class Rotated(nn.Module):
    def __init__(self, network: nn.Module, rotation: Tensor) -> None:
        super().__init__()
        self.network, self.rotation = network, rotation

    def forward(self, input: Tensor) -> Tensor:
        return self.network(input).double() @ self.rotation


def sampled_loss(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(f: Tensor, g: Tensor) -> Tensor:
        f, g = layer(torch.stack([f, g]))  # one k for the whole call
        f, g = f - f.mean(0), g - g.mean(0)
        return -2 * (f * g).sum(1).mean() + ((f.T @ f) * (g.T @ g)).sum() / len(f) ** 2

    return loss


def expected_loss(lengths: Lengths) -> Callable[[Tensor, Tensor], Tensor]:
    reached = lengths.pmf(WIDTH).flip(0).cumsum(0).flip(0)[1:].float()  # P(K >= j)
    both = torch.minimum(reached[:, None], reached)

    def loss(f: Tensor, g: Tensor) -> Tensor:
        f, g = f - f.mean(0), g - g.mean(0)
        single = ((f * g).mean(0) * reached).sum()
        return -2 * single + ((f.T @ f) * (g.T @ g) * both).sum() / len(f) ** 2

    return loss


def correlations_with_hermite(network: nn.Module, count: int = WIDTH) -> list[float]:
    """|correlation| of feature j with He_j under the standard normal, j = 1, 2, ..."""
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    weights = torch.exp(-x.square() / 2)
    weights /= weights.sum()
    with torch.no_grad():
        features = network(x[:, None].float()).double()
    features = features - weights @ features
    features /= (weights @ features.square()).sqrt()
    polynomials = [torch.ones_like(x), x]
    for j in range(1, count):
        polynomials.append(x * polynomials[j] - j * polynomials[j - 1])
    hermite = torch.stack(polynomials[1:], 1)
    hermite /= (weights @ hermite.square()).sqrt()
    correlations: list[float] = (weights @ (features * hermite)).abs().tolist()
    return correlations
