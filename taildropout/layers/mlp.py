"""A two-layer MLP with tail dropout in between."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.checks import count_samples
from ..functional.mlp import tail_mlp_of_draw
from ..functional.shards import check_whole_mlp
from ..lengths import Lengths
from .dropout import TailDropout
from .holding import HoldsDropout


class TailMLP(HoldsDropout, nn.Module):
    """`fc2(TailDropout(activation(fc1(x))))`, which in training never computes the tail.

    | state | what is computed |
    |---|---|
    | `train()` | a fresh k for each index of `batch_dim`; of both matrix products, forward and backward, only about the fraction 1 - p that reaches the output |
    | `eval()` | the plain two-layer network |
    | `set_k(k)` or `using_width(w)`, in either mode | for one k, only the first k hidden features |

    Outputs and gradients are those of `nn.Sequential(fc1, activation, TailDropout(p), fc2)`, with
    the same random state too. The state dict holds `fc1.*` and `fc2.*`. The layer's TailDropout
    is the child `dropout`, by which `scree` and `prune` find it. The layer reads the weights of
    `fc1` and `fc2` itself, so `fully_shard` must be given the whole layer or a module around it,
    and tensor parallelism the modules of `to_sequential()`.

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
        ValueError: p outside [0, 1] or NaN, an activation that is not elementwise, no blocks; in a
            call, weights of which each process holds a part.

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

    def forward(self, input: Tensor) -> Tensor:
        n = self.fc1.out_features
        self.dropout.check_recomputed()
        k = self.dropout.set_k_for(n)
        if self.training or k is not None:
            linears = self.fc1, self.fc2
            check_whole_mlp(*(linear.weight for linear in linears), modules=linears)
            if self.dropout.device_mesh is not None:
                raise ValueError(
                    "the TailDropout of a TailMLP takes no device_mesh: for tensor parallelism use "
                    "to_sequential()"
                )
        if self.training and k is None:
            count = count_samples(input, self.dropout.batch_dim, -1)
            output, drawn_k = tail_mlp_of_draw(
                input,
                self.fc1.weight,
                self.fc1.bias,
                self.fc2.weight,
                self.fc2.bias,
                self.dropout.batch_dim,
                activation=self.activation,
                lengths=self.dropout.lengths_for(n),
                draw=self.dropout.draw(count, input.device),
                blocks=self.blocks,
            )
            self.dropout.keep_drawn(drawn_k)
            return output
        # The compiler would specialise on k: it masks instead.
        if isinstance(k, int) and not torch.compiler.is_compiling():
            bias = None if self.fc1.bias is None else self.fc1.bias[:k]
            hidden = self.activation(nn.functional.linear(input, self.fc1.weight[:k], bias))
            return nn.functional.linear(hidden, self.fc2.weight[:, :k], self.fc2.bias)
        masked: Tensor = self.fc2(self.dropout(self.activation(self.fc1(input))))
        return masked

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
