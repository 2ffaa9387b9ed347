"""Pictures. Every function takes `ax`, returns `(fig, ax)` and measures nothing."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .scree import Scree


def plot_scree(
    scree: "Scree",
    *,
    chosen: int | None = None,
    tolerance: float | None = None,
    label: str | None = None,
    ax: "Axes | None" = None,
) -> "tuple[Figure, Axes]":
    """The loss against k, with a band of one standard error to either side.

    Args:
        scree: the measurement. Several can be drawn into one `ax`, each with its `label`.
        chosen: a k to mark.
        tolerance: draws the line of the full width's loss plus this fraction of it.
        label: name of the curve in the legend.
        ax: where to draw; None: into a new figure, which pyplot does not manage.

    Raises:
        ValueError: `chosen` was not measured.
        ImportError: matplotlib is missing.
    """
    if chosen is not None and chosen not in scree.ks:
        raise ValueError(f"chosen must be one of the measured ks, got {chosen}, not in {scree.ks}")
    fig, ax = _figure(ax)
    loss, stderr = scree.loss, scree.stderr.nan_to_num(nan=0.0)
    (line,) = ax.plot(scree.ks, loss.tolist(), marker=".", label=label)
    ax.fill_between(
        scree.ks,
        (loss - stderr).tolist(),
        (loss + stderr).tolist(),
        color=line.get_color(),
        alpha=0.25,
        linewidth=0,
    )
    if tolerance is not None:
        limit = float(loss[-1] + tolerance * loss[-1].abs())
        ax.axhline(
            limit,
            color="0.6",
            linewidth=1,
            linestyle="--",
            label=f"{100 * tolerance:.4g}% above k = {scree.ks[-1]}",
        )
    if chosen is not None:
        height = float(loss[scree.ks.index(chosen)])
        ax.plot(
            [chosen],
            [height],
            marker="o",
            markersize=9,
            color="tab:red",
            linestyle="none",
            label=f"chosen: k = {chosen}",
        )
    ax.set_xlabel("k, features kept")
    ax.set_ylabel("held-out loss")
    ax.spines[["top", "right"]].set_visible(False)
    if label is not None or tolerance is not None or chosen is not None:
        ax.legend(frameon=False)
    return fig, ax


def _figure(ax: "Axes | None") -> "tuple[Figure, Axes]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'taildropout[plot]'") from error
    if ax is None:
        fig = Figure(figsize=(6, 4), layout="constrained")
        return fig, fig.subplots()
    owner = ax.get_figure(root=True)
    assert owner is not None
    return owner, ax
