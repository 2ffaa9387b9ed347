"""The measurement: loss as a function of k."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import choose

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Scree:
    """Loss as a function of k, measured on the same samples for every k.

    Attributes:
        layer: qualified name of the layer, or the pattern of several.
        ks: the measured prefix lengths, ints, increasing; of several layers the widths, floats.
        loss: mean loss for each of them; float64, shape `(len(ks),)`.
        count: number of samples.
        cov: covariance of the per-sample losses of two ks; float64, `(len(ks), len(ks))`.
        features: which k features were kept, "first", "random" or "principal": see `scree`.
    """

    layer: str
    ks: list[Any]
    loss: Tensor
    count: int
    cov: Tensor = field(repr=False)
    features: str = "first"

    @property
    def stderr(self) -> Tensor:
        """Standard error of each mean loss: float64, shape `(len(ks),)`. NaN for one sample."""
        return (self.cov.diagonal() / self.count).sqrt()

    def choose(self, tolerance: float = 0.01, confidence: float = 0.95) -> Any:
        """The smallest k that surely loses at most a tolerance against the largest measured k.

        It is an int that carries the name of the layer (of several layers a float, the width); of
        random features or principal components it is no k to prune to, which is refused. See
        `taildropout.measuring.choose.choose`.
        """
        return choose.choose(self, tolerance, confidence)

    def explain(self, tolerance: float = 0.01, confidence: float = 0.95) -> str:
        """What `choose` answers and why, and what it would take to go further down.

        See `taildropout.measuring.choose.explain`.
        """
        return choose.explain(self, tolerance, confidence)

    def one_standard_error(self) -> Any:
        """The smallest k whose loss is within one standard error of the smallest loss.

        See `taildropout.measuring.choose.one_standard_error`.
        """
        return choose.one_standard_error(self)

    def knee(self) -> Any:
        """The k where the curve bends most, or None if it does not bend.

        See `taildropout.measuring.choose.knee`.
        """
        return choose.knee(self)

    def to_dict(self) -> dict[str, Any]:
        """The measurement as plain data, fit for JSON; `from_dict` reads it back."""
        return {
            "layer": self.layer,
            "ks": self.ks,
            "loss": self.loss.tolist(),
            "count": self.count,
            "cov": self.cov.tolist(),
            "features": self.features,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Scree":
        """The Scree that `to_dict` wrote.

        Example:
            >>> s = Scree("1", [0, 1], torch.tensor([2.0, 1.0]).double(), 9, torch.eye(2).double())
            >>> Scree.from_dict(s.to_dict()).to_dict() == s.to_dict()
            True
        """
        return cls(
            data["layer"],
            list(data["ks"]),
            torch.tensor(data["loss"], dtype=torch.float64),
            data["count"],
            torch.tensor(data["cov"], dtype=torch.float64),
            data.get("features", "first"),
        )

    def to_pandas(self) -> "pd.DataFrame":
        """A table with the columns k (the index), loss and stderr. Needs pandas."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "to_pandas needs pandas: pip install 'taildropout[pandas]'"
            ) from error
        columns = {"loss": self.loss.tolist(), "stderr": self.stderr.tolist()}
        return pd.DataFrame(columns, index=pd.Index(self.ks, name="k"))

    def plot(
        self, ax: "Axes | None" = None, *, controls: Sequence["Scree"] = ()
    ) -> "tuple[Figure, Axes]":
        """Loss against k with its standard error, and of controls. Needs matplotlib.

        See `taildropout.showing.plot`.

        Args:
            ax: where to draw; None: into a new figure, which pyplot does not manage.
            controls: the same network measured with `features="random"` or "principal".
        """
        from ..showing.plot import plot_scree

        return plot_scree(self, controls=controls, ax=ax)
