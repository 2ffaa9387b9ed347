"""The scree curve from the training batches themselves."""

import torch
from torch import Tensor, nn

from ..draws import inverse_cdf
from ..layers import TailDropout
from ..lengths import lengths_or_exponential
from ..models.insert import tail_dropouts
from ..models.width import find_layer
from .curve import Scree


class LiveScree:
    """The scree curve of a layer, or of a network, from the losses of its own training batches.

    In training every sample has its own k anyway. Its loss goes to the bin of that k: a curve with
    standard errors, for no extra forward pass and in constant memory. It is the loss on training
    data, of a network that changes while it is measured: good for watching, not for choosing.
    Samples of different ks are different samples, so the covariance is diagonal.

    A network whose layers are drawn together (`draw_together`) is measured by its width: that
    which each sample's uniform number means for a layer of so many `features`. So it is, too, in
    compiled code, where a layer does not keep what it drew.

    Args:
        layer: a TailDropout, or a module with one in it: a TailMLP, or a whole model; or a model
            whose layers are all drawn together, with equal lengths.
        half_life: after this many updates an old loss counts half. None: all count alike.
        features: measure by width, in steps of 1 / features. None: 32 for several layers, and by
            the k of the only one.

    Raises:
        ValueError: `half_life` is not above 0; no TailDropout in it, or several that are not drawn
            together.

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

    def __init__(
        self, layer: nn.Module, *, half_life: float | None = None, features: int | None = None
    ) -> None:
        if half_life is not None and not half_life > 0:
            raise ValueError(f"half_life must be above 0 updates, got {half_life}")
        if features is not None and features < 1:
            raise ValueError(f"features must be at least 1, got {features}")
        self.layers = _layers_of_one_curve(layer)
        several = len(self.layers) > 1
        if features is not None and self.layers[0].together is None:
            raise ValueError("a width is measured of layers that are drawn together: draw_together")
        self._features = 32 if several and features is None else features
        self._seen: Tensor | None = None
        self._keep = 1.0 if half_life is None else 0.5 ** (1 / half_life)
        # For each k: sum of the weights, of their squares, mean, weighted squares around it.
        self._bins = torch.zeros(4, 0, dtype=torch.float64)

    def update(self, per_sample_loss: Tensor) -> None:
        """Take in the losses of the batch that the layer saw last in training.

        Args:
            per_sample_loss: one value for each k that was drawn, the shape of `layer.drawn_k`;
                for a network one for each sample.

        Raises:
            RuntimeError: no k was drawn since the last update, or the layer is in eval.
            ValueError: another shape, or a loss that is not finite; layers with other lengths.
        """
        if not any(layer.training for layer in self.layers):
            raise RuntimeError(
                "the losses must be those of a batch in training, and the layer is in eval, where "
                "every sample has all features"
            )
        drawn, k = self._drawn()
        if drawn is self._seen:
            raise RuntimeError(
                "the layer must have drawn a k since the last update: run the model in training "
                "first. (In compiled code a layer does not keep it: call draw_together and give "
                "features, to measure by width)"
            )
        if per_sample_loss.shape != k.shape:
            raise ValueError(
                "per_sample_loss must have one value for each k that was drawn, shape "
                f"{tuple(k.shape)}, got {tuple(per_sample_loss.shape)}"
            )
        k = k.detach().flatten().cpu()
        loss = per_sample_loss.detach().flatten().double().cpu()
        if not loss.isfinite().all():
            raise ValueError("per_sample_loss must be finite, got NaN or infinity")
        self._seen = drawn
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

    def _drawn(self) -> tuple[Tensor | None, Tensor]:
        """What was drawn last, and the bin of each sample: its k."""
        layer = self.layers[0]
        if self._features is None:
            return layer.drawn_k, torch.empty(0) if layer.drawn_k is None else layer.drawn_k
        drawn = None if layer.together is None else layer.together.drawn
        if drawn is None:
            return None, torch.empty(0)
        ks = [
            inverse_cdf(lengths_or_exponential(one.lengths, one.p), self._features, drawn)
            for one in self.layers
        ]
        if not all(torch.equal(k, ks[0]) for k in ks):
            raise ValueError(
                "layers must have equal lengths for a sample to have one width, got "
                f"{[lengths_or_exponential(one.lengths, one.p) for one in self.layers]}"
            )
        return drawn.uniforms, drawn.by_sample(ks[0])

    def result(self) -> Scree:
        """The curve so far, at the ks that occurred; of a network, at the widths.

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
        cov = torch.diag(stderr_squared * count)
        if self._features is None:
            return Scree("", ks.tolist(), mean, count, cov)
        widths = (ks.double() / self._features).tolist()
        return Scree("*", widths, mean, count, cov)


def _layers_of_one_curve(model: nn.Module) -> list[TailDropout]:
    """The only one, or several that are drawn together."""
    layers = list(tail_dropouts(model).values())
    shared = {id(layer.together) for layer in layers if layer.together is not None}
    if len(shared) == 1 and all(layer.together is not None for layer in layers):
        return layers
    return [find_layer(model, None)[1]]
