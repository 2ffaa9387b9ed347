"""One loss for each sample."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Loss = nn.Module | Callable[[Any, Any], Tensor]


def per_sample(loss: Loss) -> Callable[[Any, Any], Tensor]:
    """The loss as a function that gives one value per sample, shape `(batch,)`."""
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        classifies = isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss)
        if classifies and loss.weight is not None:
            raise ValueError(
                f"{type(loss).__name__} with class weights has no loss of one sample by itself, "
                "since it divides by the weights of the batch: pass a function that gives one "
                "value per sample"
            )
        unreduced: Any = copy.copy(loss)
        unreduced.reduction = "none"

        def module_loss(output: Any, target: Any) -> Tensor:
            if classifies and bool((target == loss.ignore_index).any()):
                raise ValueError(
                    f"{type(loss).__name__} with ignored targets ({loss.ignore_index}) averages "
                    "over another number of targets for each sample: pass a function that gives "
                    "one value per sample"
                )
            values: Tensor = unreduced(output, target)
            return values.flatten(1).mean(1) if values.ndim > 1 else values

        return module_loss

    def function_loss(output: Any, target: Any) -> Tensor:
        values = loss(output, target)
        if not isinstance(values, Tensor) or values.ndim != 1:
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"{values!r}"
            name = getattr(loss, "__name__", type(loss).__name__)
            raise TypeError(
                f"loss must give one value per sample, a tensor of shape (batch,), got {got}: "
                f"call {name} with reduction='none' and average over the other dims "
                "(.flatten(1).mean(1)), or pass a loss module such as nn.MSELoss()"
            )
        return values

    return function_loss
