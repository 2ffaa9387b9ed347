"""What a network computes in front of a layer, computed once for several runs."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..layers.hooks import ApplyChild
from ..models.hooks import hooked, with_forwards
from ..models.inputs import cuda_devices


def modules_without(model: nn.Module, layers: Collection[nn.Module]) -> list[nn.Module]:
    """Those whose `forward` calls none of the layers. A layer that a hook applies comes later."""
    holding = {module for module in model.modules() if not set(layers).isdisjoint(module.modules())}
    without = []
    for module in model.modules():
        hooks = module._forward_hooks.values()
        applied = {getattr(module, hook.child) for hook in hooks if isinstance(hook, ApplyChild)}
        called = set(module.children()) - applied
        if module not in layers and called.isdisjoint(holding):
            without.append(module)
    return without


RandomState = list[Tensor]


class RandomNumbers:
    """Torch's generators of the CPU and of the devices that a model is on."""

    def __init__(self, model: nn.Module) -> None:
        self.devices = cuda_devices(model)

    def now(self) -> RandomState:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]

    def go_back_to(self, state: RandomState) -> None:
        torch.set_rng_state(state[0])
        for device, of_device in zip(self.devices, state[1:], strict=True):
            torch.cuda.set_rng_state(of_device, device)


class RunOnce:
    """In force, modules that return before a layer is reached run in the first pass only.

    Later passes, each begun by `start_again`, get what they returned then, and go on with the
    random numbers of the first.

    Args:
        layers: the first of them that is reached counts.
        modules: of those, see `modules_without`.
        changed: modules whose outputs are changed in place later: each pass gets a copy.
        numbers: that the model draws.
    """

    def __init__(
        self,
        layers: Collection[nn.Module],
        modules: Collection[nn.Module],
        changed: Collection[nn.Module],
        numbers: RandomNumbers,
    ) -> None:
        self.layers, self.modules, self.changed = layers, modules, changed
        self.numbers = numbers
        self.at_start = numbers.now()
        self.at_layer: RandomState | None = None
        self.returned: dict[nn.Module, list[Any]] = {module: [] for module in modules}
        self.calls: dict[nn.Module, int] = {}
        self.depth = 0  # of calls of these modules, in one another
        self.reached = False  # a layer, in this pass

    def start_again(self) -> None:
        self.calls = dict.fromkeys(self.modules, 0)
        self.reached = False
        self.numbers.go_back_to(self.at_start)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        def reach(module: nn.Module, args: Any) -> None:
            if self.reached:
                return
            self.reached = True
            if self.at_layer is None:
                self.at_layer = self.numbers.now()
            else:
                self.numbers.go_back_to(self.at_layer)

        once = {module: self._once(module, module.forward) for module in self.modules}
        with hooked(dict.fromkeys(self.layers, reach), before=True), with_forwards(once):
            yield

    def _once(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call_once(*args: Any, **kwargs: Any) -> Any:
            returned, i = self.returned[module], self.calls[module]
            if self.depth == 0:
                self.calls[module] += 1
                if i < len(returned):
                    return self._own(module, returned[i])
            self.depth += 1
            try:
                output = forward(*args, **kwargs)
            finally:
                self.depth -= 1
            if self.depth == 0 and not self.reached:
                returned.append(self._own(module, output))
            return output

        return call_once

    def _own(self, module: nn.Module, output: Any) -> Any:
        return tree_map_only(Tensor, Tensor.clone, output) if module in self.changed else output
