"""Running a model for its shapes alone: no number is computed, and no memory is taken."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from .copies import with_own_buffers
from .inputs import Inputs, leaving_no_trace

T = TypeVar("T")


@contextmanager
def on_fakes(model: nn.Module, inputs: Inputs) -> Iterator[tuple[nn.Module, Any]]:
    """Inside, a copy of the model and of the inputs, whose tensors hold no numbers."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = [*model.parameters(), *model.buffers()]
    fake = copy.deepcopy(model, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})
    fake_inputs = tree_map_only(Tensor, mode.from_tensor, inputs)
    with quiet(), mode, torch.no_grad():
        yield fake, fake_inputs


def without_numbers(model: nn.Module, inputs: Inputs, use: Callable[[nn.Module, Any], T]) -> T:
    """What `use` makes of a copy of the model in eval mode, and of one of the inputs.

    Their tensors hold no numbers, unless what is computed decides about shapes.
    """
    try:
        with on_fakes(model, inputs) as (fake, fake_inputs):
            return use(fake.eval(), fake_inputs)
    except Exception:
        with leaving_no_trace(model, inputs) as own_inputs:
            return use(with_own_buffers(model).eval(), own_inputs)


@contextmanager
def quiet() -> Iterator[None]:
    """Torch logs what it raises, too."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
