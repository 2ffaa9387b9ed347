"""A linear autoencoder against PCA."""

import statistics

import torch
from sklearn.datasets import load_digits

from .images import fashion_mnist
from .linear import NO_DROPOUT, Optimum, Pairs, methods, train
from .report import CONTROLS, Numbers, Settings, median, percent, power, table

TITLE = "Linear autoencoder against PCA"
SEEDS = 3
DIGITS, FASHION = "digits (64 pixels)", "Fashion-MNIST (784 pixels)"
WIDTH = 16
EXACT_PS = [0.5, 0.1, 0.01, 1e-3, 1e-4, 1e-5]
SAMPLED_PS = [0.5, 0.1, 0.01, 1e-3]
SHOWN = [1, 2, 4, 8, 16]
UNORDERED = 0.5  # an axis error above this is called no order

DONE = f"""\
A linear autoencoder without biases ({WIDTH} features) learns centred images. A prefix of k features
can at best reproduce them as well as PCA with k components. *Exact* is
`functional.expected_mse`, the expectation over all prefixes, on all images in each step;
*sampled* is `TailDropout` on random batches of 256; Adam with one cycle of the learning rate,
{{steps}}. The controls train without an order: with `nn.Dropout`, and with all features always.

The columns are the squared error of the first k features above that of PCA, on the training
images, and the axis error (1/n) Σ_j [1 - cos²(d_j, v_j)] between the j-th column of the decoder and
the j-th principal axis: 0 is PCA itself, 1 is at right angles to it. Medians over the seeds. The
last two columns are controls of the same network (`td.scree` with `features="random"` and
`"principal"`): the worst k < {WIDTH} of as many random features instead of the first, and of the
projection of its features on their first k principal components."""


def measure(settings: Settings, seeds: list[int]) -> Numbers:
    """Data set -> method -> "excess", "random", "principal": one list by k for each seed.

    And "axis_error": one number for each.
    """
    numbers: Numbers = {}
    for name, steps in data_sets(settings).items():
        images = torch.tensor(load_digits().data) / 16 if name == DIGITS else fashion_mnist().train
        centred = images - images.mean(0)
        pairs = Pairs(centred, centred)
        optimum = Optimum(pairs.condensed)
        numbers[name] = {}
        for method, objective in methods(WIDTH, EXACT_PS, SAMPLED_PS).items():
            trained = [train(pairs, objective, WIDTH, steps, seed) for seed in seeds]
            numbers[name][method] = {
                "excess": [optimum.excess(*weights) for weights in trained],
                **{
                    features: [optimum.excess(*weights, features) for weights in trained]
                    for features in CONTROLS
                },
                "axis_error": [optimum.axis_error(decoder) for _, decoder in trained],
            }
    return numbers


def data_sets(settings: Settings) -> dict[str, int]:
    """Each with its number of steps."""
    return {DIGITS: 1000} if settings.quick else {DIGITS: 8000, FASHION: 4000}


def text(numbers: Numbers, settings: Settings) -> str:
    steps = [f"{steps:,} steps on {name}" for name, steps in data_sets(settings).items()]
    parts = [DONE.format(steps=" and ".join(steps))]
    for name, runs in numbers.items():
        head = ["k from", *[f"k = {k}" for k in SHOWN], "worst k", "axis error"]
        head += [f"worst k, {words}" for words in CONTROLS.values()]
        parts += [f"**{name}**", table(head, map(_row, runs, runs.values()))]
    parts += [_order(name, runs) for name, runs in numbers.items()]
    return "\n\n".join([*parts, NOT_SHOWN])


def _row(method: str, run: dict[str, list]) -> list[str]:
    by_prefix = median(run["excess"])
    worst = statistics.median(max(excess) for excess in run["excess"])
    cells = [percent(by_prefix[k - 1]) for k in SHOWN]
    cells += [percent(worst), power(statistics.median(run["axis_error"]))]
    for features in CONTROLS:
        cells.append(percent(statistics.median(max(by_k[:-1]) for by_k in run[features])))
    return [method, *cells]


def _order(name: str, runs: dict[str, dict[str, list]]) -> str:
    """Which methods leave single features without an order."""
    errors = {method: statistics.median(run["axis_error"]) for method, run in runs.items()}
    unordered = [m for m, error in errors.items() if error > UNORDERED and "control" not in m]
    found = f"On {name} the axis error without dropout is {power(errors[NO_DROPOUT])}. "
    if not unordered:
        return f"{found}It is below {UNORDERED:g} with each of the lengths."
    return (
        f"{found}These too stay above {UNORDERED:g}, which is no order of single features to speak "
        f"of: {'; '.join(unordered)}."
    )


NOT_SHOWN = """\
Not shown: any use of it for linear networks. There, PCA of what the control returns gives the same
answer after training, for any p; PCA of its features does not quite, since their scales are
arbitrary. The table checks that the objective orders the features
where the right order is known, and how small p may be for that in a given number of steps. With
more steps a smaller p goes further: the optimum is the same for every p > 0, and only the pull
towards it weakens."""
