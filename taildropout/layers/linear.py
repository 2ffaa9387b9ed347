"""A Linear layer that reads a prefix."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..functional.linear import Scale, check_scale, factor_of, linear_at
from ..lengths import Full, Lengths
from .dropout import TailDropout
from .fitted import FittedTailDropout
from .holding import HoldsDropout
from .hooks import ApplyChildToInput


class TailLinear(HoldsDropout, nn.Linear):
    """`nn.Linear` behind a TailDropout, with a further bias for each k < n.

    | state | what is computed |
    |---|---|
    | `train()` | for each index of `batch_dim` a fresh k: the Linear of the first k features, plus `tail_bias[k]` where k < n |
    | `eval()` | the Linear, bit for bit |
    | `set_k(k)` or `using_width(w)`, in either mode | as in training, with that k |

    What reads a bottleneck misses more than the tail when the tail is zeroed: its mean, too. Each
    row of `tail_bias` learns what to put in its place. The rows start at zero, and only those of
    ks that are drawn are trained.

    A checkpoint of `nn.Linear` loads, with a `tail_bias` of zeros. Pruned, the layer is an
    `nn.Linear`, which has taken in `tail_bias[k]` and the scale. Its TailDropout is the child
    `dropout`, by which `scree` and `prune` find it.

    Args:
        in_features: n.
        out_features: size of each output.
        bias: whether it has a bias at full width too.
        p: expected fraction of the features dropped, in [0, 1].
        batch_dim: the dim, or dims, of the input whose every index draws its own k.
        lengths: distribution of k. None: `Exponential(p)`.
        multiple_of: every k is a multiple of it, and so must n be.
        stratified: spread the ks of one call evenly over their distribution.
        scale: "sqrt" multiplies the prefix by sqrt(n/k), so that sums over it keep their size
            where features are independent: for deep stacks. With k = 0 only biases are left. None:
            nothing is rescaled.
        device: as in `nn.Linear`.
        dtype: as in `nn.Linear`.

    Shape:
        `(..., in_features)` to `(..., out_features)`.

    Raises:
        ValueError: p outside [0, 1] or NaN, another word for `scale`; in a call, an input of
            another number of features, and a `DTensor` where anything is dropped.

    Warns:
        UserWarning: once, when a k is set in eval that the lengths never draw, and whose row is
            still zero.

    Example:
        >>> layer = TailLinear(8, 3)
        >>> layer.load_state_dict(nn.Linear(8, 3).state_dict())
        <All keys matched successfully>
        >>> layer.tail_bias.shape
        torch.Size([8, 3])
        >>> from taildropout import prune
        >>> prune(nn.Sequential(nn.Linear(4, 8), layer), 5, torch.randn(2, 4))
        Sequential(
          (0): Linear(in_features=4, out_features=5, bias=True)
          (1): Linear(in_features=5, out_features=3, bias=True)
        )
    """

    tail_bias: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = 0.5,
        batch_dim: int | Sequence[int] = 0,
        *,
        lengths: Lengths | None = None,
        multiple_of: int = 1,
        stratified: bool = True,
        scale: Scale = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        rows = torch.zeros(in_features, out_features, device=device, dtype=dtype)
        self.tail_bias = nn.Parameter(rows)
        self.dropout = TailDropout(
            p, batch_dim, lengths=lengths, multiple_of=multiple_of, stratified=stratified
        )
        self.scale = check_scale(scale)
        self._last_k: int | None = None  # that was looked at
        self._has_warned = False

    def forward(self, input: Tensor) -> Tensor:
        k = self.dropout.k_for(input)
        if k is None:
            return linear(self.dropout(input), self.weight, self.bias)
        if self.dropout.device_mesh is not None:
            raise ValueError(
                "the TailDropout of a TailLinear takes no device_mesh, since it needs all features "
                "in each process: set it to None"
            )
        if isinstance(k, int) and not (self.training or torch.compiler.is_compiling()):
            self._warn_if_untrained(k)
        return linear_at(k, input, self.weight, self.bias, self.tail_bias, self.scale)

    def reset_parameters(self) -> None:
        """As in `nn.Linear`; `tail_bias` is zero."""
        super().reset_parameters()
        if hasattr(self, "tail_bias"):  # not so when nn.Linear is made
            nn.init.zeros_(self.tail_bias)

    def _warn_if_untrained(self, k: int) -> None:
        n, last_k = self.in_features, self._last_k
        self._last_k = k
        if self._has_warned or k in (n, last_k):
            return
        lengths = self.dropout.lengths_for(n)
        try:
            trained = lengths.pmf(n)[k] > 0 or self.tail_bias[k].any()
        except RuntimeError:  # there are no numbers to look at: fake tensors, or inside vmap
            return
        if not trained:
            self._has_warned = True
            warnings.warn(
                f"k = {k} is one that the lengths of this TailLinear never draw, and tail_bias[{k}] "
                f"was never trained: use a k that is drawn, or train with lengths that draw it. "
                f"They are {lengths}",
                stacklevel=3,
            )

    def extra_repr(self) -> str:
        scale = "" if self.scale is None else f', scale="{self.scale}"'
        return super().extra_repr() + scale

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and prefix + "tail_bias" not in state_dict:  # of an nn.Linear
            rows = torch.zeros(self.tail_bias.shape, device=weight.device, dtype=weight.dtype)
            state_dict[prefix + "tail_bias"] = rows
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@torch.no_grad()
def become_linear(layer: TailLinear, k: int) -> None:
    """Make the layer, in place, the `nn.Linear` that it is at k, of its first features.

    Its weight may have lost columns already. A dropout that slices what arrives, or adds zeros,
    stays in front of it.
    """
    n = len(layer.tail_bias)
    if layer.scale is not None and k < n:
        layer.weight = _like(layer.weight.double() * factor_of(k, n), layer.weight)
    if k < n:
        row = layer.tail_bias[k].double()
        total = row if layer.bias is None else layer.bias.double() + row
        layer.bias = _like(total, layer.weight if layer.bias is None else layer.bias)
    if layer.dropout.together is not None:
        layer.dropout.together.replace(layer.dropout)
    if isinstance(layer.dropout, FittedTailDropout):
        layer.dropout.together = None
        layer.dropout.lengths, layer.dropout.multiple_of = Full(), 1  # it drops no more
        layer.register_forward_pre_hook(ApplyChildToInput("dropout"), with_kwargs=True)
    else:
        del layer.dropout
    del layer.tail_bias, layer.scale, layer._last_k, layer._has_warned
    layer.__class__ = nn.Linear  # type: ignore[assignment]  # which it was, and more


def _like(value: Tensor, parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(parameter.dtype), requires_grad=parameter.requires_grad)
