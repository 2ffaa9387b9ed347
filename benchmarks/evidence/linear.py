"""Two-layer linear networks, where the right answer is a singular value decomposition.

With targets equal to the inputs the best network of rank b is PCA with b components; with other
targets it is reduced-rank regression: the least-squares fit, projected on the first b right
singular vectors of its fitted values.

A linear network sees data only through its second moments, so where all data enter each step they
are replaced by as few rows as there are columns, with the same second moments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, mse_loss

from taildropout import TailDropout, scree
from taildropout.functional import expected_mse
from taildropout.lengths import Exponential, Lengths, Sizes, Uniform
from taildropout.measuring.cuts import Features

BATCH = 256
NO_DROPOUT = "control: no dropout"

Objective = Callable[[Tensor, Tensor], Tensor]  # of encoder and decoder
Method = Callable[["Pairs", int], Objective]  # of data and seed


@dataclass(frozen=True)
class Pairs:
    """Inputs and targets, both centred: `(samples, features)`."""

    inputs: Tensor
    targets: Tensor

    @cached_property
    def condensed(self) -> "Pairs":
        """As few rows as there are columns, with the same second moments."""
        both = torch.cat([self.inputs, self.targets], 1).double()
        values, axes = torch.linalg.eigh(both.T @ both / len(both))
        rows = (values.clamp(min=0) * len(values)).sqrt()[:, None] * axes.T
        inputs, targets = rows.to(self.inputs.dtype).split(
            [self.inputs.shape[1], self.targets.shape[1]], 1
        )
        return Pairs(inputs, targets)


class Optimum:
    """The best linear maps of each rank: PCA, or reduced-rank regression."""

    def __init__(self, pairs: Pairs) -> None:
        self.inputs, self.targets = pairs.inputs.double(), pairs.targets.double()
        self.fitted = self.inputs @ (torch.linalg.pinv(self.inputs) @ self.targets)
        _, values, axes = torch.linalg.svd(self.fitted, full_matrices=False)
        self.axes = axes.T  # (targets, rank), most important first
        unexplained = values.square().sum() - values.square().cumsum(0)
        noise = (self.targets - self.fitted).square().sum()
        self.errors = (noise + unexplained).tolist()  # of rank 1, 2, ...

    def excess(self, encoder: Tensor, decoder: Tensor, features: Features = "first") -> list[float]:
        """How much more squared error k features make, as a fraction of the optimum's."""
        errors = self._errors(encoder, decoder, self.targets, None, features)
        return [error / best - 1 for error, best in zip(errors, self.errors, strict=False)]

    def distances(
        self, encoder: Tensor, decoder: Tensor, features: Features = "first"
    ) -> list[float]:
        """|Y_b - Y_b*| / |Y_b*| of the fitted values of b features and of the optimum."""
        result = []
        for k in range(1, len(encoder) + 1):
            best = self.fitted @ self.axes[:, :k] @ self.axes[:, :k].T
            (error,) = self._errors(encoder, decoder, best, k, features)
            result.append(float(error**0.5 / best.norm()))
        return result

    def _errors(
        self, encoder: Tensor, decoder: Tensor, targets: Tensor, k: int | None, features: Features
    ) -> list[float]:
        """The squared error of k features over all samples; None: of each number of them.

        Each sample enters with both signs, so that condensed pairs have the mean zero too, which
        the principal components are taken from.
        """
        network = nn.Sequential(
            nn.utils.skip_init(nn.Linear, *encoder.T.shape, bias=False, dtype=torch.float64),
            TailDropout(),
            nn.utils.skip_init(nn.Linear, *decoder.T.shape, bias=False, dtype=torch.float64),
        )
        network.load_state_dict({"0.weight": encoder, "2.weight": decoder})
        measured = scree(
            network,
            lambda output, target: (output - target).square().sum(1),
            [(torch.cat([self.inputs, -self.inputs]), torch.cat([targets, -targets]))],
            ks=range(1, len(encoder) + 1) if k is None else [k],
            features=features,
            progress=False,
        )
        return (measured.loss * len(self.inputs)).tolist()

    def axis_error(self, decoder: Tensor) -> float:
        """The mean over features of 1 - cos^2 of the angle to the axis of the same number."""
        directions = nn.functional.normalize(decoder.double(), dim=0)
        cosines = (directions * self.axes[:, : decoder.shape[1]]).sum(0)
        return float((1 - cosines.square()).mean())


def exact(lengths: Lengths, pairs: Pairs, seed: int) -> Objective:
    """The expected error over all prefixes of all data."""
    few = pairs.condensed
    outputs = few.targets.shape[1]
    return lambda encoder, decoder: (
        outputs * expected_mse(few.inputs @ encoder.T, decoder, few.targets, lengths)
    )


def sampled(layer: nn.Module, pairs: Pairs, seed: int) -> Objective:
    """The error of a random batch behind a dropout layer."""
    outputs, count = pairs.targets.shape[1], len(pairs.inputs)
    generator = torch.Generator().manual_seed(seed)

    def objective(encoder: Tensor, decoder: Tensor) -> Tensor:
        batch = torch.randint(count, (BATCH,), generator=generator)
        codes = layer(pairs.inputs[batch] @ encoder.T)
        return outputs * mse_loss(linear(codes, decoder), pairs.targets[batch])

    return objective


def train(
    pairs: Pairs,
    method: Method,
    width: int,
    steps: int,
    seed: int,
    learning_rate: float = 1e-2,
) -> tuple[Tensor, Tensor]:
    """Encoder `(width, inputs)` and decoder `(targets, width)` after Adam with one cycle."""
    torch.manual_seed(seed)
    inputs, targets = pairs.inputs.shape[1], pairs.targets.shape[1]
    encoder = torch.randn(width, inputs, dtype=pairs.inputs.dtype) / inputs**0.5
    square = inputs == targets
    decoder = encoder.T.clone() if square else torch.randn(targets, width).to(encoder) / width**0.5
    weights = [encoder.requires_grad_(), decoder.requires_grad_()]
    optimizer = torch.optim.Adam(weights, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    error = method(pairs, seed)
    for _ in range(steps):
        optimizer.zero_grad()
        error(encoder, decoder).backward()
        optimizer.step()
        schedule.step()
    return encoder.detach(), decoder.detach()


def methods(
    width: int, exact_ps: Sequence[float], sampled_ps: Sequence[float]
) -> dict[str, Method]:
    """The methods with uniform lengths and with each p, and the controls."""
    result: dict[str, Method] = {"`Uniform()`, exact": partial(exact, Uniform())}
    result |= {f"p = {p:g}, exact": partial(exact, Exponential(p)) for p in exact_ps}
    result["`Uniform()`, sampled"] = partial(sampled, TailDropout(lengths=Uniform()))
    result |= {f"p = {p:g}, sampled": partial(sampled, TailDropout(p)) for p in sampled_ps}
    result["control: `nn.Dropout(0.5)`"] = partial(sampled, nn.Dropout())
    result[NO_DROPOUT] = partial(exact, Sizes([width]))
    return result
