"""Pictures. Every function takes `ax`, returns `(fig, ax)` and measures nothing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..lengths import Exponential, Lengths
from ..models.names import is_pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..measuring.curve import Scree
    from ..pruning.budget import WidthPath
    from ..pruning.sweep import Sweep

# One meaning, one colour, in every picture.
KEPT = "tab:blue"
DROPPED = "0.9"
CHOSEN = "tab:red"
REFERENCE = "0.6"
CONTROL = "0.4"

# Of `Scree.features`: what k counts, the name of the curve, and how a control is drawn.
_KEPT = {
    "first": ("features", "first features", "-"),
    "random": ("features", "random features", ":"),
    "principal": ("principal components", "principal components", "-."),
}


def plot_scree(
    scree: "Scree",
    *,
    controls: Sequence["Scree"] = (),
    chosen: float | None = None,
    tolerance: float | None = None,
    label: str | None = None,
    ax: "Axes | None" = None,
) -> "tuple[Figure, Axes]":
    """The loss against k, or the width, with a band of one standard error to either side.

    Args:
        scree: the measurement. Several can be drawn into one `ax`, each with its `label`.
        controls: the same network measured with other `features`, drawn behind, in grey: what k
            random ones are worth, and what the first k principal components are.
        chosen: a k, or width, to mark.
        tolerance: draws the line of the full width's loss plus this fraction of it.
        label: name of the curve in the legend. None: which features, where there are controls, or
            where they are not the first.
        ax: where to draw; None: into a new figure, which pyplot does not manage.

    Raises:
        ValueError: `chosen` was not measured; a control is of another layer, or of the same
            features.
        ImportError: matplotlib is missing.

    Example:
        >>> import taildropout as td
        >>> ks, cov = [0, 1, 2], torch.eye(3)
        >>> scree = td.Scree("1", ks, torch.tensor([3.0, 1.0, 0.9]), 100, cov)
        >>> random = td.Scree("1", ks, torch.tensor([3.0, 2.2, 0.9]), 100, cov, "random")
        >>> fig, ax = plot_scree(scree, controls=[random], chosen=1, tolerance=0.2)
    """
    if chosen is not None and chosen not in scree.ks:
        raise ValueError(f"chosen must be one of the measured ks, got {chosen}, not in {scree.ks}")
    _check_controls(scree, controls)
    fig, ax = _figure(ax)
    kept, name, _ = _KEPT[scree.features]
    of_layers = is_pattern(scree.layer)
    size = "width" if of_layers else "k"
    if label is None and (controls or scree.features != "first"):
        label = name
    (line,) = ax.plot(scree.ks, scree.loss.tolist(), marker=".", label=label)
    _band(ax, scree, line.get_color())
    for control in controls:
        _, name, style = _KEPT[control.features]
        ax.plot(
            control.ks, control.loss.tolist(), color=CONTROL, linestyle=style, label=name, zorder=1
        )
        _band(ax, control, CONTROL)
    if tolerance is not None:
        full = float(scree.loss[-1])
        limit = full + tolerance * abs(full)
        ax.axhline(
            limit,
            color=REFERENCE,
            linewidth=1,
            linestyle="--",
            label=f"{100 * tolerance:.4g}% above {size} = {scree.ks[-1]:g}",
        )
    if chosen is not None:
        height = float(scree.loss[scree.ks.index(chosen)])
        ax.plot(
            [chosen],
            [height],
            marker="o",
            markersize=9,
            color=CHOSEN,
            linestyle="none",
            label=f"chosen: {size} = {chosen:g}",
        )
    if not ax.get_xlabel():  # else the axis is that of a curve beside this one
        ax.set_xlabel(f"width, fraction of {kept} kept" if of_layers else f"k, {kept} kept")
    if not of_layers:
        _count_across(ax)
    ax.set_ylabel("held-out loss")
    _finish(ax)
    return fig, ax


def plot_mask(
    mask: Tensor | Sequence[Sequence[float]], *, ax: "Axes | None" = None
) -> "tuple[Figure, Axes]":
    """What is kept of a batch: one row per sample, one column per feature.

    Args:
        mask: `(samples, features)`; what is not zero is kept. The mask itself, or the output of
            a layer, be it TailDropout or `nn.Dropout`, for an input without zeros.
        ax: where to draw; None: into a new figure, which pyplot does not manage.

    Raises:
        ValueError: `mask` has not two dims.
        ImportError: matplotlib is missing.

    Example:
        Tail dropout beside plain dropout:

        >>> from matplotlib.figure import Figure
        >>> import taildropout as td
        >>> left, right = Figure().subplots(1, 2)
        >>> fig, ax = plot_mask(td.TailDropout(0.5)(torch.ones(24, 16)), ax=left)
        >>> fig, ax = plot_mask(torch.nn.Dropout(0.5)(torch.ones(24, 16)), ax=right)
    """
    kept = _numbers(mask) != 0
    if kept.ndim != 2:
        raise ValueError(
            f"mask must be (samples, features), got shape {tuple(kept.shape)}: flatten the dims "
            "that share one k into samples or features"
        )
    fig, ax = _figure(ax)
    from matplotlib.colors import ListedColormap

    ax.imshow(
        kept.numpy(),
        cmap=ListedColormap([DROPPED, KEPT]),
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="none",
    )
    ax.set_xlabel("features")
    ax.set_ylabel("samples")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return fig, ax


def plot_keep_probability(
    lengths: Lengths | float, n: int, *, label: str | None = None, ax: "Axes | None" = None
) -> "tuple[Figure, Axes]":
    """The probability that each feature is kept: P(K > j) for the features j = 0, ..., n - 1.

    Args:
        lengths: the distribution of k, or p, which stands for `Exponential(p)`.
        n: number of features.
        label: name of the curve in the legend.
        ax: where to draw; None: into a new figure, which pyplot does not manage.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> from taildropout.lengths import Uniform
        >>> fig, ax = plot_keep_probability(0.5, n=16, label="p = 0.5")
        >>> fig, ax = plot_keep_probability(Uniform(), n=16, label="uniform", ax=ax)
    """
    fig, ax = _figure(ax)
    kept = 1 - _pmf(lengths, n).cumsum(0)[:-1]
    ax.stairs(kept.tolist(), _edges(n), baseline=None, linewidth=1.5, label=label)
    ax.set_xlabel("feature")
    _count_across(ax)
    ax.set_ylabel("probability that it is kept")
    ax.set_ylim(0, 1.02)
    _finish(ax)
    return fig, ax


def plot_lengths(
    k: Tensor | Sequence[int], lengths: Lengths | float, n: int, *, ax: "Axes | None" = None
) -> "tuple[Figure, Axes]":
    """How often each k was drawn, against its probability.

    Args:
        k: the draws, such as a layer's `drawn_k`; any shape.
        lengths: the distribution of k, or p, which stands for `Exponential(p)`.
        n: number of features.
        ax: where to draw; None: into a new figure, which pyplot does not manage.

    Raises:
        ValueError: a k below 0 or above n, or no k at all.
        ImportError: matplotlib is missing.

    Example:
        >>> from taildropout.draws import draw
        >>> from taildropout.lengths import Exponential
        >>> fig, ax = plot_lengths(draw(Exponential(0.2), n=16, count=1000), 0.2, n=16)
    """
    drawn = _numbers(k).flatten().long()
    if not drawn.numel() or drawn.min() < 0 or drawn.max() > n:
        raise ValueError(
            f"k must hold numbers from 0 to n = {n}, got "
            + (f"{int(drawn.min())} to {int(drawn.max())}" if drawn.numel() else "none")
        )
    fig, ax = _figure(ax)
    frequency = drawn.bincount(minlength=n + 1) / drawn.numel()
    ax.stairs(
        frequency.tolist(),
        _edges(n + 1),
        fill=True,
        color=KEPT,
        alpha=0.5,
        label=f"{drawn.numel():,} draws",
    )
    pmf = _pmf(lengths, n).tolist()
    ax.plot(range(n + 1), pmf, color=CHOSEN, marker=".", linestyle="none", label="probability")
    ax.set_xlabel("k, features kept")
    _count_across(ax)
    ax.set_ylabel("fraction of draws")
    ax.set_ylim(bottom=0)
    _finish(ax)
    return fig, ax


def plot_calibration(
    p: Tensor | Sequence[float],
    dropped: Tensor | Sequence[float],
    *,
    label: str | None = None,
    ax: "Axes | None" = None,
) -> "tuple[Figure, Axes]":
    """The fraction of features that was dropped, against the p that was asked for.

    Args:
        p: what the layers were told.
        dropped: the fraction of zeros that came out, one number for each p.
        label: name of the points in the legend.
        ax: where to draw; None: into a new figure, which pyplot does not manage.

    Raises:
        ValueError: not as many fractions as ps.
        ImportError: matplotlib is missing.

    Example:
        >>> import taildropout as td
        >>> ps = [0.1, 0.3, 0.5, 0.7, 0.9]
        >>> outputs = [td.TailDropout(p)(torch.ones(1000, 16)) for p in ps]
        >>> fig, ax = plot_calibration(ps, [1 - output.mean() for output in outputs])
    """
    fig, ax = _against_diagonal(p, dropped, ("p", "dropped"), label, ax)
    ax.set_xlabel("p asked for")
    ax.set_ylabel("fraction dropped")
    return fig, ax


def plot_predictions(
    predicted: Tensor | Sequence[float],
    actual: Tensor | Sequence[float],
    *,
    label: str | None = None,
    ax: "Axes | None" = None,
) -> "tuple[Figure, Axes]":
    """Predictions against the actual values, one point for each.

    Args:
        predicted: what a model said; any shape.
        actual: what was the case, in the same shape.
        label: name of the points in the legend. Several models can be drawn into one `ax`.
        ax: where to draw; None: into a new figure, which pyplot does not manage.

    Raises:
        ValueError: different shapes.
        ImportError: matplotlib is missing.

    Example:
        >>> actual = torch.linspace(0, 1, 50)
        >>> fig, ax = plot_predictions(actual + 0.1 * torch.randn(50), actual)
    """
    fig, ax = _against_diagonal(actual, predicted, ("actual", "predicted"), label, ax)
    ax.set_xlabel("actual")
    ax.set_ylabel("predicted")
    return fig, ax


def plot_sweep(
    sweep: "Sweep",
    scree: "Scree",
    *,
    label: str | None = None,
    ax: "Axes | None" = None,
) -> "tuple[Figure, Axes]":
    """The loss against the parameters of the network that is cut to each k, the ks written on.

    Args:
        sweep: what each k costs, `plan.sweep(ks)`.
        scree: the losses, with their standard errors.
        label: name of the curve in the legend.
        ax: where to draw; None: into a new figure, which pyplot does not manage.

    Raises:
        ValueError: the scree has not measured one of the ks.
        ImportError: matplotlib is missing.
    """
    losses = sweep.losses(scree)
    fig, ax = _figure(ax)
    parameters = [point.parameters for point in sweep.points]
    ax.errorbar(
        parameters,
        [loss for loss, _ in losses],
        [stderr for _, stderr in losses],
        marker="o",
        markersize=4,
        capsize=2,
        label=label,
    )
    for point, count, (loss, _) in zip(sweep.points, parameters, losses, strict=True):
        ax.annotate(
            f"k = {point.k}", (count, loss), xytext=(4, 6), textcoords="offset points", fontsize=8
        )
    ax.set_xlabel("parameters of the network cut to k")
    ax.set_ylabel("held-out loss")
    _finish(ax)
    return fig, ax


def plot_widths(
    path: "WidthPath", *, label: str | None = None, ax: "Axes | None" = None
) -> "tuple[Figure, Axes]":
    """The loss against the cost along the path of `choose_widths`, with standard errors.

    Args:
        path: from the full widths down to the budget.
        label: name of the curve in the legend.
        ax: where to draw; None: into a new figure, which pyplot does not manage.

    Raises:
        ImportError: matplotlib is missing.
    """
    fig, ax = _figure(ax)
    cost = [step.cost / path.steps[0].cost for step in path.steps]
    loss = torch.tensor([step.loss for step in path.steps])
    stderr = torch.tensor([step.stderr for step in path.steps]).nan_to_num(nan=0.0)
    (line,) = ax.plot(cost, loss.tolist(), marker=".", label=label)
    ax.fill_between(
        cost,
        (loss - stderr).tolist(),
        (loss + stderr).tolist(),
        color=line.get_color(),
        alpha=0.25,
        linewidth=0,
    )
    ax.set_xlabel(f"{path.of}, as a fraction of the full network's")
    ax.set_ylabel("held-out loss")
    _finish(ax)
    return fig, ax


def _check_controls(scree: "Scree", controls: Sequence["Scree"]) -> None:
    for control in controls:
        if control.layer != scree.layer:
            raise ValueError(
                f"controls must be of the same layer, {scree.layer!r}, got one of "
                f"{control.layer!r}: measure it with layer={scree.layer!r}"
            )
        if control.features == scree.features:
            raise ValueError(
                f"controls must be of other features than the curve, got {control.features!r} "
                'twice: measure them with features="random" or "principal"; a curve of another '
                "network is drawn with plot_scree(other, label=..., ax=ax)"
            )


def _band(ax: "Axes", scree: "Scree", color: Any) -> None:
    """One standard error to either side; none where one sample does not tell."""
    stderr = scree.stderr.nan_to_num(nan=0.0)
    below, above = (scree.loss - stderr).tolist(), (scree.loss + stderr).tolist()
    ax.fill_between(scree.ks, below, above, color=color, alpha=0.2, linewidth=0)


def _against_diagonal(
    x: Tensor | Sequence[float],
    y: Tensor | Sequence[float],
    names: tuple[str, str],
    label: str | None,
    ax: "Axes | None",
) -> "tuple[Figure, Axes]":
    """Points of y against x on the line where they are equal."""
    across, up = _numbers(x), _numbers(y)
    if across.shape != up.shape or not across.numel():
        raise ValueError(
            f"{names[0]} and {names[1]} must have one shape, with at least one number, got "
            f"{tuple(across.shape)} and {tuple(up.shape)}"
        )
    fig, ax = _figure(ax)
    both = torch.cat([across.flatten(), up.flatten()])
    ends = [both.min().item(), both.max().item()]
    ax.plot(ends, ends, color=REFERENCE, linewidth=1, linestyle="--", zorder=1)
    ax.plot(
        across.flatten().tolist(),
        up.flatten().tolist(),
        marker="o",
        markersize=4,
        linestyle="none",
        label=label,
    )
    ax.set_aspect("equal")
    _finish(ax)
    return fig, ax


def _pmf(lengths: Lengths | float, n: int) -> Tensor:
    return (Exponential(lengths) if isinstance(lengths, int | float) else lengths).pmf(n)


def _edges(count: int) -> list[float]:
    """Of `count` steps, centred on 0, 1, ..."""
    return [i - 0.5 for i in range(count + 1)]


def _numbers(values: Tensor | Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.as_tensor(values).detach().cpu()


def _count_across(ax: "Axes") -> None:
    """No ticks between whole numbers."""
    from matplotlib.ticker import MaxNLocator

    if ax.get_xscale() == "linear":  # other scales have ticks of their own
        ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def _finish(ax: "Axes") -> None:
    ax.spines[["top", "right"]].set_visible(False)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False)


def _figure(ax: "Axes | None") -> "tuple[Figure, Axes]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'taildropout[plot]'") from error
    if ax is None:
        fig = Figure(figsize=(6, 4), layout="constrained")
        return fig, fig.subplots()
    # The figure of a subfigure is the one around it; get_figure(root=True) came with matplotlib 3.10.
    return ax.figure.figure, ax
