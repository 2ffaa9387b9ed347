"""A network's losses at many ks, for less than one run of the network for each.

`torch.vmap` runs the network once for many ks: what does not depend on k is computed once, also
around residual connections, and the rest for all ks together. That takes memory, so the ks come
in chunks, and what comes in front of the layer is computed in the first of them only. Where one
`nn.Linear` reads the layer, its outputs for all ks are a running sum.

Not all code runs under vmap. So each way of computing the losses is compared with plain runs,
which set k, before it is trusted, and there are slower ones to fall back on.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.copies import first_line
from ..models.hooks import hooked, with_forwards
from ..models.inputs import Inputs, call, tensors_of
from .cuts import Swept
from .once import RandomNumbers, RandomState, RunOnce, modules_without
from .vmapped import folding_forwards, linear_of_prefix, without_leftovers

# More at once is slower: a chunk's activations no longer fit into the cache of a CPU, or anything
# much larger than a GPU needs to be busy.
_ENOUGH = 2**23

Points = Sequence[int]


class NotTrustedError(RuntimeError):
    """A way of computing the losses can't be used for this network; the message says why."""


class Losses:
    """The losses of each sample at every point of a sweep, batch by batch.

    Args:
        model: in eval mode.
        loss: gives one value per sample.
        name: what warnings call the layers.
        swept: the layers, with their ks at all points.
        memory: bytes that the activations of a chunk may take, about.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        name: str,
        swept: Sequence[Swept],
        memory: int,
    ) -> None:
        self.model, self.loss, self.name, self.memory = model, loss, name, memory
        self.swept = swept
        self.layers = [s.layer for s in swept]
        self.points = range(len(swept[0].ks))
        self.before = modules_without(model, self.layers)
        self.numbers = RandomNumbers(model)
        self.ways = [
            self._with_running_sums,
            self._vmapped,
            self._one_by_one_from_the_layer,
            self._one_by_one,
        ]
        self.trusted = False
        self.slow_because: Exception | None = None

    def of(self, inputs: Inputs, target: Any) -> Tensor:
        """In float64 on the CPU, `(points, batch)`. All points see the same random numbers."""
        start = self.numbers.now()
        if not self.trusted:
            some = sorted({i * (len(self.points) - 1) // 3 for i in range(4)})
            expected = self._one_by_one(inputs, target, some)
            if expected.shape[1] > 0:  # no samples prove nothing
                self._find_way(inputs, target, some, expected, start)
        self.numbers.go_back_to(start)
        try:
            way = self.ways[0] if self.trusted else self._one_by_one
            losses = way(inputs, target, self.points)
        except Exception as error:  # the plain runs go through, or raise what is to be raised
            self.numbers.go_back_to(start)
            losses = self._one_by_one(inputs, target, self.points)
            self._distrust(error)  # this batch went another way through the network
        if self.slow_because is not None:
            self._warn(self.slow_because)
            self.slow_because = None
        return losses

    def _find_way(
        self, inputs: Inputs, target: Any, some: Points, expected: Tensor, start: RandomState
    ) -> None:
        """The first that agrees with plain runs at some points."""
        try:
            self._look(inputs)
        except Exception as error:  # a module that takes no hooks
            self.ways, self.trusted, self.slow_because = [self._one_by_one], True, error
        while not self.trusted:
            self.numbers.go_back_to(start)
            try:
                self._check(self.ways[0](inputs, target, some), expected)
                self.trusted = True
            except Exception as error:
                self._distrust(error)

    def _distrust(self, error: Exception) -> None:
        self.trusted = self.ways[1:] == [self._one_by_one]
        if self.ways.pop(0) == self._vmapped:
            self.slow_because = error

    # --- the ways --------------------------------------------------------------------------------

    def _one_by_one(self, inputs: Inputs, target: Any, points: Points) -> Tensor:
        start = self.numbers.now()
        losses = []
        for point in points:
            self.numbers.go_back_to(start)
            with ExitStack() as stack:
                for swept in self.swept:
                    stack.enter_context(swept.at(point))
                losses.append(self.loss(call(self.model, inputs), target))
        return torch.stack(losses).double().cpu()

    def _one_by_one_from_the_layer(self, inputs: Inputs, target: Any, points: Points) -> Tensor:
        losses = []
        with self._once() as once:
            for point in points:
                once.start_again()
                losses.append(self._one_by_one(inputs, target, [point]))
        return torch.cat(losses)

    def _with_running_sums(self, inputs: Inputs, target: Any, points: Points) -> Tensor:
        if not self.readers:
            raise NotTrustedError("no Linear alone reads the layer")
        return self._vmapped(inputs, target, points, self.readers)

    def _vmapped(
        self,
        inputs: Inputs,
        target: Any,
        points: Points,
        readers: Mapping[nn.Linear, Swept] | None = None,
    ) -> Tensor:
        readers = readers or {}
        bytes_of_point = self._bytes_of_point(inputs, set(readers.values()))
        enough = max(2, _ENOUGH // bytes_of_point) if self.trusted else 2  # chunks, to be checked
        size = max(1, min(enough, self.memory // bytes_of_point))
        ks = [torch.tensor([swept.ks[i] for i in points]) for swept in self.swept]

        def run(*ks: Tensor) -> Tensor:
            once.start_again()
            with self._cut(ks, readers):
                return self.loss(call(self.model, inputs), target)

        with (
            without_leftovers(self.model),
            with_forwards(folding_forwards(self.model)),
            self._once() as once,
        ):
            at_once = torch.vmap(run, randomness="same")
            chunks = zip(*(k.split(size) for k in ks), strict=True)
            return torch.cat([at_once(*chunk).double().cpu() for chunk in chunks])

    @contextmanager
    def _cut(self, ks: Sequence[Tensor], readers: Mapping[nn.Linear, Swept]) -> Iterator[None]:
        """Each layer cut to its k, or the Linear that reads it."""
        passed: dict[Swept, Tensor] = {}

        def cut(swept: Swept, k: Tensor) -> Callable[..., Tensor]:
            return lambda layer, args, output: swept.keep(output, k)

        def pass_on(swept: Swept) -> Callable[..., Tensor]:
            def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
                passed[swept] = output.view_as(output)  # recognised by the Linear that reads it
                return passed[swept]

            return hook

        def read(linear: nn.Linear, swept: Swept, k: Tensor) -> Callable[..., Tensor]:
            forward = linear.forward

            def run(input: Tensor) -> Tensor:
                if input is not passed.get(swept):
                    return forward(input)
                return linear_of_prefix(input, k, linear.weight, linear.bias)

            return run

        k_of = dict(zip(self.swept, ks, strict=True))
        read_by_linear = set(readers.values())
        hooks: dict[nn.Module, Callable[..., Any]] = {
            swept.layer: pass_on(swept) if swept in read_by_linear else cut(swept, k)
            for swept, k in k_of.items()
        }
        forwards: dict[nn.Module, Callable[..., Any]] = {
            linear: read(linear, swept, k_of[swept]) for linear, swept in readers.items()
        }
        with hooked(hooks), with_forwards(forwards):
            yield

    @contextmanager
    def _once(self) -> Iterator[RunOnce]:
        once = RunOnce(self.layers, self.before, self.changed, self.numbers)
        with once.in_force():
            yield once

    # --- what is known of the network --------------------------------------------------------------

    def _look(self, inputs: Inputs) -> None:
        """Which Linear reads a layer alone, how large what comes behind is, what is changed."""
        passed: dict[Swept, list[Tensor]] = {swept: [] for swept in self.swept}
        readers: dict[Swept, list[nn.Module]] = {swept: [] for swept in self.swept}
        returned: list[tuple[nn.Module, Tensor, int]] = []
        self.bytes_behind = 0

        def mark(swept: Swept) -> Callable[..., Tensor]:
            def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
                self.dtype = output.dtype
                passed[swept].append(output.view_as(output))
                return passed[swept][-1]

            return hook

        def look(module: nn.Module, args: Any, output: Any) -> None:
            behind = any(passed.values())
            is_leaf = not list(module.children())
            for tensor in tensors_of(output):
                if not behind:
                    returned.append((module, tensor, _version(tensor)))
                elif is_leaf:
                    self.bytes_behind += tensor.nbytes
            for swept, outputs in passed.items():
                if is_leaf and args and any(args[0] is features for features in outputs):
                    readers[swept].append(module)

        hooks: dict[nn.Module, Callable[..., Any]] = dict.fromkeys(self.before, look)
        with hooked({**hooks, **{swept.layer: mark(swept) for swept in self.swept}}):
            call(self.model, inputs)
        self.bytes_of_inputs = sum(tensor.nbytes for tensor in tensors_of(inputs))
        self.bytes_of_features = {s: sum(x.nbytes for x in passed[s]) for s in self.swept}
        self.changed = {m for m, tensor, version in returned if _version(tensor) != version}
        self.readers: dict[nn.Linear, Swept] = {}
        for swept, features in passed.items():
            last = len(features) == 1 and swept.layer.dropout_dim in (-1, features[0].ndim - 1)
            match readers[swept]:
                case [nn.Linear() as linear] if last and type(linear) is nn.Linear:
                    self.readers[linear] = swept

    def _bytes_of_point(self, inputs: Inputs, read_by_linear: set[Swept]) -> int:
        """What one point takes in a chunk."""
        features = sum(b for s, b in self.bytes_of_features.items() if s not in read_by_linear)
        bytes_of_inputs = sum(tensor.nbytes for tensor in tensors_of(inputs))
        larger = bytes_of_inputs / self.bytes_of_inputs if self.bytes_of_inputs else 1
        return max(1, int(2 * (self.bytes_behind + features) * larger))

    def _check(self, actual: Tensor, expected: Tensor) -> None:
        precise = self.dtype in (torch.float32, torch.float64)
        rtol = 1e-4 if precise else 0.05
        atol = 0.1 * rtol * float(expected.nan_to_num(posinf=0, neginf=0).abs().mean())
        if actual.shape != expected.shape:
            raise NotTrustedError(
                f"losses of shape {tuple(actual.shape)} where {tuple(expected.shape)} is right"
            )
        if not torch.allclose(actual, expected, rtol, atol, equal_nan=True):
            difference = float((actual - expected).abs().max())
            raise NotTrustedError(
                f"the losses differ by up to {difference:.3g} from those of runs with set_k"
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
