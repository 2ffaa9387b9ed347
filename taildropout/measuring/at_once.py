"""A network's losses at many ks, for less than one run of the network for each.

`torch.vmap` runs the network once for many ks: what does not depend on k is computed once, also
around residual connections, and the rest for all ks together. That takes memory, so the ks come
in chunks, and what comes in front of the layer is computed in the first of them only. Where one
`nn.Linear` reads the layer, or it is that of a TailLinear, its outputs for all ks are a running sum.

Not all code runs under vmap. So each way of computing the losses is compared with plain runs,
which set k, before it is trusted, and there are slower ones to fall back on.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import TailDropout, TailLinear
from ..layers.holding import HoldsDropout
from ..models.copies import first_line
from ..models.hooks import hooked, with_forwards
from ..models.inputs import Inputs, call, tensors_of
from .cuts import Cut
from .once import RandomNumbers, RandomState, RunOnce, modules_without
from .vmapped import folding_forwards, without_leftovers

# Bytes of all activations behind the layer, few of which are alive at a time. More is no faster.
_ENOUGH = 2**26

Grid = Sequence[Mapping[TailDropout, int]]
"""Which k each layer has at each point of a measurement: the layers are the same at all points."""


class NotTrustedError(RuntimeError):
    """A way of computing the losses can't be used for this network; the message says why."""


class Losses:
    """The losses of each sample at every point of a grid, batch by batch.

    Args:
        model: in eval mode.
        loss: gives one value per sample.
        name: what warnings call the layers.
        cuts: the layers whose k is measured, and what each keeps of its features.
        memory: bytes that the activations of a chunk may take, about.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        name: str,
        cuts: Mapping[TailDropout, Cut],
        memory: int,
    ) -> None:
        self.model, self.loss, self.name, self.memory = model, loss, name, memory
        self.cuts = cuts
        self.before = modules_without(model, cuts)
        self.holders = [
            module
            for module in model.modules()
            if isinstance(module, HoldsDropout) and module.dropout in cuts
        ]
        self.tail_linears: dict[nn.Linear, TailDropout] = {
            module: module.dropout
            for module in model.modules()
            if isinstance(module, TailLinear)
            and module.dropout in cuts
            and type(module).forward is TailLinear.forward
        }
        self.numbers = RandomNumbers(model)
        self.ways = [
            self._with_running_sums,
            self._vmapped,
            self._one_by_one_from_the_layer,
            self._one_by_one,
        ]
        self.trusted = False
        self.slow_because: Exception | None = None

    def of(self, inputs: Inputs, target: Any, grid: Grid) -> Tensor:
        """In float64 on the CPU, `(points, batch)`. All points see the same random numbers."""
        start = self.numbers.now()
        if not self.trusted:
            losses = self._of_first_batch(inputs, target, grid, start)
        else:
            try:
                losses = self.ways[0](inputs, target, grid)
            except Exception as error:  # the plain runs go through, or raise what is to be raised
                self.numbers.go_back_to(start)
                losses = self._one_by_one(inputs, target, grid)
                self._distrust(error)  # this batch went another way through the network
        if self.slow_because is not None:
            self._warn(self.slow_because)
            self.slow_because = None
        return losses

    def _of_first_batch(
        self, inputs: Inputs, target: Any, grid: Grid, start: RandomState
    ) -> Tensor:
        """By the first way that agrees with plain runs at the ends of the grid and in between."""
        some = sorted({0, (len(grid) - 1) // 2, len(grid) - 1})
        expected = self._one_by_one(inputs, target, [grid[i] for i in some])
        if expected.shape[1] > 0:  # no samples prove nothing
            try:
                self._look(inputs)
            except Exception as error:  # a module that takes no hooks
                self.ways, self.trusted, self.slow_because = [self._one_by_one], True, error
            while not self.trusted:
                self.numbers.go_back_to(start)
                try:
                    losses = self.ways[0](inputs, target, grid)
                    self._check(losses, len(grid), some, expected)
                except Exception as error:
                    self._distrust(error)
                else:
                    self.trusted = True
                    return losses
        self.numbers.go_back_to(start)
        return self._one_by_one(inputs, target, grid)

    def _distrust(self, error: Exception) -> None:
        self.trusted = self.ways[1:] == [self._one_by_one]
        if self.ways.pop(0) == self._vmapped:
            self.slow_because = error

    # --- the ways --------------------------------------------------------------------------------

    def _one_by_one(self, inputs: Inputs, target: Any, grid: Grid) -> Tensor:
        start = self.numbers.now()
        losses = []
        for ks in grid:
            self.numbers.go_back_to(start)
            with ExitStack() as stack:
                for layer, k in ks.items():
                    stack.enter_context(self.cuts[layer].at(layer, k))
                losses.append(self.loss(call(self.model, inputs), target))
        return torch.stack(losses).double().cpu()

    def _one_by_one_from_the_layer(self, inputs: Inputs, target: Any, grid: Grid) -> Tensor:
        losses = []
        with self._once(self.holders) as once:  # which need not call their layer where k is set
            for ks in grid:
                once.start_again()
                losses.append(self._one_by_one(inputs, target, [ks]))
        return torch.cat(losses)

    def _with_running_sums(self, inputs: Inputs, target: Any, grid: Grid) -> Tensor:
        if not self.readers:
            raise NotTrustedError("no Linear alone reads the layer")
        return self._vmapped(inputs, target, grid, self.readers)

    def _vmapped(
        self,
        inputs: Inputs,
        target: Any,
        grid: Grid,
        readers: Mapping[nn.Linear, TailDropout] | None = None,
    ) -> Tensor:
        readers = {**self.tail_linears, **(readers or {})}
        bytes_of_point = self._bytes_of_point(inputs, set(readers.values()))
        size = max(1, min(max(2, _ENOUGH // bytes_of_point), self.memory // bytes_of_point))
        if not self.trusted:  # at least two chunks, to be checked
            size = min(size, math.ceil(len(grid) / 2))
        ks_of_layers = [torch.tensor([ks[layer] for ks in grid]) for layer in self.cuts]

        def run(*ks: Tensor) -> Tensor:
            once.start_again()
            with self._cut(dict(zip(self.cuts, ks, strict=True)), readers):
                return self.loss(call(self.model, inputs), target)

        with (
            without_leftovers(self.model),
            with_forwards(folding_forwards(self.model)),
            self._once() as once,
        ):
            at_once = torch.vmap(run, randomness="same")
            chunks = zip(*(ks.split(size) for ks in ks_of_layers), strict=True)
            return torch.cat([at_once(*chunk).double().cpu() for chunk in chunks])

    @contextmanager
    def _cut(
        self, ks: Mapping[TailDropout, Tensor], readers: Mapping[nn.Linear, TailDropout]
    ) -> Iterator[None]:
        """Each layer cut to its k, or the Linear that reads it."""
        passed: dict[nn.Module, Tensor] = {}

        def cut(layer: TailDropout, args: Any, output: Tensor) -> Tensor:
            return self.cuts[layer].keep(output, ks[layer])

        def pass_on(layer: TailDropout, args: Any, output: Tensor) -> Tensor:
            passed[layer] = output.view_as(output)  # recognised by the Linear that reads it
            return passed[layer]

        def reading(linear: nn.Linear, layer: TailDropout) -> Callable[[Tensor], Tensor]:
            forward = linear.forward

            def read(input: Tensor) -> Tensor:
                features: Tensor = layer(input) if linear in self.tail_linears else input
                if features is not passed.get(layer):
                    return forward(input)
                return self.cuts[layer].read(features, ks[layer], linear)

            return read

        hooks: dict[nn.Module, Callable[..., Any]] = {
            **dict.fromkeys(self.cuts, cut),
            **dict.fromkeys(readers.values(), pass_on),
        }
        forwards: dict[nn.Module, Callable[..., Any]] = {
            linear: reading(linear, layer) for linear, layer in readers.items()
        }
        with hooked(hooks), with_forwards(forwards):
            yield

    @contextmanager
    def _once(self, also_reached: Collection[nn.Module] = ()) -> Iterator[RunOnce]:
        reached = [*self.cuts, *also_reached]
        once = RunOnce(reached, self.before, self.changed, self.numbers)
        with once.in_force():
            yield once

    # --- what is known of the network --------------------------------------------------------------

    def _look(self, inputs: Inputs) -> None:
        """Which Linear reads a layer alone, how large what comes behind is, what is changed."""
        passed: dict[nn.Module, list[Tensor]] = {layer: [] for layer in self.cuts}
        readers: dict[nn.Module, list[nn.Module]] = {layer: [] for layer in self.cuts}
        returned: list[tuple[nn.Module, Tensor, int]] = []
        self.bytes_behind = 0

        def mark(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            self.dtype = output.dtype
            passed[layer].append(output.view_as(output))
            return passed[layer][-1]

        def look(module: nn.Module, args: Any, output: Any) -> None:
            behind = any(passed.values())
            is_leaf = isinstance(module, TailLinear) or not list(module.children())
            for tensor in tensors_of(output):
                if not behind:
                    returned.append((module, tensor, _version(tensor)))
                elif is_leaf:
                    self.bytes_behind += tensor.nbytes
            for layer, features in passed.items():
                if is_leaf and args and any(args[0] is tensor for tensor in features):
                    readers[layer].append(module)

        looked_at = [*self.before, *self.tail_linears]
        hooks: dict[nn.Module, Callable[..., Any]] = dict.fromkeys(looked_at, look)
        with hooked({**hooks, **dict.fromkeys(self.cuts, mark)}):
            call(self.model, inputs)
        self.bytes_of_inputs = sum(tensor.nbytes for tensor in tensors_of(inputs))
        self.bytes_of_features = {layer: sum(x.nbytes for x in passed[layer]) for layer in passed}
        self.changed = {m for m, tensor, version in returned if _version(tensor) != version}
        self.readers: dict[nn.Linear, TailDropout] = {}
        for layer in self.cuts:
            features = passed[layer]
            last = len(features) == 1 and layer.dropout_dim in (-1, features[0].ndim - 1)
            match readers[layer]:
                case [nn.Linear() as linear] if last and type(linear) is nn.Linear:
                    self.readers[linear] = layer

    def _bytes_of_point(self, inputs: Inputs, read_by_linear: set[TailDropout]) -> int:
        """What one point takes in a chunk."""
        features = sum(
            size for layer, size in self.bytes_of_features.items() if layer not in read_by_linear
        )
        bytes_of_inputs = sum(tensor.nbytes for tensor in tensors_of(inputs))
        larger = bytes_of_inputs / self.bytes_of_inputs if self.bytes_of_inputs else 1
        return max(1, int(3 * (self.bytes_behind + features) * larger))

    def _check(self, losses: Tensor, points: int, some: list[int], expected: Tensor) -> None:
        precise = self.dtype in (torch.float32, torch.float64)
        rtol = 1e-4 if precise else 0.05
        atol = 0.1 * rtol * float(expected.nan_to_num(posinf=0, neginf=0).abs().mean())
        shape = (points, *expected.shape[1:])
        if losses.shape != shape:
            raise NotTrustedError(f"losses of shape {tuple(losses.shape)} where {shape} is right")
        actual = losses[some]
        if not torch.allclose(actual, expected, rtol, atol, equal_nan=True):
            difference = float((actual - expected).abs().max())
            raise NotTrustedError(
                f"the losses differ by up to {difference:.3g} from those of runs for one k"
            )

    def _warn(self, error: Exception) -> None:
        reason = str(error) if isinstance(error, NotTrustedError) else first_line(error)
        warnings.warn(
            f"scree of {self.name} runs each k by itself, which is right but slow: {reason}. "
            "It is fast where torch.vmap can run what comes behind the layer: no `if` on values, "
            "no .item(), nothing in place on a tensor from in front of the layer.",
            stacklevel=4,
        )


def _version(tensor: Tensor) -> int:
    """It rises with each change in place; -1 where that is not counted."""
    return -1 if tensor.is_inference() else tensor._version
