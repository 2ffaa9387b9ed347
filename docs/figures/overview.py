"""The README's picture: what training sees, the error at every width, and reconstructions."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import taildropout as td
from taildropout.demo import data
from taildropout.demo.model import Autoencoder
from taildropout.showing.plot import REFERENCE, plot_mask, plot_scree

from .networks import WIDTH, Networks, P

SHOWN = [0, 1, 18, 6, 13, 23]  # an ankle boot, a pullover, ...


def overview(networks: Networks) -> Figure:
    fig = Figure(figsize=(13, 4), layout="constrained")
    mask_ax, scree_ax, picture_ax = fig.subplots(1, 3, width_ratios=[1, 1.5, 1])
    plot_mask(td.TailDropout(P)(torch.ones(24, WIDTH)), ax=mask_ax)
    mask_ax.set_title("In training: keep a random\nnumber of the first features")
    mask_ax.set_ylabel("samples of a batch")
    draw_scree(scree_ax, networks.scree, networks.pca)
    scree_ax.set_title("Trained once, measured at every\nwidth k, and cut where it is enough")
    draw_reconstructions(picture_ax, networks.tail, networks.images)
    picture_ax.set_title("Each feature adds\nwhat matters most")
    return fig


def draw_scree(ax: Axes, scree: td.Scree, pca: list[float], tolerance: float = 0.05) -> None:
    ax.plot(scree.ks, pca, color=REFERENCE, marker=".", label="PCA")
    chosen = scree.choose(tolerance)
    plot_scree(scree, chosen=chosen, tolerance=tolerance, label="one network, cut at k", ax=ax)
    ax.set_ylabel("held-out squared error")
    ax.set_ylim(bottom=0)


@torch.no_grad()
def draw_reconstructions(ax: Axes, model: Autoencoder, images: data.Images) -> None:
    """A row for each picture: itself, and what more and more features make of it."""
    shown = images.test[SHOWN]
    columns, names = [shown], ["input"]
    for k in (1, 2, 4, 8, 16):
        with model.eval().bottleneck.using_k(k):
            columns.append(model(shown))
        names.append(f"k = {k}" if k == 1 else str(k))
    draw_grid(ax, torch.stack(columns, 1), images)
    ax.set_xticks([(i + 0.5) * images.width for i in range(len(names))], names)


def draw_grid(ax: Axes, pixels: torch.Tensor, images: data.Images) -> None:
    """Pictures in rows and columns: `(rows, columns, pixels)`."""
    grid = pixels.unflatten(2, (images.height, images.width))
    grid = grid.transpose(1, 2).flatten(2).flatten(0, 1)  # (rows * height, columns * width)
    ax.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
