"""Stratified against independent draws of k: the variance of a step's loss and gradient."""

import statistics

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from taildropout import TailDropout
from taildropout.lengths import Exponential, Lengths, Uniform

from .report import Numbers, Settings, mean_text, table

TITLE = "Stratified against independent draws"
SEEDS = 5
WIDTH = 16
BATCHES = [16, 128, 1024]
LENGTHS: dict[str, Lengths] = {
    "p = 0.1": Exponential(0.1),
    "p = 0.5": Exponential(0.5),
    "p = 0.9": Exponential(0.9),
    "`Uniform()`": Uniform(),
}

DONE = f"""\
An autoencoder of scikit-learn's digits, 64 → 64 → {WIDTH} → 64 → 64, is trained for {{steps:,}} steps
with the lengths of its row. Then its weights stay, and the loss and the gradient of one step are
computed {{draws:,}} times with stratified draws and {{draws:,}} times with independent draws (the
control). Printed is the variance with independent draws over that with stratified draws: 2 means
that stratifying halves the variance, 1 that it does nothing. The variance of the gradient is the
sum of those of all weights. *Same images* draws only k anew, for one batch of images; *new images*
draws the batch anew too, as in training. Mean ± standard error over the seeds."""


SHOWN = """Over all rows: {ranges}. Stratifying steadies the loss that one sees. It does next to
nothing for the gradient, and is no reason to expect faster training."""


def measure(settings: Settings, seeds: list[int]) -> Numbers:
    """Lengths -> batch size -> column -> ratios, one for each seed."""
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    numbers: Numbers = {}
    for name, lengths in LENGTHS.items():
        models = [trained(images, lengths, steps(settings), seed) for seed in seeds]
        numbers[name] = {}
        for batch in BATCHES[:2] if settings.quick else BATCHES:
            cells = numbers[name][str(batch)] = {}
            for seed, model in zip(seeds, models, strict=True):
                torch.manual_seed(seed)
                for column, ratio in ratios(model, images, batch, draws(settings)).items():
                    cells.setdefault(column, []).append(ratio)
    return numbers


def steps(settings: Settings) -> int:
    return 100 if settings.quick else 1000


def draws(settings: Settings) -> int:
    return 100 if settings.quick else 1000


def text(numbers: Numbers, settings: Settings) -> str:
    rows, columns = [], {}
    for name, of_batches in numbers.items():
        for batch, cells in of_batches.items():
            rows.append([name, batch, *[mean_text(ratios, 2) for ratios in cells.values()]])
            for column, ratios in cells.items():
                columns.setdefault(column, []).append(statistics.fmean(ratios))
    head = ["k from", "batch", *columns]
    ranges = [f"{column}: {min(all):.2f} to {max(all):.2f}" for column, all in columns.items()]
    done = DONE.format(steps=steps(settings), draws=draws(settings))
    return "\n\n".join([done, table(head, rows), SHOWN.format(ranges="; ".join(ranges))])


def trained(images: Tensor, lengths: Lengths, steps: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, WIDTH), TailDropout(lengths=lengths)),
        *(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, 64)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = images[torch.randint(len(images), (256,))]
        optimizer.zero_grad()
        mse_loss(model(batch), batch).backward()
        optimizer.step()
    return model


def ratios(model: nn.Sequential, images: Tensor, batch: int, draws: int) -> dict[str, float]:
    """Variance with independent draws over variance with stratified draws."""
    fixed = torch.randint(len(images), (batch,))
    result = {}
    for anew in (False, True):
        variances = {}
        for stratified in (False, True):
            model[3].stratified = stratified
            variances[stratified] = step_variances(model, images, fixed, anew, draws)
        loss, gradient = (a / b for a, b in zip(variances[False], variances[True], strict=True))
        which = "new images" if anew else "same images"
        result |= {f"loss, {which}": loss, f"gradient, {which}": gradient}
    return result


def step_variances(
    model: nn.Sequential, images: Tensor, fixed: Tensor, anew: bool, draws: int
) -> tuple[float, float]:
    """Of the loss, and of the gradient summed over all weights."""
    weights = list(model.parameters())
    losses, total, squares = [], 0.0, 0.0
    for _ in range(draws):
        inputs = images[torch.randint(len(images), fixed.shape) if anew else fixed]
        loss = mse_loss(model(inputs), inputs)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).double()
        losses.append(loss.item())
        total = total + gradient
        squares = squares + gradient.square()
    variance = (squares - total.square() / draws) / (draws - 1)
    return statistics.variance(losses), float(variance.sum())
