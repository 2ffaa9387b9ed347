"""What a network costs: its parameters, and the FLOPs of one call."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models.copies import PruningError, first_line
from ..models.fakes import without_numbers
from ..models.inputs import Inputs, call

Shape = Sequence[int]


@dataclass(frozen=True)
class Cost:
    """What a network takes: its parameters, and the FLOPs of one call on the example inputs.

    FLOPs are two for each multiplication of a matrix product, a convolution, attention or a
    recurrent layer, as `torch.utils.flop_counter` has it.
    """

    parameters: int
    flops: int


def costs_by_module(model: nn.Module, inputs: Inputs) -> dict[str, Cost]:
    """The cost of every module by name, "" for the whole model, in eval mode on these inputs.

    Nothing is computed, unless what is computed decides about shapes.

    Raises:
        PruningError: the model does not run.
    """
    try:
        counts = without_numbers(model, inputs, _counted)
    except Exception as error:
        raise PruningError(
            f"the model must run on its example inputs, but raised {first_line(error)}"
        ) from error
    root = type(model).__name__
    costs = {}
    for name, module in model.named_modules():
        parameters = sum(p.numel() for p in module.parameters())
        flops = sum(counts.get(f"{root}.{name}" if name else "Global", {}).values())
        costs[name] = Cost(parameters, int(flops))
    return costs


def _counted(model: nn.Module, inputs: Inputs) -> dict[str, dict[Any, int]]:
    with (
        _no_fused_encoder(),
        _frozen(model),
        FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter,
    ):
        call(model, inputs)
    counts: dict[str, dict[Any, int]] = counter.get_flop_counts()
    return counts


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient: torch's counter fails where one is a module's input."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


@contextmanager
def _no_fused_encoder() -> Iterator[None]:
    """torch's attention and encoder layers as single products, not as one kernel of their own."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Query times key, and the result times value: (batch, heads, time, channels) each."""
    pairs = prod(query[:3]) * key[2]
    return 2 * pairs * (query[3] + value[3])


def _recurrence(x: Shape, of_input: Shape, of_hidden: Shape, *_: Any, **__: Any) -> int:
    """Two matrices, at every time of every sample."""
    return 2 * prod(x[:-1]) * (prod(of_input) + prod(of_hidden))


def _recurrences(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """All layers and directions at once."""
    return 2 * prod(x[:-1]) * sum(prod(shape) for shape in weights if len(shape) == 2)


# Kernels of the CPU, and of cuDNN, that torch has no formulas for.
_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten.mkldnn_rnn_layer: _recurrence,
    torch.ops.aten._cudnn_rnn: _recurrences,
}
