"""Running a model for its shapes alone: no number is computed, and no memory is taken."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from .inputs import Inputs


@contextmanager
def on_fakes(model: nn.Module, inputs: Inputs) -> Iterator[tuple[nn.Module, Any]]:
    """Inside, a copy of the model and of the inputs, whose tensors hold no numbers."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = [*model.parameters(), *model.buffers()]
    fake = copy.deepcopy(model, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})
    fake_inputs = tree_map_only(Tensor, mode.from_tensor, inputs)
    with _quiet(), mode, torch.no_grad():
        yield fake, fake_inputs


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch logs what it raises, too."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
