"""Comparing a network with what was made of it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..models.copies import (
    PruningError,
    copy_that_shares,
    first_line,
    with_own_buffers,
    without_cache,
)
from ..models.hooks import hooked
from ..models.inputs import (
    Inputs,
    call,
    leaving_no_trace,
    of_twice_the_batch,
    random_like,
    tensors_of,
)
from ..models.width import at_width
from .outputs import OutputCut, what_stays
from .precision import precisely

Made = Literal["pruned", "ordered"]

# Up to this number of parameters networks are compared in float64; beyond, that is too much memory.
MOST_IN_FLOAT64 = 2**25

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
    others: Sequence[tuple[str, Inputs]] = (),
    *,
    dtype: torch.dtype | None,
    output_cuts: Sequence[OutputCut] = (),
    made: Made = "pruned",
) -> Verification:
    """Compare the model at `k` with `small` on the example inputs, on random ones, and on others.

    In float64 the outputs of the modules inside are compared too, as far as they have kept their
    shapes: of a network that returns the largest of its outputs, also these.

    Args:
        model: the large network; it is not run itself, nor is `small`.
        small: what was made of it, by `cut`.
        cut: makes a small network of a copy in another dtype.
        k: by layer name.
        example_inputs: what the networks are called with.
        others: more inputs, with what they are. Those that the model does not take are skipped.
        dtype: what to compare in, where the model runs in it. None: its own.
        output_cuts: what goes from the outputs, and must be zero in those of the large network.
        made: what became of it; of an ordered network only the outputs are compared, since the
            features inside have changed places.

    Raises:
        PruningError: they differ by more than rounding, what goes from the outputs is not zero,
            or one of them does not run on the example inputs.
    """
    skipped = []
    precision: AbstractContextManager[object] = nullcontext()
    large, small = with_own_buffers(model).eval(), with_own_buffers(small).eval()
    if dtype is not None:
        try:
            precise = without_cache(copy_that_shares(model, ()).eval().to(dtype))
            converted = to_dtype(example_inputs, dtype)
            precision = precisely(dtype, lambda: run(precise, converted))
            large, small = precise, cut(precise).eval()
        except PruningError:
            raise
        except Exception as error:  # the model insists on its own dtype
            skipped.append(f"in {str(dtype).removeprefix('torch.')}: {first_line(error)}")
            dtype = None
    comparisons: list[Comparison] = []
    named = [("the example inputs", example_inputs), *_of_other_values(example_inputs), *others]
    watched = dtype is torch.float64 and made == "pruned"
    with precision, at_width(large, k):
        for name, inputs in named:
            inputs = inputs if dtype is None else to_dtype(inputs, dtype)
            try:
                expected, seen = _run(large, inputs, watched)
            except Exception as error:
                if not comparisons:
                    raise PruningError(
                        f"the model must run on its example inputs, but raised {first_line(error)}"
                    ) from error
                skipped.append(f"on {name}: {first_line(error)}")
                continue
            try:
                actual, seen_in_small = _run(small, inputs, watched)
            except Exception as error:
                raise does_not_run(error) from error
            found = difference_of(what_stays(expected, output_cuts), actual, made)
            if (
                made == "pruned" and not watched and not found.is_rounding
            ):  # again, to name the module
                seen, seen_in_small = (_run(m, inputs, True)[1] for m in (large, small))
            _check(found, _first_that_differs(seen, seen_in_small), k, made)
            comparisons.append(Comparison(name, _sizes(inputs), found.relative))
    return Verification(dtype, tuple(comparisons), tuple(skipped))


def dtype_to_verify(model: nn.Module) -> torch.dtype | None:
    """float64 where the model is small enough for it, and real; None: its own."""
    few = sum(p.numel() for p in model.parameters()) <= MOST_IN_FLOAT64
    return torch.float64 if few and not any(p.is_complex() for p in model.parameters()) else None


def _of_other_values(example_inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    random = tree_map(random_like, example_inputs)
    yield "random inputs", random
    yield "twice as many samples", of_twice_the_batch(random)


def run(model: nn.Module, inputs: Inputs) -> Any:
    """What the model makes of the inputs, which stay as they are."""
    with leaving_no_trace(model, inputs) as own_inputs:
        return call(model, own_inputs)


def _run(model: nn.Module, inputs: Inputs, watched: bool) -> tuple[Any, list[tuple[str, Any]]]:
    """What the model returns, and, where it is watched, what each module returns inside."""
    with _outputs_of_modules(model, watched) as seen:
        return run(model, inputs), seen


def does_not_run(error: Exception) -> PruningError:
    """What became of a model that did."""
    return PruningError(
        f"the pruned network does not run: {first_line(error)}. Its forward may spell out a size "
        "that pruning changes, as in x.view(-1, 3136): read it from the tensors instead, as in "
        "x.flatten(1). With k = 0, a layer may be one that torch can't run on no features"
    )


def to_dtype(inputs: Inputs, dtype: torch.dtype) -> Any:
    def converted(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floats else value

    return tree_map(converted, inputs)


def _check(found: "Difference", module: str | None, k: dict[str, int], made: Made) -> None:
    if found.is_rounding and module is None:
        return
    at_k = f" with k={k}" if made == "pruned" else ""
    message = f"the {made} network must compute what the model computes{at_k}, but differs"
    if not found.is_rounding:
        message += f" by up to {found.largest:.3g} where the outputs are up to {found.scale:.3g}"
    if module is not None:
        message += f", first in the output of module {module!r}"
    plan = "plan_pruning" if made == "pruned" else "plan_ordering"
    raise PruningError(f"{message}. (If the weights have changed since {plan}, plan again.)")


def _sizes(inputs: Inputs) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors_of(inputs))


@dataclass(frozen=True)
class Difference:
    """Of the output where two networks differ most: the largest difference, the largest entry."""

    largest: float = 0.0
    scale: float = 0.0
    is_rounding: bool = True

    @property
    def relative(self) -> float:
        return self.largest / max(self.scale, 1e-30)


def difference_of(expected: Any, actual: Any, made: Made = "pruned") -> Difference:
    """Raises PruningError where they differ in more than numbers."""
    worst = Difference()
    for one, other in zip(_leaves(expected), _leaves(actual), strict=True):
        if not isinstance(one, Tensor):
            if isinstance(one, int | float | str) and one != other:
                raise PruningError(
                    f"the {made} network returns {other!r} where the model returns {one!r}"
                )
            continue
        if one.shape != other.shape:
            raise PruningError(
                f"an output of the {made} network has shape {tuple(other.shape)} instead of "
                f"{tuple(one.shape)}"
            )
        found = _difference(one, other)
        if not found.is_rounding:
            return found
        worst = max(worst, found, key=lambda difference: difference.relative)
    return worst


def _leaves(value: Any) -> list[Any]:
    """All that a network returns, in a row; dataclasses field by field."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Mapping):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return [leaf for part in value for leaf in _leaves(part)]
    found = []
    for leaf in tree_leaves(value):
        found += _leaves(leaf) if dataclasses.is_dataclass(leaf) else [leaf]
    return found


def _difference(one: Tensor, other: Tensor) -> Difference:
    if one.numel() == 0:
        return Difference()
    same = (one == other) | (one.isnan() & other.isnan())
    if one.dtype is torch.bool:
        one, other = one.int(), other.int()
    largest = torch.where(same, 0, (one - other).abs()).max().item()
    scale = one.nan_to_num(posinf=0, neginf=0).abs().max().item()
    precision = one.dtype.to_real() if one.is_complex() else one.dtype
    return Difference(largest, scale, largest <= TOLERANCE.get(precision, 0) * max(scale, 1e-30))


@contextmanager
def _outputs_of_modules(model: nn.Module, watched: bool) -> Iterator[list[tuple[str, Any]]]:
    """What the modules return inside, by name; nothing, and no memory, where none is watched."""
    seen: list[tuple[str, Any]] = []
    hooks = {
        module: lambda module, args, output, name=name: seen.append((name, output))
        for name, module in model.named_modules()
        if name and watched
    }
    with hooked(hooks):
        yield seen


def _first_that_differs(seen: list[tuple[str, Any]], others: list[tuple[str, Any]]) -> str | None:
    """The first module to return whose output has kept its shape, but not its values.

    A module may be called by one of the networks only: a TailMLP with k set slices by itself.
    """
    waiting: dict[str, list[Any]] = {}
    for name, output in others:
        waiting.setdefault(name, []).append(output)
    for name, one in seen:
        other: Any = waiting[name].pop(0) if waiting.get(name) else None
        comparable = isinstance(one, Tensor) and isinstance(other, Tensor)
        if comparable and one.shape == other.shape and not _difference(one, other).is_rounding:
            return name
    return None
