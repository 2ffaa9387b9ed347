"""Regularisation with little data, and choosing a smaller k afterwards."""

import statistics

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import taildropout as td

from .images import Labelled, fashion_mnist
from .report import CONTROLS, Numbers, Settings, mean_text, table

TITLE = "Regularisation with little data"
SEEDS = 10
IMAGES, WIDTH, BATCH = 1000, 512, 100
PS = [0.1, 0.2, 0.3, 0.5, 0.7]
NONE = "no dropout"

DONE = f"""\
A classifier, 784 → {WIDTH} → {WIDTH} → 10 with ReLU and the layer on the last hidden features,
learns {IMAGES:,} Fashion-MNIST images, {{epochs}} epochs of Adam with one cycle of the learning
rate; by then it fits them all but for the dropout. Each seed draws its own {IMAGES:,} images and
another {IMAGES:,} to choose k on, and both methods get the same. Printed are accuracy and
cross-entropy on the 10,000 test images, mean ± standard error over the seeds; *difference* is the
accuracy against no dropout, paired by seed.

*Chosen k* is the k with the smallest cross-entropy on the other {IMAGES:,} images. The control for
it is the same choice for the network without dropout and for `nn.Dropout`, whose features have no
order. The last two columns are controls of each network itself (`td.scree` with
`features="random"` and `"principal"`): the test cross-entropy of as many random features instead of
the first, and of the projection on as many principal components."""


def measure(settings: Settings, seeds: list[int]) -> Numbers:
    """Method -> what `run` measures, for each seed."""
    data = fashion_mnist()
    layers: dict[str, nn.Module] = {NONE: nn.Identity()}
    layers |= {f"`nn.Dropout({p:g})`": nn.Dropout(p) for p in PS}
    layers |= {f"`TailDropout({p:g})`": td.TailDropout(p) for p in PS}
    return {
        name: [run(data, layer, epochs(settings), seed) for seed in seeds]
        for name, layer in layers.items()
    }


def epochs(settings: Settings) -> int:
    return 5 if settings.quick else 60


def run(data: Labelled, layer: nn.Module, epochs: int, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    order = torch.randperm(len(data.train))[: 2 * IMAGES]
    images, labels = data.train[order], data.train_labels[order]
    model = nn.Sequential(
        *(nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()),
        *(layer, nn.Linear(WIDTH, 10)),
    )
    fit(model, images[:IMAGES], labels[:IMAGES], epochs)
    held_out = slice(IMAGES, None)
    ordered = nn.Sequential(*model[:4], td.TailDropout(), model[5])  # any network can be swept
    scree = td.scree(
        ordered,
        nn.CrossEntropyLoss(),
        [(images[held_out], labels[held_out])],
        progress=False,
    )
    chosen = scree.ks[int(scree.loss.argmin())]
    with torch.no_grad():
        model.eval()
        train_accuracy, _ = scores(model(images[:IMAGES]), labels[:IMAGES])
        full = model(data.test)
        ordered.eval()
        ordered[4].set_k(chosen)
        cut = ordered(data.test)
    of_k = {
        features: td.scree(
            ordered,
            nn.CrossEntropyLoss(),
            [(data.test, data.test_labels)],
            ks=[chosen],
            features=features,
            progress=False,
        )
        for features in CONTROLS
    }
    accuracy, loss = scores(full, data.test_labels)
    accuracy_at_k, loss_at_k = scores(cut, data.test_labels)
    return {
        "train_accuracy": train_accuracy,
        "accuracy": accuracy,
        "loss": loss,
        "chosen_k": chosen,
        "accuracy_at_k": accuracy_at_k,
        "loss_at_k": loss_at_k,
        **{f"loss_at_k_{features}": float(control.loss) for features, control in of_k.items()},
    }


def fit(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    steps = epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def scores(output: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy in per cent, and cross-entropy."""
    accuracy = 100 * (output.argmax(1) == labels).double().mean()
    return float(accuracy), float(cross_entropy(output, labels))


def text(numbers: Numbers, settings: Settings) -> str:
    columns = {
        name: {key: [result[key] for result in results] for key in results[0]}
        for name, results in numbers.items()
    }
    rows = []
    for name, values in columns.items():
        pairs = zip(values["accuracy"], columns[NONE]["accuracy"], strict=True)
        rows.append(
            [
                name,
                mean_text(values["accuracy"], 2),
                "" if name == NONE else mean_text([a - b for a, b in pairs], 2),
                mean_text(values["loss"], 3),
                f"{statistics.median(values['chosen_k']):g}",
                mean_text(values["accuracy_at_k"], 2),
                mean_text(values["loss_at_k"], 3),
                *[mean_text(values[f"loss_at_k_{features}"], 3) for features in CONTROLS],
            ]
        )
    head = ["", "accuracy, %", "difference", "cross-entropy", "chosen k (median)"]
    head += ["accuracy at that k, %", "cross-entropy at that k", *CONTROLS.values()]
    return "\n\n".join([DONE.format(epochs=epochs(settings)), table(head, rows), SHOWN])


SHOWN = """As a regulariser of the whole network the layer does not help here: its accuracy is that
of no dropout at small p and falls as p grows, while the strongest `nn.Dropout` gains a little. What
it gives is the choice afterwards: with a fraction of the features it is as accurate, and far better
calibrated. Cutting the controls, whose features have no order, improves their cross-entropy as
well, but keeps several times as many features."""
