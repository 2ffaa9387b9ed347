"""Comparing a network with what was made of it."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..models.copies import PruningError, with_own_buffers, without_cache
from ..models.hooks import hooked
from ..models.inputs import Inputs, call, of_twice_the_batch, random_like
from ..models.width import at_width
from .outputs import OutputCut, what_stays
from .precision import precisely

# The largest difference, relative to the largest output, that rounding explains.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Comparison:
    """Two networks on the same inputs: the largest difference, relative to the largest output."""

    inputs: str
    sizes: tuple[tuple[int, ...], ...]
    difference: float


@dataclass(frozen=True)
class Verification:
    """What was compared, in which dtype (None: the model's own), and what was not, and why."""

    dtype: torch.dtype | None
    comparisons: tuple[Comparison, ...]
    skipped: tuple[str, ...]

    def lines(self) -> list[str]:
        """As the summary of a plan has it."""
        dtype = "its own dtype" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        compared = "; ".join(
            f"{c.inputs} of {', '.join(map(str, c.sizes))}, difference {c.difference:.1g}"
            for c in self.comparisons
        )
        return [f"verified in {dtype}: {compared}", *(f"not verified {s}" for s in self.skipped)]


def verify(
    model: nn.Module,
    small: nn.Module,
    cut: Callable[[nn.Module], nn.Module],
    k: dict[str, int],
    example_inputs: Inputs,
    dtype: torch.dtype | None,
    output_cuts: Sequence[OutputCut] = (),
) -> Verification:
    """Compare the model at `k` with `small` on the example inputs, on random ones, on more samples.

    Args:
        model: the large network; it is not run itself, nor is `small`.
        small: what was made of it, by `cut`.
        cut: makes a small network of a copy in another dtype.
        k: by layer name.
        example_inputs: what the networks are called with.
        dtype: what to compare in, where the model runs in it. None: its own.
        output_cuts: what goes from the outputs, and must be zero in those of the large network.

    Raises:
        PruningError: they differ by more than rounding, what goes from the outputs is not zero,
            or the small network does not run.
    """
    skipped = []
    precision: AbstractContextManager[object] = nullcontext()
    large, small = with_own_buffers(model).eval(), with_own_buffers(small).eval()
    examples = [example_inputs, tree_map(random_like, example_inputs)]
    if dtype is not None:
        try:
            precise = without_cache(copy.deepcopy(model).eval().to(dtype))
            converted = [to_dtype(inputs, dtype) for inputs in examples]
            precision = precisely(dtype, lambda: [run(precise, inputs) for inputs in converted])
            large, small, examples = precise, cut(precise).eval(), converted
        except PruningError:
            raise
        except Exception as error:  # the model insists on its own dtype
            skipped.append(f"in {str(dtype).removeprefix('torch.')}: {_first_line(error)}")
            dtype = None
    comparisons = []
    with precision, at_width(large, k):
        for name, inputs in zip(("the example inputs", "random inputs"), examples, strict=True):
            expected = what_stays(run(large, inputs), output_cuts)
            comparisons.append(compare(name, k, large, small, inputs, expected))
        name, doubled = "twice as many samples", of_twice_the_batch(examples[1])
        try:
            expected = run(large, doubled)
        except Exception as error:  # the model takes batches of one size
            skipped.append(f"on {name}: {_first_line(error)}")
        else:
            expected = what_stays(expected, output_cuts)
            comparisons.append(compare(name, k, large, small, doubled, expected))
    return Verification(dtype, tuple(comparisons), tuple(skipped))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> Any:
    copied = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
    return call(model, copied)


def run_pruned(model: nn.Module, inputs: Inputs) -> Any:
    try:
        return run(model, inputs)
    except Exception as error:
        raise PruningError(
            f"the pruned network does not run: {error}. Its forward may spell out a size that "
            "pruning changes, as in x.view(-1, 3136): read it from the tensors instead, as in "
            "x.flatten(1). With k = 0, a layer may be one that torch can't run on no features"
        ) from error


def to_dtype(inputs: Inputs, dtype: torch.dtype) -> Any:
    def converted(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floats else value

    return tree_map(converted, inputs)


def compare(
    name: str, k: dict[str, int], large: nn.Module, small: nn.Module, inputs: Inputs, expected: Any
) -> Comparison:
    found = difference_of(expected, run_pruned(small, inputs))
    if found.is_rounding:
        leaves = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        return Comparison(name, tuple(tuple(x.shape) for x in leaves), found.relative)
    message = (
        f"the pruned network must compute what the model computes with k={k}, but differs by up "
        f"to {found.largest:.3g} where the outputs are up to {found.scale:.3g}"
    )
    module = _first_that_differs(large, small, inputs)
    if module is not None:
        message += f", first in the output of module {module!r}"
    raise PruningError(f"{message}. (If the weights have changed since plan_pruning, plan again.)")


@dataclass(frozen=True)
class Difference:
    """Of the output where two networks differ most: the largest difference, the largest entry."""

    largest: float = 0.0
    scale: float = 0.0
    is_rounding: bool = True

    @property
    def relative(self) -> float:
        return self.largest / max(self.scale, 1e-30)


def difference_of(expected: Any, actual: Any) -> Difference:
    worst = Difference()
    for one, other in zip(tree_leaves(expected), tree_leaves(actual), strict=True):
        if not isinstance(one, Tensor) or one.numel() == 0:
            continue
        if one.shape != other.shape:
            raise PruningError(
                f"an output of the pruned network has shape {tuple(other.shape)} instead of "
                f"{tuple(one.shape)}"
            )
        same = (one == other) | (one.isnan() & other.isnan())
        if one.dtype is torch.bool:
            one, other = one.int(), other.int()
        largest = torch.where(same, 0, (one - other).abs()).max().item()
        scale = one.nan_to_num(posinf=0, neginf=0).abs().max().item()
        precision = one.dtype.to_real() if one.is_complex() else one.dtype
        is_rounding = largest <= TOLERANCE.get(precision, 0) * max(scale, 1e-30)
        found = Difference(largest, scale, is_rounding)
        if not is_rounding:
            return found
        worst = max(worst, found, key=lambda difference: difference.relative)
    return worst


def _first_that_differs(large: nn.Module, small: nn.Module, inputs: Inputs) -> str | None:
    """The first module to return whose output has kept its shape, but not its values."""
    outputs: list[list[tuple[str, Tensor]]] = []
    for model in (large, small):
        seen: list[tuple[str, Tensor]] = []
        hooks = {
            module: lambda module, args, output, name=name, seen=seen: seen.append((name, output))
            for name, module in model.named_modules()
            if name
        }
        with hooked(hooks):
            run(model, inputs)
        outputs.append(seen)
    for (name, one), (_, other) in zip(*outputs, strict=False):
        comparable = isinstance(one, Tensor) and isinstance(other, Tensor)
        if comparable and one.shape == other.shape and not difference_of(one, other).is_rounding:
            return str(name)
    return None
