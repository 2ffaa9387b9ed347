"""The layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.checks import check_k, largest_k
from ..functional.dropout import tail_dropout_with_k
from ..functional.prefix import keep_prefix_of_samples
from ..lengths import Lengths, check_p


class TailDropout(nn.Module):
    """In training, keep a random number k of the first features of each sample, zero the rest.

    | state | output |
    |---|---|
    | `train()` | a fresh k for each index of `batch_dim`, shared along every other dim |
    | `eval()` | the input itself, the same object |
    | `set_k(k)`, in either mode | the first k features |
    | `set_k(None)`, `train()`, `eval()` | clears k |
    | `with layer.using_k(k):` | k inside, whatever was set before outside |

    Nothing is rescaled in any state. The API is that of `nn.Dropout`, and like it the layer has
    no parameters and an empty state dict, so a checkpoint moves between the two unchanged.

    Args:
        p: expected fraction of features dropped, E[1 - k/n], in [0, 1]. It can be changed at any
            time (`layer.p = 0.2`), without recompiling. Not used if `lengths` is given.
        batch_dim: the dim, or dims, whose every index is a sample with its own k. `()`: one k
            for the whole call.
        dropout_dim: the dim along which the features lie.
        lengths: distribution of k. None: `Exponential(p)`.
        stratified: spread the ks of one call evenly over their distribution.
        inplace: write the result into the input.

    Shape:
        Any; the output has the shape, dtype, device and memory format of the input.

    Raises:
        ValueError: p outside [0, 1] or NaN, coinciding dims; in a call also k above n.
        IndexError: in a call, a dim that the input does not have.
        TypeError: p that is no number, dims that are no ints, lengths without a pmf; in a call in
            training with no k set, an integer or boolean input.

    Example:
        >>> layer = TailDropout(p=0.5)
        >>> x = torch.ones(2, 4)
        >>> layer.eval()(x) is x
        True
        >>> layer.set_k(3)
        >>> layer(x)
        tensor([[1., 1., 1., 0.],
                [1., 1., 1., 0.]])
    """

    drawn_k: Tensor | None = None
    """The k that was drawn last in training: one for each index of `batch_dim`."""

    def __init__(
        self,
        p: float = 0.5,
        batch_dim: int | Sequence[int] = 0,
        dropout_dim: int = -1,
        *,
        lengths: Lengths | None = None,
        stratified: bool = True,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        if lengths is not None and not hasattr(lengths, "pmf"):
            raise TypeError(
                f"lengths must have a pmf(n), as lengths.Uniform() has, got {lengths!r}"
            )
        self.p = p
        self.batch_dim: int | tuple[int, ...] = (
            batch_dim if isinstance(batch_dim, int) else tuple(batch_dim)
        )
        self.dropout_dim = dropout_dim
        for dim in (dropout_dim, *([batch_dim] if isinstance(batch_dim, int) else batch_dim)):
            if not isinstance(dim, int):
                raise TypeError(
                    "batch_dim must be an int or a sequence of ints, and dropout_dim an int, got "
                    f"batch_dim={batch_dim!r} and dropout_dim={dropout_dim!r}"
                )
        self.lengths = lengths
        self.stratified = stratified
        self.inplace = inplace
        self.set_k(None)
        if dropout_dim in ([batch_dim] if isinstance(batch_dim, int) else batch_dim):
            raise ValueError(
                "batch_dim and dropout_dim must be different dims, got "
                f"batch_dim={batch_dim} and dropout_dim={dropout_dim}"
            )

    @property
    def p(self) -> float:
        """Expected fraction of features dropped."""
        return self._p

    @p.setter
    def p(self, p: float) -> None:
        self._p = check_p(p)
        # The compiler specialises on numbers but not on the values of tensors: p and k stand
        # in tensors too, so that changing them does not recompile.
        self._p_tensor = torch.tensor(self._p, dtype=torch.float64, device="cpu")

    @property
    def k(self) -> int | Tensor | None:
        """The k that is set, or None."""
        return self._k

    def set_k(self, k: int | Tensor | None) -> None:
        """Keep exactly the first k features from now on, in training and in eval.

        Args:
            k: an int for all samples, an integer tensor with one k for each index of
                `batch_dim`, or None to draw again in training and pass everything in eval.
                `train()` and `eval()` clear it too.

        Raises:
            ValueError: k is negative. (A k above the number of features, and a tensor whose
                shape does not fit, raise in the call, where the input is known.)
            TypeError: k is not an integer.
        """
        k = None if k is None else check_k(k)
        self._largest_k = 0 if k is None else largest_k(k)
        self._k = k
        self._k_tensor = torch.tensor(k, device="cpu") if isinstance(k, int) else k

    @contextmanager
    def using_k(self, k: int | Tensor | None) -> Iterator["TailDropout"]:
        """`set_k(k)` inside the with block; what was set before is set again outside.

        Example:
            >>> layer = TailDropout().eval()
            >>> with layer.using_k(1):
            ...     layer(torch.ones(1, 3))
            tensor([[1., 0., 0.]])
            >>> layer(torch.ones(1, 3))
            tensor([[1., 1., 1.]])
        """
        before = self._k
        self.set_k(k)
        try:
            yield self
        finally:
            self.set_k(before)

    def forward(self, input: Tensor) -> Tensor:
        compiled = torch.compiler.is_dynamo_compiling()
        k = self._k_tensor if compiled else self._k
        if k is not None:
            return keep_prefix_of_samples(
                input,
                k,
                self.batch_dim,
                self.dropout_dim,
                largest_k=self._largest_k,
                inplace=self.inplace,
            )
        if not self.training:
            return input
        output, self.drawn_k = tail_dropout_with_k(
            input,
            self._p_tensor if compiled else self._p,
            self.batch_dim,
            self.dropout_dim,
            lengths=self.lengths,
            stratified=self.stratified,
            inplace=self.inplace,
        )
        return output

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "drawn_k"}

    def train(self, mode: bool = True) -> "TailDropout":
        """As in `nn.Module`; clears k."""
        self.set_k(None)
        return super().train(mode)

    def extra_repr(self) -> str:
        parts = [f"p={self.p}" if self.lengths is None else f"lengths={self.lengths}"]
        parts += [f"batch_dim={self.batch_dim}", f"dropout_dim={self.dropout_dim}"]
        parts += ["stratified=False"] if not self.stratified else []
        parts += ["inplace=True"] if self.inplace else []
        parts += [f"k={self._k}"] if self._k is not None else []
        return ", ".join(parts)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state_dict.pop(prefix + "k", None)  # some implementations of the layer saved it
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
