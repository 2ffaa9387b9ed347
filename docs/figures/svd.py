"""The singular value decomposition of a small picture, one direction after the other."""

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from taildropout.showing.plot import DROPPED, KEPT, REFERENCE

from .animate import INK, STEP, Frames, canvas, inset, scree_strip, steps
from .networks import Networks

SHOWN = 126  # which of the held-out pictures: a handbag
SIZE = 2.6  # of a matrix
GREY = LinearSegmentedColormap.from_list("grey", ["white", "black"])
SIGNED = LinearSegmentedColormap.from_list("signed", ["tab:orange", "white", KEPT])


def directions(networks: Networks) -> Frames:
    """k = 0, 1, ..., n."""
    images = networks.images
    large = images.test[SHOWN].view(1, images.height, images.width).double()
    picture = nn.functional.avg_pool2d(large, 2)[0].numpy()  # few enough directions to follow
    n = len(picture)
    for k, amount, seconds in steps(np.tri(n + 1, n, -1), 1.5 * STEP):
        yield _frame(picture, amount, k), seconds


def _frame(picture: NDArray[np.float64], amount: NDArray[np.float64], k: int) -> Figure:
    u, s, vt = np.linalg.svd(picture)
    n = len(s)
    fig, ax = canvas(f"A picture from the first k = {k} of its {n} singular directions")
    pieces = [
        ("A", GREY(picture)),
        ("≈" if k < n else "=", None),
        (f"the first {k}", GREY(((u * s * amount) @ vt).clip(0, 1))),
        ("=", None),
        ("U", _faded(_signed(u), amount[None])),
        ("diag(s)", _faded(_signed(np.diag(s)), np.outer(amount, amount))),
        ("V'", _faded(_signed(vt), amount[:, None])),
    ]
    left = 0.45
    for name, colours in pieces:
        if colours is None:
            ax.text(left + 0.1, 5.5, name, ha="center", va="center", fontsize=18, color=INK)
            left += 0.5
            continue
        cells = inset(fig, left, 5.5 - SIZE / 2, SIZE, SIZE)
        cells.pcolorfast(colours[::-1])
        cells.set(xticks=[], yticks=[])
        cells.spines[:].set_color(REFERENCE)
        centre = left + SIZE / 2
        ax.text(centre, 7.2, name, ha="center", va="center", fontsize=13, color=INK)
        left += SIZE + 0.3
    error = 1 - np.concatenate([[0], (s**2).cumsum()]) / (s**2).sum()
    scree_strip(fig, range(n + 1), error, k, "squared error", "k, directions kept")
    return fig


def _signed(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Colours of the entries: orange below 0, white, blue above."""
    return np.asarray(SIGNED(0.5 + 0.5 * matrix / np.abs(matrix).max()))


def _faded(colours: NDArray[np.float64], amount: NDArray[np.float64]) -> NDArray[np.float64]:
    """The colour of what is dropped where `amount` is 0."""
    return amount[..., None] * colours + (1 - amount[..., None]) * np.array(to_rgba(DROPPED))
