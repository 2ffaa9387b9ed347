"""The layers: they store arguments and call `functional`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import functional as F
from .lengths import Lengths, check_p


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
        k = None if k is None else F.check_k(k)
        self._largest_k = 0 if k is None else F.largest_k(k)
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
            return F.keep_prefix_of_samples(
                input,
                k,
                self.batch_dim,
                self.dropout_dim,
                largest_k=self._largest_k,
                inplace=self.inplace,
            )
        if not self.training:
            return input
        output, self.drawn_k = F.tail_dropout_with_k(
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


class TailMLP(nn.Module):
    """`fc2(TailDropout(activation(fc1(x))))`, which in training never computes the tail.

    | state | what is computed |
    |---|---|
    | `train()` | a fresh k for each index of `batch_dim`; of both matrix products, forward and backward, only about the fraction 1 - p that reaches the output |
    | `eval()` | the plain two-layer network |
    | `set_k(k)`, in either mode | for an int, only the first k hidden features |

    Outputs and gradients are those of `nn.Sequential(fc1, activation, TailDropout(p), fc2)`, with
    the same random state too. The state dict holds `fc1.*` and `fc2.*`. The layer's TailDropout
    is the child `dropout`, by which `scree` and `prune` find it. The layer reads the weights of
    `fc1` and `fc2` itself, so `fully_shard` must be given the whole layer or a module around it.

    Args:
        in_features: size of each input.
        hidden_features: n, the number of features in between.
        out_features: size of each output. None: `in_features`.
        p: expected fraction of the hidden features dropped, in [0, 1].
        activation: an elementwise function, or a module class or module for one.
        bias: whether both Linear layers have a bias.
        lengths: distribution of k. None: `Exponential(p)`.
        batch_dim: the dim, or dims, of the input whose every index draws its own k: for
            `(batch, seq, features)`, 0 is one k per sequence and `(0, 1)` one per token.
        blocks: into how many blocks the hidden features are cut for the computation. None: of
            256 features each, at most 16.
        device: as in `nn.Linear`.
        dtype: as in `nn.Linear`.

    Shape:
        `(..., in_features)` to `(..., out_features)`.

    Raises:
        ValueError: p outside [0, 1] or NaN, an activation that is not elementwise, no blocks.

    Example:
        >>> mlp = TailMLP(16, 64, 4, p=0.8)
        >>> mlp(torch.randn(32, 16)).shape
        torch.Size([32, 4])
        >>> list(mlp.state_dict())
        ['fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias']
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        p: float = 0.5,
        activation: Callable[[Tensor], Tensor] | type[nn.Module] = nn.GELU,
        bias: bool = True,
        *,
        lengths: Lengths | None = None,
        batch_dim: int | Sequence[int] = 0,
        blocks: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if blocks is not None and blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        out_features = in_features if out_features is None else out_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.activation = activation() if isinstance(activation, type) else activation
        self.dropout = TailDropout(p, batch_dim, lengths=lengths)
        self.fc2 = nn.Linear(hidden_features, out_features, bias, device, dtype)
        self.blocks = blocks
        _check_elementwise(self.activation)

    @classmethod
    def from_sequential(cls, sequential: nn.Sequential, *, blocks: int | None = None) -> "TailMLP":
        """The same network as `nn.Sequential(Linear, activation, TailDropout, Linear)`.

        The parameters are shared.

        Raises:
            ValueError: the modules are others, or TailDropout works along another dim.
        """
        modules: list[Any] = list(sequential)
        kinds = (nn.Linear, nn.Module, TailDropout, nn.Linear)
        if len(modules) != 4 or not all(map(isinstance, modules, kinds)):
            raise ValueError(
                "from_sequential needs nn.Sequential(Linear, activation, TailDropout, Linear), got "
                f"{[type(module).__name__ for module in modules]}"
            )
        fc1, activation, dropout, fc2 = modules
        if dropout.dropout_dim != -1 or not dropout.stratified:
            raise ValueError(
                f"from_sequential needs stratified draws along dropout_dim=-1, got {dropout}"
            )
        _check_elementwise(activation)
        mlp = cls.__new__(cls)
        nn.Module.__init__(mlp)
        mlp.fc1, mlp.activation, mlp.dropout, mlp.fc2 = fc1, activation, dropout, fc2
        mlp.blocks = blocks
        mlp.training = sequential.training
        return mlp

    def to_sequential(self) -> nn.Sequential:
        """`nn.Sequential(fc1, activation, dropout, fc2)` of the same modules.

        Raises:
            TypeError: the activation is a function, not a module.
        """
        modules: list[Any] = [self.fc1, self.activation, self.dropout, self.fc2]
        sequential = nn.Sequential(*modules)
        sequential.training = self.training
        return sequential

    @property
    def p(self) -> float:
        """Expected fraction of the hidden features dropped."""
        return self.dropout.p

    @p.setter
    def p(self, p: float) -> None:
        self.dropout.p = p

    @property
    def k(self) -> int | Tensor | None:
        """The k that is set, or None."""
        return self.dropout.k

    def set_k(self, k: int | Tensor | None) -> None:
        """As `TailDropout.set_k`."""
        self.dropout.set_k(k)

    @contextmanager
    def using_k(self, k: int | Tensor | None) -> Iterator["TailMLP"]:
        """As `TailDropout.using_k`."""
        with self.dropout.using_k(k):
            yield self

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.dropout._k_tensor is None:
            drawn, self.dropout.drawn_k = F.tail_mlp_with_k(
                input,
                self.fc1.weight,
                self.fc1.bias,
                self.fc2.weight,
                self.fc2.bias,
                self.dropout.p,
                self.dropout.batch_dim,
                activation=self.activation,
                lengths=self.dropout.lengths,
                blocks=self.blocks,
            )
            return drawn
        # The compiler would specialise on k: it masks instead.
        if not torch.compiler.is_compiling() and isinstance(k := self.dropout.k, int):
            F.check_k_at_most(k, self.fc1.out_features)
            bias = None if self.fc1.bias is None else self.fc1.bias[:k]
            hidden = self.activation(nn.functional.linear(input, self.fc1.weight[:k], bias))
            return nn.functional.linear(hidden, self.fc2.weight[:, :k], self.fc2.bias)
        output: Tensor = self.fc2(self.dropout(self.activation(self.fc1(input))))
        return output

    def extra_repr(self) -> str:
        return "" if self.blocks is None else f"blocks={self.blocks}"


def _check_elementwise(activation: Callable[[Tensor], Tensor]) -> None:
    """By what it makes of features together and of each by itself."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        x = torch.linspace(-2, 2, 12, device="cpu").view(3, 4)
        try:
            together = activation(x)
            apart = torch.cat([activation(column) for column in x.split(1, dim=1)], dim=1)
            elementwise = torch.allclose(together, apart, atol=1e-5)
        except RuntimeError:
            elementwise = False
    if not elementwise:
        raise ValueError(
            f"activation must be elementwise, the same for all features, got {activation}"
        )
