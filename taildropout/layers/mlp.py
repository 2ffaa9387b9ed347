"""A two-layer MLP, gated or not, with tail dropout in between."""

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear

from ..functional.checks import count_samples
from ..functional.mlp import hidden_features, tail_mlp_of_draw
from ..functional.shards import check_whole_mlp
from ..lengths import Lengths
from .dropout import TailDropout
from .holding import HoldsDropout


class TailMLP(HoldsDropout, nn.Module):
    """`fc2(TailDropout(activation(fc1(x))))`, which in training never computes the tail.

    | state | what is computed |
    |---|---|
    | `train()` | a fresh k for each index of `batch_dim`; of all matrix products, forward and backward, only about the fraction 1 - p that reaches the output |
    | `eval()` | the plain network |
    | `set_k(k)` or `using_width(w)`, in either mode | for one k, only the first k hidden features |

    With `gated=True` it is `down(TailDropout(activation(gate(x)) * up(x)))`, the MLP of Llama and
    its relatives, from and to which `from_gated` and `to_gated` lead.

    Outputs and gradients are those of `nn.Sequential(fc1, activation, TailDropout(p), fc2)`, with
    the same random state too. The state dict holds `fc1.*` and `fc2.*`, or `gate.*`, `up.*` and
    `down.*`. The layer's TailDropout is the child `dropout`, by which `scree` and `prune` find it.
    The layer reads the weights of its Linears itself, so `fully_shard` must be given the whole
    layer or a module around it, and tensor parallelism the modules of `to_sequential()` or
    `to_gated()`.

    Args:
        in_features: size of each input.
        hidden_features: n, the number of features in between.
        out_features: size of each output. None: `in_features`.
        p: expected fraction of the hidden features dropped, in [0, 1].
        activation: an elementwise function, or a module class or module for one.
        bias: whether the Linear layers have a bias.
        gated: whether the hidden features have a gate.
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
        >>> list(TailMLP(16, 64, activation=nn.SiLU, bias=False, gated=True).state_dict())
        ['gate.weight', 'up.weight', 'down.weight']
    """

    activation: Callable[[Tensor], Tensor]

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        p: float = 0.5,
        activation: Callable[[Tensor], Tensor] | type[nn.Module] = nn.GELU,
        bias: bool = True,
        *,
        gated: bool = False,
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
        *into, out = _linears(gated)
        linears = {n: nn.Linear(in_features, hidden_features, bias, device, dtype) for n in into}
        linears[out] = nn.Linear(hidden_features, out_features, bias, device, dtype)
        activation = activation() if isinstance(activation, type) else activation
        self._hold(linears, activation, TailDropout(p, batch_dim, lengths=lengths), blocks)

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
        linears = {"fc1": fc1, "fc2": fc2}
        return cls._of(linears, activation, dropout, blocks, sequential.training)

    @classmethod
    def from_gated(
        cls, module: nn.Module, dropout: TailDropout | None = None, *, blocks: int | None = None
    ) -> "TailMLP":
        """The same network as the MLP of a Llama, Mistral, Qwen or Gemma, to be put in its place.

        The parameters are shared.

        Args:
            module: with the children `gate_proj`, `up_proj` and `down_proj`, which are Linears, and
                `act_fn`, of which it computes `down_proj(act_fn(gate_proj(x)) * up_proj(x))`.
            dropout: says how k is drawn. None: the module's own, as `to_gated` leaves it there,
                or else `TailDropout()`.
            blocks: as in `TailMLP`.

        Raises:
            ValueError: the module has other children or computes something else, or TailDropout
                works along another dim.

        Example:
            >>> gated = TailMLP(16, 64, activation=nn.SiLU, gated=True).to_gated()
            >>> [name for name, _ in gated.named_children()]
            ['gate_proj', 'act_fn', 'up_proj', 'dropout', 'down_proj']
            >>> TailMLP.from_gated(gated, TailDropout(0.8)).p
            0.8
        """
        children: dict[str, Any] = dict(module.named_children())
        if dropout is None:
            dropout = children.get("dropout", TailDropout())
        linears: dict[str, Any] = {n: children.get(f"{n}_proj") for n in _linears(gated=True)}
        activation: Any = getattr(module, "act_fn", None)
        fits = all(isinstance(one, nn.Linear) for one in linears.values()) and callable(activation)
        others = children.keys() - {"gate_proj", "act_fn", "up_proj", "dropout", "down_proj"}
        if not (fits and isinstance(children.get("dropout", dropout), TailDropout)) or others:
            raise ValueError(
                "from_gated needs a module with the Linears gate_proj, up_proj and down_proj, and "
                "act_fn, as Llama's MLP has them (one Linear for both, as Phi-3's gate_up_proj, must "
                f"be split into two first), got {type(module).__name__} with "
                f"{ {name: type(child).__name__ for name, child in children.items()} }"
            )
        if any([*one.children()] for one in linears.values()):
            raise ValueError(
                "from_gated needs Linears without children, and one has a layer that was put in, "
                "as nest and insert do, which would drop once more: remove() it first"
            )
        _check_gated(module, linears, activation)
        mlp = cls._of(linears, activation, dropout, blocks, module.training)
        dropout.training = mlp.training
        return mlp

    @classmethod
    def _of(
        cls,
        linears: Mapping[str, nn.Linear],
        activation: Callable[[Tensor], Tensor],
        dropout: TailDropout,
        blocks: int | None,
        training: bool,
    ) -> "TailMLP":
        if dropout.dropout_dim != -1 or not dropout.stratified:
            raise ValueError(
                f"a TailMLP needs stratified draws along dropout_dim=-1, got {dropout}"
            )
        mlp = cls.__new__(cls)
        nn.Module.__init__(mlp)
        mlp._hold(linears, activation, dropout, blocks)
        mlp.training = training
        return mlp

    def _hold(
        self,
        linears: Mapping[str, nn.Linear],
        activation: Callable[[Tensor], Tensor],
        dropout: TailDropout,
        blocks: int | None,
    ) -> None:
        _check_elementwise(activation)
        modules = {**linears, "activation": activation, "dropout": dropout}
        for name in _GATED if "gate" in linears else _PLAIN:
            setattr(self, name, modules[name])
        self.blocks = blocks

    def to_sequential(self) -> nn.Sequential:
        """`nn.Sequential(fc1, activation, dropout, fc2)` of the same modules.

        Raises:
            TypeError: the activation is a function, not a module.
            ValueError: the hidden features have a gate.
        """
        if self.gated:
            raise ValueError("a gated TailMLP is no nn.Sequential: use to_gated()")
        sequential = nn.Sequential(*self.in_turn.values())
        sequential.training = self.training
        return sequential

    def to_gated(self) -> nn.Module:
        """`down_proj(dropout(act_fn(gate_proj(x)) * up_proj(x)))` of the same modules.

        They have the names of a Llama's MLP, so a Llama with it in place of a TailMLP has the state
        dict that it had before.

        Raises:
            TypeError: the activation is a function, not a module.
            ValueError: the hidden features have no gate.
        """
        if not self.gated:
            raise ValueError("a TailMLP without a gate is an nn.Sequential: use to_sequential()")
        names = {"activation": "act_fn", "dropout": "dropout"}
        modules = {names.get(name, f"{name}_proj"): one for name, one in self.in_turn.items()}
        module = gated_module(modules)
        module.training = self.training
        return module

    @property
    def gated(self) -> bool:
        """Whether the hidden features have a gate."""
        return "gate" in self._modules

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """`fc1` and `fc2`, or `gate`, `up` and `down`."""
        return tuple([getattr(self, name) for name in _linears(self.gated)])

    @property
    def in_turn(self) -> dict[str, Any]:
        """The modules by name, as they are called one after another."""
        return {name: getattr(self, name) for name in (_GATED if self.gated else _PLAIN)}

    def forward(self, input: Tensor) -> Tensor:
        *into, out = self.linears
        n = out.in_features
        self.dropout.check_recomputed()
        k = self.dropout.set_k_for(n)
        if self.training or k is not None:
            linears = self.linears
            check_whole_mlp(*(one.weight for one in linears), modules=linears)
            if self.dropout.device_mesh is not None:
                raise ValueError(
                    "the TailDropout of a TailMLP takes no device_mesh: for tensor parallelism use "
                    "to_sequential() or to_gated()"
                )
        if self.training and k is None:
            count = count_samples(input, self.dropout.batch_dim, -1)
            output, drawn_k = tail_mlp_of_draw(
                input,
                [(one.weight, one.bias) for one in into],
                (out.weight, out.bias),
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
            first_k = [(o.weight[:k], None if o.bias is None else o.bias[:k]) for o in into]
            hidden = hidden_features(input, first_k, self.activation)
            return linear(hidden, out.weight[:, :k], out.bias)
        hidden = self.activation(into[0](input))
        hidden = hidden * into[1](input) if self.gated else hidden
        masked: Tensor = out(self.dropout(hidden))
        return masked

    def extra_repr(self) -> str:
        return "" if self.blocks is None else f"blocks={self.blocks}"


_PLAIN = "fc1", "activation", "dropout", "fc2"
_GATED = "gate", "activation", "up", "dropout", "down"


def _linears(gated: bool) -> tuple[str, ...]:
    return ("gate", "up", "down") if gated else ("fc1", "fc2")


def gated_module(modules: dict[str, Any]) -> fx.GraphModule:
    """A plain module of torch's that computes `down(...(activation(gate(x)) * up(x)))`.

    `modules`: by name, in the order gate, activation, up, what comes in between, down.
    """
    gate, activation, up, *then = modules
    graph = fx.Graph()
    x = graph.placeholder("x")
    activated = graph.call_module(activation, (graph.call_module(gate, (x,)),))
    hidden = graph.call_function(operator.mul, (activated, graph.call_module(up, (x,))))
    for name in then:
        hidden = graph.call_module(name, (hidden,))
    graph.output(hidden)
    return fx.GraphModule(modules, graph, "GatedMLP")


def _check_gated(
    module: nn.Module, linears: Mapping[str, nn.Linear], activation: Callable[[Tensor], Tensor]
) -> None:
    """By what it makes of a few numbers: some have a factor, or zero more in between."""
    weight = linears["gate"].weight
    check_whole_mlp(*(one.weight for one in linears.values()), modules=[*linears.values()])
    if weight.is_meta:
        return
    numbers = torch.linspace(-2, 2, 4 * weight.shape[1], device="cpu").view(-1, 4).T
    x = numbers.to(weight)
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        expected = linears["down"](activation(linears["gate"](x)) * linears["up"](x))
        dropout = module._modules.get("dropout")
        with dropout.using_width(1.0) if isinstance(dropout, TailDropout) else nullcontext():
            got = module.forward(x)
    if not torch.allclose(got, expected, rtol=0.01, atol=0.01 * float(expected.abs().max())):
        raise ValueError(
            "from_gated needs a module that computes down_proj(act_fn(gate_proj(x)) * up_proj(x)), "
            f"got {type(module).__name__}, which computes something else of these modules"
        )


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
