"""A TailDropout in a pruned network whose neighbours could not both be cut."""

from torch import Tensor
from torch.nn import functional

from .dropout import TailDropout


class FittedTailDropout(TailDropout):
    """A TailDropout on the first `width` of the features that arrive, with `size` going out.

    Where the module in front of a layer can't be cut, more features arrive, and the rest of them
    is sliced away; where the one behind can't be cut, zeros are added. Everything else, and what
    p and k mean, is as in a TailDropout of `width` features.

    For whoever wants it without this layer: `arrives` is the number of features that arrive, and
    `behind` that of the dims behind them. None where they are not known, or not always the same.
    """

    width: int
    size: int
    arrives: int | None = None
    behind: int | None = None

    @classmethod
    def fit(
        cls,
        layer: TailDropout,
        width: int,
        size: int,
        arrives: int | None = None,
        behind: int | None = None,
    ) -> "FittedTailDropout":
        """A copy of the layer, fitted."""
        fitted = cls()
        fitted.__dict__.update(layer.__dict__)
        fitted.width, fitted.size = width, size
        fitted.arrives, fitted.behind = arrives, behind
        if layer.together is not None:
            layer.together.replace(layer, fitted)
        return fitted

    def forward(self, input: Tensor) -> Tensor:
        if self.device_mesh is not None:
            raise ValueError(
                "a layer that slices features or adds zeros takes no device_mesh: it needs all of "
                "them in each process, or a DTensor"
            )
        output = super().forward(input.narrow(self.dropout_dim, 0, self.width))
        behind = output.ndim - 1 - range(output.ndim)[self.dropout_dim]  # the dims after it
        return functional.pad(output, [0, 0] * behind + [0, self.size - self.width])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, width={self.width}, size={self.size}"
