"""What `torch.vmap` over k needs beside the network: rules for what it can't do, or not fast."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..functional import keep_prefix, prefix_linear

# --- a Linear that reads a prefix ----------------------------------------------------------------


def linear_of_prefix(
    features: Tensor, k: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`linear(keep_prefix(features, k), weight, bias)`; under vmap over k a running sum."""
    output: Tensor = _LinearOfPrefix.apply(features, k, weight, bias)
    return output


class _LinearOfPrefix(torch.autograd.Function):
    @staticmethod
    def forward(features: Tensor, k: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(keep_prefix(features, k), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Nothing is needed for gradients: a measurement has none."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        features: Tensor,
        k: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, int]:
        if in_dims[0] is None:
            return prefix_linear(features, weight, bias, k.tolist()), 0
        return F.linear(keep_prefix(features.movedim(in_dims[0], 0), k), weight, bias), 0


# --- layers whose copies lie along the batch, as one ----------------------------------------------


def folding_forwards(model: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
    """For GRUs and the like, which vmap can't run, and convolutions, which it can't in autocast."""
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            forwards[module] = _folding_recurrent(module, module.forward)
        elif isinstance(module, nn.modules.conv._ConvNd):
            forwards[module] = _folding_convolution(module, module.forward)
    return forwards


def _folding_convolution(
    conv: nn.modules.conv._ConvNd, forward: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    dims = len(conv.kernel_size) + 2

    def run(input: Tensor, *sizes: Any, **options: Any) -> Tensor:
        if input.ndim != dims or sizes or options:  # without a batch, or an output_size
            return forward(input, *sizes, **options)
        output: Tensor = _Folded.apply(lambda x: (forward(x),), 0, input)[0]
        return output

    return run


def _folding_recurrent(rnn: nn.RNNBase, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(input: Tensor, hx: Any = None) -> Any:
        if not isinstance(input, Tensor) or input.ndim != 3:  # packed, or without a batch
            return forward(input, hx)
        states, structure = tree_flatten(() if hx is None else hx)

        def flat(input: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            own = tree_unflatten(states, structure) if states else None
            return tuple(tree_leaves(forward(input, own)))

        output, *last = _Folded.apply(flat, 0 if rnn.batch_first else 1, input, *states)
        return output, tuple(last) if len(last) > 1 else last[0]

    return run


class _Folded(torch.autograd.Function):
    """A function of tensors whose batch dims are `dim` in the first and 1 in all others."""

    @staticmethod
    def forward(
        function: Callable[..., tuple[Tensor, ...]], dim: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is needed for gradients: a measurement has none."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        function: Callable[..., tuple[Tensor, ...]],
        dim: int,
        *tensors: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        folded = []
        for i, (tensor, copies) in enumerate(zip(tensors, in_dims[2:], strict=True)):
            if copies is None:
                tensor = tensor.expand(info.batch_size, *tensor.shape)
            else:
                tensor = tensor.movedim(copies, 0)
            at = dim if i == 0 else 1
            folded.append(tensor.movedim(0, at).flatten(at, at + 1))
        outputs = function(*folded)
        dims = (dim, *[1] * (len(outputs) - 1))
        sizes = (info.batch_size, -1)
        unfolded = (out.unflatten(at, sizes) for out, at in zip(outputs, dims, strict=True))
        return tuple(unfolded), dims


# --- warnings, and what modules keep ---------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that vmap runs an operation once for each copy, as a loop would."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


@contextmanager
def without_leftovers(model: nn.Module) -> Iterator[None]:
    """What a module keeps of a run under vmap is of no use outside: all it has is as before then."""
    before = {module: _kept(module) for module in model.modules()}
    try:
        yield
    finally:
        for module, own in before.items():
            for name, value in _kept(module).items():
                if any(
                    isinstance(leaf, Tensor) and _is_copies(leaf) for leaf in tree_leaves(value)
                ):
                    _restore(module, name, own)


_OF_ALL_MODULES = vars(nn.Module()).keys()


def _kept(module: nn.Module) -> dict[str, Any]:
    """Attributes and buffers; containers as they are now."""
    own = {name: v for name, v in vars(module).items() if name not in _OF_ALL_MODULES}
    return {
        name: type(value)(value) if type(value) in (dict, list) else value
        for name, value in {**own, **module._buffers}.items()
    }


def _restore(module: nn.Module, name: str, own: dict[str, Any]) -> None:
    if name in own:
        setattr(module, name, own[name])
    else:
        delattr(module, name)


def _is_copies(tensor: Tensor) -> bool:
    """Made under vmap: it holds one for each k."""
    return torch.func.debug_unwrap(tensor, recurse=False) is not tensor
