"""The autoencoder at work: from more and more features, or from any subset of them."""

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from numpy.typing import NDArray
from torch import Tensor, nn

from taildropout.demo.data import Images
from taildropout.demo.model import Autoencoder
from taildropout.showing.plot import CHOSEN, KEPT, REFERENCE

from .animate import DPI, FAINT, INK, Frames, canvas, inset, scree_strip, shade, steps, strip
from .networks import WIDTH, Networks, P
from .overview import draw_grid

SHOWN = [0, 1, 18, 6, 13, 23, 11, 4, 28]  # the pictures, row by row
ROWS = 3
DRAWS = 14
GRID = 3 * ROWS * 28 * 16 / (8 * DPI)  # each pixel of a picture is 3 x 3 on the screen


def tail_dropout(networks: Networks) -> Frames:
    """k = 1, 2, ..., n."""
    ks, losses = networks.scree.ks[1:], networks.scree.loss.tolist()[1:]
    for i, amount, seconds in steps(np.tri(WIDTH)):
        title = f"Trained with TailDropout: pictures from the first k = {ks[i]} features"
        fig = _draw(title, networks.images, networks.tail, amount)
        scree_strip(fig, ks, losses, ks[i], "held-out error")
        yield fig, seconds


def plain_dropout(networks: Networks) -> Frames:
    """Random subsets, drawn and scaled by `nn.Dropout`."""
    torch.manual_seed(17)
    drawn = nn.Dropout(P)(torch.ones(DRAWS, WIDTH))
    counts = drawn.count_nonzero(1).tolist()
    losses = [_loss(networks.plain, networks.images.test, amount) for amount in drawn]
    ks, tail_losses = networks.scree.ks[1:], networks.scree.loss.tolist()[1:]
    for i, amount, seconds in steps(drawn.double().numpy(), moves=2):
        title = f"Trained with plain dropout: pictures from any {counts[i]} features"
        fig = _draw(title, networks.images, networks.plain, amount)
        ax = strip(fig, ks, "held-out error")
        ax.plot(
            ks, tail_losses, color=REFERENCE, marker=".", lw=1, label="TailDropout, the first k"
        )
        ax.plot(counts[:i], losses[:i], "o", color=KEPT, alpha=0.5)
        ax.plot(counts[i], losses[i], "o", color=CHOSEN, markersize=9)
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False, fontsize=11, labelcolor=FAINT, loc="upper right")
        yield fig, seconds


@torch.no_grad()
def _loss(model: Autoencoder, images: Tensor, amount: Tensor) -> float:
    restored = model.decoder(model.encoder(images) * amount)
    return nn.functional.mse_loss(restored, images).item()


@torch.no_grad()
def _draw(title: str, images: Images, model: Autoencoder, amount: NDArray[np.float64]) -> Figure:
    """Input, encoder, the features times `amount`, decoder, output."""
    fig, ax = canvas(title)
    shown = images.test[SHOWN]
    restored = model.decoder(model.encoder(shown) * torch.tensor(amount, dtype=torch.float32))
    for pixels, left in ((shown, 0.3), (restored, 15.7 - GRID)):
        draw_grid(inset(fig, left, 3.8, GRID, GRID), pixels.unflatten(0, (ROWS, -1)), images)
    _draw_network(ax, amount / max(1, amount.max()))  # plain dropout scales what it keeps
    return fig


def _draw_network(ax: Axes, kept: NDArray[np.float64]) -> None:
    middle, high, low = 3.8 + GRID / 2, GRID / 2, 1.6  # the centre, and half the heights
    for name, outer, inner in (("encoder", 4.75, 7.1), ("decoder", 11.25, 8.9)):
        corners = [(outer, -high), (outer, high), (inner, low), (inner, -low)]
        ax.add_patch(Polygon([(x, middle + y) for x, y in corners], facecolor="0.95"))
        centre = (outer + inner) / 2
        ax.text(centre, middle, name, ha="center", va="center", fontsize=14, color=INK)
    height = 2 * low / len(kept)
    for j, amount in enumerate(kept):
        bottom = middle + low - (j + 1) * height
        ax.add_patch(
            Rectangle((7.45, bottom), 1.1, height, facecolor=shade(amount), edgecolor="white", lw=1)
        )
