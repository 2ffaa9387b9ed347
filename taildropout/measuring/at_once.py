"""A network's losses for many ks of one layer, in one run for all of them.

In eval mode the layer passes its input on. Here it fans it out: its output has K copies of the
batch, one after the other along the batch dim, the i-th cut to the i-th k, and what comes behind
sees one batch that is K times as large. Where one `nn.Linear` reads the layer, the fan-out takes
place behind it, from `prefix_linear`.

Not every network treats its samples one by one, and some hand things past the layer whose batch
stays small. So `FanOut` is only to be trusted after `check`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..functional import keep_prefix, prefix_linear
from ..layers import TailDropout
from ..models.hooks import hooked
from ..models.inputs import Inputs, call, tensors_of

# More at once is slower: a chunk's activations no longer fit into the cache of a CPU, or anything
# much larger than a GPU needs to be busy.
_ENOUGH = 2**23

PerSampleLoss = Callable[[Any, Any], Tensor]


class FanOutError(RuntimeError):
    """The network can't be run for many ks at once; the message says why."""


class FanOut:
    """Runs `model` for chunks of ks of `layer`, as large as `memory` allows, about, in bytes."""

    def __init__(
        self, model: nn.Module, layer: TailDropout, loss: PerSampleLoss, memory: int
    ) -> None:
        self.model, self.layer, self.loss, self.memory = model, layer, loss, memory
        dims = layer.batch_dim if isinstance(layer.batch_dim, tuple) else (layer.batch_dim,)
        self.batch_dim = dims[0] if dims else 0
        self.linear: nn.Linear | None = None
        self.checked = False

    def check(self, inputs: Inputs, target: Any, ks: list[int], expected: Tensor) -> None:
        """Compare with the losses of plain runs, `(len(ks), batch)`.

        A batch of one sample proves nothing, since it broadcasts: `checked` stays False.

        Raises:
            FanOutError: they differ, or the network can't run.
        """
        try:
            self._look(inputs)
        except Exception as error:  # a module that takes no hooks
            raise FanOutError(str(error)) from error
        if self.batch < 2 or len(ks) < 2:
            return
        self.target_dims = [self._batch_dim_of(leaf) for leaf in tensors_of(target)]
        self.bytes_of_target = sum(leaf.nbytes for leaf in tensors_of(target))
        self.samples_looked_at = self.batch
        try:
            self._try(inputs, target, ks, expected)
        except FanOutError:
            if self.linear is None:
                raise
            self.linear = None  # something else reads the layer too: fan out in front of it
            self._try(inputs, target, ks, expected)
        self.checked = True

    @property
    def _bytes_of_sample(self) -> float:
        """What one k takes in a chunk. A Linear that is known to read the layer fans out itself."""
        activations = self.bytes_behind + (0 if self.linear else self.bytes_of_layer)
        return (2 * activations + self.bytes_of_target) / self.samples_looked_at

    def losses(self, inputs: Inputs, target: Any, ks: list[int]) -> Tensor:
        """Per-sample losses in float64, `(len(ks), batch)`, on the CPU."""
        at_once = min(self.memory, _ENOUGH) / max(1.0, self._bytes_of_sample * self.batch)
        return self._in_chunks(inputs, target, ks, max(2, int(at_once)))

    def _in_chunks(self, inputs: Inputs, target: Any, ks: list[int], size: int) -> Tensor:
        losses = []
        run_once = _RunOnce(self.model, self.layer)
        with run_once.in_force():
            for start in range(0, len(ks), size):
                run_once.start_again()
                losses.append(self._losses_at_once(inputs, target, ks[start : start + size]))
        return torch.cat(losses)

    def _losses_at_once(self, inputs: Inputs, target: Any, ks: list[int]) -> Tensor:
        with self._fanned_out(ks):
            output = call(self.model, inputs)
        dims = iter(self.target_dims)
        values = self.loss(
            output,
            tree_map_only(Tensor, lambda leaf: torch.cat([leaf] * len(ks), next(dims)), target),
        )
        if len(values) != len(ks) * self.batch:
            raise FanOutError(
                f"the loss gave {len(values)} values for {len(ks)} ks of {self.batch} samples"
            )
        return values.view(len(ks), self.batch).double().cpu()

    @contextmanager
    def _fanned_out(self, ks: list[int]) -> Iterator[None]:
        passed: list[Tensor] = []

        def pass_on(module: TailDropout, args: Any, output: Tensor) -> Tensor:
            self.batch = output.shape[self.batch_dim]
            passed[:] = [output.view_as(output)]  # recognised by the Linear that reads it
            return passed[0]

        def fan_out(module: TailDropout, args: Any, output: Tensor) -> Tensor:
            self.batch = output.shape[self.batch_dim]
            dim, features = (range(output.ndim)[d] for d in (self.batch_dim, module.dropout_dim))
            copies = output.unsqueeze(dim)  # (..., 1, batch, ...)
            copies = copies.expand(*copies.shape[:dim], len(ks), *copies.shape[dim + 1 :])
            k = torch.tensor(ks, device=output.device)
            k = k.view([len(ks) if d == dim else 1 for d in range(copies.ndim)])
            return keep_prefix(copies, k, features + (features >= dim)).flatten(dim, dim + 1)

        def fan_out_prefixes(module: nn.Linear, args: Any, output: Tensor) -> Tensor | None:
            if not args or args[0] is not passed[0]:
                return None
            outputs = prefix_linear(args[0], module.weight, module.bias, ks)  # (K, ..., out)
            dim = range(output.ndim)[self.batch_dim]
            return outputs.movedim(0, dim).flatten(dim, dim + 1)

        if self.linear is None:
            hooks: dict[nn.Module, Callable[..., Any]] = {self.layer: fan_out}
        else:
            hooks = {self.layer: pass_on, self.linear: fan_out_prefixes}
        with hooked(hooks):
            yield

    def _look(self, inputs: Inputs) -> None:
        """Which Linear reads the layer, and how large what comes behind the layer is."""
        readers: list[nn.Module] = []
        passed: list[Tensor] = []
        self.bytes_behind = 0

        def mark(module: TailDropout, args: Any, output: Tensor) -> Tensor:
            self.batch, self.dtype = output.shape[self.batch_dim], output.dtype
            passed.append(output.view_as(output))
            return passed[-1]

        def look(module: nn.Module, args: Any, output: Any) -> None:
            if passed:
                if args and args[0] is passed[-1]:
                    readers.append(module)
                self.bytes_behind += sum(tensor.nbytes for tensor in tensors_of(output))

        leaves = [
            module
            for module in self.model.modules()
            if module is not self.layer and not list(module.children())
        ]
        with hooked({self.layer: mark, **dict.fromkeys(leaves, look)}):
            call(self.model, inputs)
        last = self.layer.dropout_dim in (-1, passed[-1].ndim - 1)
        if len(readers) == 1 and type(readers[0]) is nn.Linear and len(passed) == 1 and last:
            self.linear = readers[0]
        self.bytes_of_layer = passed[-1].nbytes

    def _batch_dim_of(self, target: Tensor) -> int:
        """Where a target has its samples: as the layer has them, else first."""
        shape = target.shape
        if shape[self.batch_dim : self.batch_dim + 1] == (self.batch,):
            return self.batch_dim
        if shape[:1] == (self.batch,):
            return 0
        raise FanOutError(f"a target of shape {tuple(shape)} has no dim for {self.batch} samples")

    def _try(self, inputs: Inputs, target: Any, ks: list[int], expected: Tensor) -> None:
        if 2 * self._bytes_of_sample * self.batch > self.memory:
            raise FanOutError(f"{self.memory} bytes of memory are too few for two ks at once")
        try:
            actual = self._in_chunks(inputs, target, ks, size=2)
        except Exception as error:  # whatever it is, the plain runs go through
            raise FanOutError(str(error)) from error
        precise = self.dtype in (torch.float32, torch.float64)
        rtol = 1e-4 if precise else 0.05
        atol = 0.1 * rtol * float(expected.nan_to_num(posinf=0, neginf=0).abs().mean())
        if not torch.allclose(actual, expected, rtol, atol, equal_nan=True):
            difference = float((actual - expected).abs().max())
            raise FanOutError(
                f"the losses differ by up to {difference:.3g} from those of runs with set_k"
            )


class _RunOnce:
    """In force, modules that return before the layer is reached run in the first pass only.

    Later passes, each begun by `start_again`, get what they returned then.
    """

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        self.layer = layer
        self.modules = [m for m in model.modules() if layer not in m.modules()]
        self.returned: dict[nn.Module, list[Any]] = {module: [] for module in self.modules}
        self.calls: dict[nn.Module, int] = {}
        self.depth = 0  # of calls of these modules, in one another
        self.reached = False  # the layer, in any pass

    def start_again(self) -> None:
        self.calls = dict.fromkeys(self.modules, 0)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        def reach(module: nn.Module, args: Any) -> None:
            self.reached = True

        forwards = {module: vars(module).get("forward") for module in self.modules}
        with hooked({self.layer: reach}, before=True):
            for module in self.modules:
                module.forward = self._once(module, module.forward)
            try:
                yield
            finally:
                for module, own in forwards.items():
                    if own is None:
                        del module.forward
                    else:
                        module.forward = own

    def _once(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call_once(*args: Any, **kwargs: Any) -> Any:
            returned, i = self.returned[module], self.calls[module]
            if self.depth == 0:
                self.calls[module] += 1
                if i < len(returned):
                    return returned[i]
            self.depth += 1
            try:
                output = forward(*args, **kwargs)
            finally:
                self.depth -= 1
            if self.depth == 0 and not self.reached:
                returned.append(output)
            return output

        return call_once
