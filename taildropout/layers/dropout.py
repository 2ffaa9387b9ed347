"""The layer."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..draws import Draw, draw_uniforms, inverse_cdf
from ..functional.checks import (
    align_samples,
    as_dims,
    check_droppable,
    resolve_dim,
    resolve_dims,
    spread,
)
from ..functional.prefix import zero_tail
from ..functional.shards import (
    as_in_first_process,
    as_part,
    features_of_all,
    is_sharded,
    k_of_part,
)
from ..lengths import Exponential, InGroups, Lengths, check_lengths, lengths_or_exponential
from .recomputing import SettingsOfCalls, in_backward
from .settings import SetK, SetWidth, check_groups, check_multiple_of, width_or_k
from .together import Together

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class TailDropout(nn.Module):
    """In training, keep a random number k of the first features of each sample, zero the rest.

    | state | output |
    |---|---|
    | `train()` | a fresh k for each index of `batch_dim`, shared along every other dim |
    | `eval()` | the input itself, the same object |
    | `set_k(k)`, in either mode | the first k features |
    | `set_k(None)`, `train()`, `eval()` | clears k |
    | `with layer.using_k(k):` | k inside, whatever was set before outside |
    | `with layer.using_width(w):` | k = ceil(w * n) inside, also across `train()` and `eval()` |

    Nothing is rescaled in any state. The API is that of `nn.Dropout`, and like it the layer has
    no parameters and an empty state dict, so a checkpoint moves between the two unchanged.

    Args:
        p: expected fraction of features dropped, E[1 - k/n], in [0, 1]. It can be changed at any
            time (`layer.p = 0.2`), without recompiling. Not used if `lengths` is given.
        batch_dim: the dim, or dims, whose every index is a sample with its own k. `()`: one k
            for the whole call.
        dropout_dim: the dim along which the features lie.
        lengths: distribution of k. None: `Exponential(p)`.
        multiple_of: every k is a multiple of it, and so must n be: the size of a head, say, in
            front of an attention's output projection. The lengths are then those of the
            n/multiple_of groups, `p` is as exact as ever, and widths are rounded up to a multiple.
        stratified: spread the ks of one call evenly over their distribution.
        inplace: write the result into the input.
        device_mesh: where plain inputs are shards, the processes that hold the features in order,
            such as `mesh["tp"]`. k then counts the features of all of them, and ks are drawn by
            the first process for all. Not needed for a `DTensor`, which knows its shards.

    Shape:
        Any; the output has the shape, dtype, device and memory format of the input.

    Raises:
        ValueError: p outside [0, 1] or NaN, coinciding dims, a k that is no multiple of
            `multiple_of`; in a call also k above n, an n that is no multiple, and shards of other
            sizes than `torch.chunk` makes.
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
    """The k that was drawn last in training: one for each index of `batch_dim`.

    Compiled code does not keep it."""

    together: Together | None = None
    """What the layer shares with those that are drawn together with it."""

    def __init__(
        self,
        p: float = 0.5,
        batch_dim: int | Sequence[int] = 0,
        dropout_dim: int = -1,
        *,
        lengths: Lengths | None = None,
        multiple_of: int = 1,
        stratified: bool = True,
        inplace: bool = False,
        device_mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__()
        dims = as_dims(batch_dim)
        if not isinstance(dropout_dim, int):
            raise TypeError(f"dropout_dim must be an int, got {dropout_dim!r}")
        if dropout_dim in dims:
            raise ValueError(
                "batch_dim and dropout_dim must be different dims, got "
                f"batch_dim={batch_dim} and dropout_dim={dropout_dim}"
            )
        self.p = p
        self.batch_dim: int | tuple[int, ...] = batch_dim if isinstance(batch_dim, int) else dims
        self.dropout_dim = dropout_dim
        self.lengths = None if lengths is None else check_lengths(lengths)
        self.multiple_of = check_multiple_of(multiple_of)
        self.stratified = stratified
        self.inplace = inplace
        self.device_mesh = device_mesh
        self._k: SetK | None = None
        self._width: SetWidth | SetK | None = None
        self._settings = SettingsOfCalls()
        self._counted: tuple[DeviceMesh, int, int] | None = None

    @property
    def p(self) -> float:
        """Expected fraction of features dropped."""
        return self._exponential.p

    @p.setter
    def p(self, p: float) -> None:
        self._exponential = Exponential(p)
        # The compiler specialises on numbers but not on the values of tensors.
        self._p_tensor = torch.tensor(self.p, dtype=torch.float64, device="cpu")

    @property
    def k(self) -> int | Tensor | None:
        """The k that is set, or None."""
        return None if self._k is None else self._k.value

    def set_k(self, k: int | Tensor | None) -> None:
        """Keep exactly the first k features from now on, in training and in eval.

        Args:
            k: an int for all samples, an integer tensor with one k for each index of
                `batch_dim`, or None to draw again in training and pass everything in eval.
                `train()` and `eval()` clear it too.

        Raises:
            ValueError: k is negative, or no multiple of `multiple_of`. (A k above the number of
                features, and a tensor whose shape does not fit, raise in the call, where the
                input is known.)
            TypeError: k is not an integer.
        """
        self._k = None if k is None else SetK.of(k, self.multiple_of)

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
            self._k = before

    @contextmanager
    def using_width(self, w: float | None) -> Iterator["TailDropout"]:
        """A width inside the with block: of n features the first k = ceil(w * n), in both modes.

        `train()` and `eval()` inside leave it in force, so it holds in whatever they are called
        by. A k that was set outside is hidden; one that is set inside is in force until it is
        cleared. Outside all is as before.

        Args:
            w: the fraction of the features to keep, a float in [0, 1]; or an int, which is k; or
                None: inside no width is in force, whatever was set outside.

        Raises:
            ValueError: a float outside [0, 1], a negative int; in a call, an int above n.
            TypeError: `w` is no number.

        Example:
            >>> layer = TailDropout()
            >>> with layer.using_width(0.5):
            ...     layer.eval()(torch.ones(1, 4))
            tensor([[1., 1., 0., 0.]])
        """
        width = None if w is None else width_or_k(w, self.multiple_of)
        before = self._k, self._width
        self._k, self._width = None, width
        try:
            yield self
        finally:
            self._k, self._width = before

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            return self._forward_nested(input)
        if self.device_mesh is not None and not is_sharded(input):
            return self._forward_part(input, self.device_mesh)
        k = self.k_for(input)
        return input if k is None else zero_tail(input, k, self.dropout_dim, self.inplace)

    def k_for(self, input: Tensor) -> int | Tensor | None:
        """Which k a call has: an int, a tensor that broadcasts against the input, or None.

        What is set, by the innermost of `set_k`, `using_k` and `using_width`; else in training a
        draw; else None, and everything passes.
        """
        self.check_recomputed()
        if self._in_force is not None:
            n = input.shape[resolve_dim(input, self.dropout_dim, "dropout_dim")]
            k = self.set_k_for(n)
            assert k is not None
            return align_samples(k, input, self.batch_dim, self.dropout_dim)
        if not self.training:
            return None
        check_droppable(input)
        batch_dims, dim = resolve_dims(input, self.batch_dim, self.dropout_dim)
        shape = input.shape
        n, samples = shape[dim], [shape[d] for d in batch_dims]
        draw = self.draw(math.prod(samples), input.device)
        lengths = self._in_groups(self._lengths_for_call(), n)
        k = as_in_first_process(draw.by_sample(inverse_cdf(lengths, n, draw)), input)
        k = k if len(samples) == 1 else k.view(samples)
        self.keep_drawn(k)
        return spread(k, input, batch_dims)

    def set_k_for(self, n: int) -> int | Tensor | None:
        """The k that is set, for n features; None where it is drawn or everything passes."""
        in_force = self._in_force
        if in_force is None:
            return None
        check_groups(n, self.multiple_of)
        return in_force.for_features(n)

    def draw(self, count: int, device: torch.device) -> Draw:
        """A uniform number for each of the samples of a call."""
        if self.together is not None:
            return self.together.draw(count, device)
        return draw_uniforms(count, stratified=self.stratified, device=device)

    def keep_drawn(self, k: Tensor) -> None:
        """As `drawn_k`; not in compiled code, where a checkpoint allows no writing."""
        if not torch.compiler.is_compiling() and not in_backward():
            object.__setattr__(self, "drawn_k", k)  # it can't be a parameter: a third of the time

    def check_recomputed(self) -> None:
        """Raise if a checkpoint computes a call again after the k that is set has changed."""
        if not torch.compiler.is_compiling() and (self.training or torch.is_grad_enabled()):
            self._settings.check(None if self._in_force is None else self._in_force.value)

    def lengths_for(self, n: int) -> Lengths:
        """The distribution of k of n features."""
        return self._in_groups(self._exponential if self.lengths is None else self.lengths, n)

    def _in_groups(self, lengths: Lengths, n: int) -> Lengths:
        check_groups(n, self.multiple_of)
        return lengths if self.multiple_of == 1 else InGroups(lengths, self.multiple_of)

    def _forward_nested(self, input: Tensor) -> Tensor:
        """Of samples of several lengths, as `nn.TransformerEncoder` makes of a padding mask."""
        samples = input.unbind()
        dim = resolve_dim(input, self.dropout_dim, "dropout_dim")
        if as_dims(self.batch_dim) != (0,) or dim != input.dim() - 1:
            raise ValueError(
                "samples in a nested tensor lie along its first dim and features along its last, "
                f"got batch_dim={self.batch_dim} and dropout_dim={self.dropout_dim}: pass a padded "
                "tensor"
            )
        like = torch.empty(len(samples), samples[0].shape[-1] if samples else 0)
        k = self.k_for(like.to(input.device, input.dtype))
        if k is None:
            return input
        ks = [k] * len(samples) if isinstance(k, int) else k.flatten()
        kept = [zero_tail(x, one, -1, False) for x, one in zip(samples, ks, strict=True)]
        return torch.nested.as_nested_tensor(kept, layout=input.layout) if kept else input

    def _forward_part(self, input: Tensor, mesh: "DeviceMesh") -> Tensor:
        """Of a plain tensor, this process's shard of the features."""
        dim = resolve_dim(input, self.dropout_dim, "dropout_dim")
        n = input.shape[dim]
        if self._counted is None or self._counted[0] is not mesh:
            self._counted = mesh, n, features_of_all(n, mesh, input.device)
        _, before, n_of_all = self._counted
        if n != before:
            raise ValueError(
                "a layer with a device_mesh must always get shards of one size, which are counted "
                f"in its first call, got {before} features then and {n} now: use another layer"
            )
        whole = as_part(input, mesh, dim, n_of_all)
        k = self.k_for(whole)
        return input if k is None else zero_tail(input, k_of_part(k, whole, dim), dim, self.inplace)

    @property
    def _in_force(self) -> SetK | SetWidth | None:
        return self._width if self._k is None else self._k

    def _lengths_for_call(self) -> Lengths:
        if self.lengths is not None:
            return self.lengths
        if torch.compiler.is_dynamo_compiling():
            return lengths_or_exponential(None, self._p_tensor)
        return self._exponential

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "drawn_k"}

    def train(self, mode: bool = True) -> "TailDropout":
        """As in `nn.Module`; clears k."""
        self.set_k(None)
        return super().train(mode)

    def extra_repr(self) -> str:
        parts = [f"p={self.p}" if self.lengths is None else f"lengths={self.lengths}"]
        parts += [f"batch_dim={self.batch_dim}", f"dropout_dim={self.dropout_dim}"]
        parts += [f"multiple_of={self.multiple_of}"] if self.multiple_of > 1 else []
        parts += ["stratified=False"] if not self.stratified else []
        parts += ["inplace=True"] if self.inplace else []
        parts += [f"device_mesh={self.device_mesh}"] if self.device_mesh is not None else []
        parts += [f"using_width={self._width.value}"] if self._width is not None else []
        parts += [f"k={self.k}"] if self._k is not None else []
        return ", ".join(parts)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state_dict.pop(prefix + "k", None)  # some implementations of the layer saved it
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
