"""The scree curve from the training batches themselves."""

import torch
from torch import Tensor, nn

from ..models.width import find_layer
from .curve import Scree


class LiveScree:
    """The scree curve of a layer from the losses of its own training batches.

    In training every sample has its own k anyway. Its loss goes to the bin of that k: a curve with
    standard errors, for no extra forward pass and in constant memory. It is the loss on training
    data, of a network that changes while it is measured: good for watching, not for choosing.
    Samples of different ks are different samples, so the covariance is diagonal.

    Args:
        layer: a TailDropout, or a module with one in it: a TailMLP, or a whole model.
        half_life: after this many updates an old loss counts half. None: all count alike.

    Raises:
        ValueError: `half_life` is not above 0; no TailDropout in it, or several.

    Example:
        >>> from taildropout import TailDropout
        >>> layer = TailDropout()
        >>> live = LiveScree(layer)
        >>> for _ in range(10):
        ...     kept = layer(torch.ones(8, 4)).sum(1)
        ...     live.update((4 - kept) ** 2)  # one loss per sample
        >>> live.result().loss
        tensor([16.,  9.,  4.,  1.,  0.], dtype=torch.float64)
    """

    def __init__(self, layer: nn.Module, *, half_life: float | None = None) -> None:
        if half_life is not None and not half_life > 0:
            raise ValueError(f"half_life must be above 0 updates, got {half_life}")
        _, self.layer = find_layer(layer, None)
        self._keep = 1.0 if half_life is None else 0.5 ** (1 / half_life)
        # For each k: sum of the weights, of their squares, mean, weighted squares around it.
        self._bins = torch.zeros(4, 0, dtype=torch.float64)

    def update(self, per_sample_loss: Tensor) -> None:
        """Take in the losses of the batch that the layer saw last in training.

        Args:
            per_sample_loss: one value for each k that was drawn, the shape of `layer.drawn_k`.

        Raises:
            RuntimeError: the layer has drawn no k yet.
            ValueError: another shape, or a loss that is not finite.
        """
        k = self.layer.drawn_k
        if k is None:
            raise RuntimeError("the layer must have drawn a k: run the model in training first")
        if per_sample_loss.shape != k.shape:
            raise ValueError(
                "per_sample_loss must have one value for each k that was drawn, shape "
                f"{tuple(k.shape)}, got {tuple(per_sample_loss.shape)}"
            )
        k = k.detach().flatten().cpu()
        loss = per_sample_loss.detach().flatten().double().cpu()
        if not loss.isfinite().all():
            raise ValueError("per_sample_loss must be finite, got NaN or infinity")
        if k.numel() == 0:
            return
        bins = max(self._bins.shape[1], int(k.max()) + 1)
        self._bins = torch.nn.functional.pad(self._bins, [0, bins - self._bins.shape[1]])
        count = torch.bincount(k, minlength=bins).double()
        mean = torch.bincount(k, loss, minlength=bins) / count.clamp(min=1)
        squares = torch.bincount(k, (loss - mean[k]).square(), minlength=bins)

        weight, weight_squares, old_mean, old_squares = self._bins
        weight, weight_squares = weight * self._keep, weight_squares * self._keep**2
        total = weight + count
        shift = (mean - old_mean) * (count > 0)
        share = count / total.clamp(min=1e-300)
        self._bins = torch.stack(
            [
                total,
                weight_squares + count,
                old_mean + shift * share,
                old_squares * self._keep + squares + shift.square() * weight * share,
            ]
        )

    def result(self) -> Scree:
        """The curve so far, at the ks that occurred.

        A k that occurred once has no standard error: NaN.

        Raises:
            ValueError: there is nothing yet.
        """
        ks = self._bins[0].nonzero().flatten()
        if len(ks) == 0:
            raise ValueError("there is no loss yet: call update after each batch")
        weight, weight_squares, mean, squares = self._bins[:, ks]
        variance = squares / (weight - weight_squares / weight).clamp(min=0)
        variance[weight_squares >= weight**2] = torch.nan
        stderr_squared = variance * weight_squares / weight**2
        count = max(round(float(weight.sum())), 1)
        return Scree("", ks.tolist(), mean, count, torch.diag(stderr_squared * count))
