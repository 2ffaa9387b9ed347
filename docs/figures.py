"""Draw the README's picture: docs/images/overview.png.

It trains the demonstration's autoencoder on Fashion-MNIST (about a minute on two cores) and shows
what training sees, the error at every width, and the reconstructions.

    python docs/figures.py [--data-dir DIR] [--epochs 12]
"""

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import taildropout as td
from taildropout.demo import data
from taildropout.demo.model import Autoencoder, pca_errors, train
from taildropout.files import written_whole
from taildropout.plot import plot_scree

WIDTH = 16
IMAGES = Path(__file__).parent / "images"
SHOWN = [0, 1, 18, 6, 13, 23]  # an ankle boot, a pullover, ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images = data.load("fashion-mnist", arguments.data_dir)
    model = Autoencoder(images.train.shape[1], WIDTH)
    train(model, images.train, epochs=arguments.epochs)
    scree = td.scree(model, nn.MSELoss(), [(part, part) for part in images.test.split(1000)])

    fig = Figure(figsize=(13, 3.8), layout="constrained")
    mask_ax, scree_ax, picture_ax = fig.subplots(1, 3, width_ratios=[1, 1.35, 1.25])
    draw_mask(mask_ax)
    draw_scree(scree_ax, scree, pca_errors(images.train, images.test, scree.ks))
    draw_reconstructions(picture_ax, model, images)
    IMAGES.mkdir(exist_ok=True)
    with written_whole(IMAGES / "overview.png") as path:
        fig.savefig(path, dpi=110)


def draw_mask(ax: Axes) -> None:
    kept = td.functional.tail_dropout(torch.ones(24, WIDTH))
    ax.imshow(kept.numpy(), cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
    ax.set_title("In training: keep a random\nnumber of the first features")
    ax.set_xlabel("features")
    ax.set_ylabel("samples of a batch")
    ax.set(xticks=[], yticks=[])


def draw_scree(ax: Axes, scree: td.Scree, pca: list[float]) -> None:
    ax.plot(scree.ks, pca, color="0.6", marker=".", label="PCA")
    k = scree.choose(0.05)
    plot_scree(scree, chosen=k, tolerance=0.05, label="one network, cut at k", ax=ax)
    ax.set_title("Trained once, measured at every\nwidth k, and cut where it is enough")
    ax.set_ylabel("held-out squared error")
    ax.set_ylim(bottom=0)


@torch.no_grad()
def draw_reconstructions(ax: Axes, model: Autoencoder, images: data.Images) -> None:
    shown = images.test[SHOWN]
    columns, names = [shown], ["input"]
    for k in (1, 2, 4, 8, 16):
        with model.eval().bottleneck.using_k(k):
            columns.append(model(shown))
            names.append(f"k = {k}")
    grid = torch.stack(columns, 1).view(len(SHOWN), len(columns), images.height, images.width)
    ax.imshow(grid.transpose(1, 2).flatten(2).flatten(0, 1).numpy(), cmap="gray_r", vmin=0, vmax=1)
    ax.set_title("Each feature adds\nwhat matters most")
    ax.set_xticks([(i + 0.5) * images.width for i in range(len(names))], names)
    ax.set_yticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


if __name__ == "__main__":
    main()
