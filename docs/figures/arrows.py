"""The product y = W x as a sum of arrows W[:, j] * x[j] in the plane."""

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

import taildropout as td
from taildropout.showing.plot import CHOSEN, DROPPED, KEPT, REFERENCE

from .animate import FAINT, INK, STEP, Frames, box, canvas, inset, steps

# Made up: arrows that turn, each shorter than the one before, as training makes them.
W = np.array([[1.5, -0.4, -0.8, 0.6, -0.5, 0.2], [0.4, -1.5, 0.6, 0.5, 0.4, 0.6]])
X = np.array([1.6, -1.0, 1.0, 0.9, -0.7, 0.5])
N = len(X)
P = 0.5
DRAWS = 20
CELL = 0.85  # size of a box


def prefixes() -> Frames:
    """k = 0, 1, ..., n."""
    for k, amount, seconds in steps(np.tri(N + 1, N, -1), 2 * STEP):
        fig, ax = _draw(f"y = W x is a sum of arrows: the first k = {k} of {N}", amount)
        ax.text(1.95, 1.2, f"y = W[:, :{k}] @ x[:{k}]", fontsize=15, family="monospace", color=INK)
        yield fig, seconds


def tail_dropout() -> Frames:
    """k drawn at random for each sample."""
    torch.manual_seed(52)
    masks = td.TailDropout(P)(torch.ones(DRAWS, N)) != 0
    probability = 1 - td.lengths.Exponential(P).pmf(N).cumsum(0)[:-1]
    return _dropout("TailDropout keeps the first k arrows, k drawn at random", masks, probability)


def plain_dropout() -> Frames:
    """Any subset, without the factor 1 / (1 - p)."""
    torch.manual_seed(18)
    masks = nn.Dropout(P)(torch.ones(DRAWS, N)) != 0
    return _dropout("Plain dropout keeps any of the arrows", masks, torch.full((N,), 1 - P))


def _dropout(title: str, masks: Tensor, probability: Tensor) -> Frames:
    states = masks.double().numpy()
    ends = states @ (W * X).T
    for i, amount, seconds in steps(states):
        fig, ax = _draw(title, amount, ends[:i])
        kept = (states[:i].sum(0) + amount) / (i + 1)
        _draw_frequencies(ax, kept, probability.numpy(), draws=i + 1)
        yield fig, seconds


def _draw(
    title: str, amount: NDArray[np.float64], ends: NDArray[np.float64] | None = None
) -> tuple[Figure, Axes]:
    fig, ax = canvas(title)
    _draw_boxes(ax, amount)
    plane = inset(fig, 8.9, 0.55, 6.7, 7.0)
    _draw_plane(plane, amount)
    if ends is not None:
        plane.plot(*ends.T, "o", color=KEPT, alpha=0.35, markersize=7, markeredgewidth=0, zorder=2)
    return fig, ax


def _draw_boxes(ax: Axes, amount: NDArray[np.float64]) -> None:
    """y = W x, written as boxes."""
    y = (W * X * amount).sum(1)
    top = 7.2
    left_of = {"y": 0.4, "W": 1.95, "x": 7.45}
    for name, left in left_of.items():
        width = CELL * (N if name == "W" else 1)
        ax.text(left + width / 2, top + 0.3, name, ha="center", va="center", fontsize=14, color=INK)
    ax.text(1.6, top - CELL, "=", ha="center", va="center", fontsize=16, color=INK)
    for row in range(2):
        bottom = top - (row + 1) * CELL
        box(ax, left_of["y"], bottom, CELL, float(amount.any()), _number(y[row]))
        for j in range(N):
            box(ax, left_of["W"] + j * CELL, bottom, CELL, amount[j], _number(W[row, j]))
    for j in range(N):
        box(ax, left_of["x"], top - (j + 1) * CELL, CELL, amount[j], _number(X[j]))


def _draw_plane(ax: Axes, amount: NDArray[np.float64]) -> None:
    """The arrows, head to tail; grey: all of them."""
    ax.set(xlim=(-1.15, 4.15), ylim=(-0.9, 4.64), xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_color("0.85")
    ax.axhline(0, color="0.92", lw=1, zorder=0)
    ax.axvline(0, color="0.92", lw=1, zorder=0)
    _draw_path(ax, np.ones(N), DROPPED, zorder=1)
    _draw_path(ax, amount, KEPT, zorder=3)
    ax.plot(*(W * X * amount).sum(1), "o", color=CHOSEN, markersize=9, zorder=5)
    ax.plot(*(W @ X), "o", color=REFERENCE, markersize=13, markerfacecolor="none", zorder=4)
    ax.annotate(
        "all of W x",
        W @ X,
        (0, 12),
        textcoords="offset points",
        ha="center",
        color=FAINT,
        fontsize=11,
    )


def _number(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}".replace("-", "\N{MINUS SIGN}")


def _draw_path(ax: Axes, amount: NDArray[np.float64], colour: str, zorder: int) -> None:
    at = np.zeros(2)
    for arrow in (W * X * amount).T:
        length = float(np.hypot(*arrow))
        if length < 0.02:
            continue
        ax.annotate(
            "",
            at + arrow,
            at,
            arrowprops={
                "arrowstyle": "-|>,head_length=0.5,head_width=0.25",
                "color": colour,
                "lw": 2.5,
                "shrinkA": 0,
                "shrinkB": 0,
                "mutation_scale": min(18, 40 * length),
            },
            zorder=zorder,
        )
        at = at + arrow


def _draw_frequencies(
    ax: Axes, kept: NDArray[np.float64], probability: NDArray[np.float64], draws: int
) -> None:
    """Below each column of W: how often it was kept so far."""
    bottom, height = 1.2, 3.0
    for j in range(N):
        left = 1.95 + j * CELL
        ax.bar(left + CELL / 2, kept[j] * height, 0.6, bottom, color=KEPT)
        at = bottom + probability[j] * height
        ax.plot([left + 0.06, left + CELL - 0.06], [at, at], color=CHOSEN, lw=2)
        ax.text(left + CELL / 2, 0.9, str(j), fontsize=11, ha="center", va="center", color=FAINT)
    ax.plot([1.95, 1.95 + N * CELL], [bottom, bottom], color=REFERENCE, lw=1)
    words = f"how often each was kept in {draws} draws (red: probability)"
    ax.text(0.4, 0.35, words, fontsize=11, color=INK, va="center")
