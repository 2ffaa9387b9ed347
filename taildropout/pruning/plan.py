"""The record of what goes from a network: made and applied."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.settings import check_multiple_of
from ..models.copies import PruningError, copy_that_shares, tensors_by_name
from ..models.inputs import Inputs
from ..models.insert import tail_dropouts
from ..models.sharded import check_whole_tensors
from ..models.width import (
    Widths,
    at_no_width,
    layer_ks,
    rounded_up,
    warn_of_never_called,
    widths_by_layer,
)
from .conditions import conditions_of
from .configs import fit_configs
from .cost import Cost, costs_by_module
from .cuts import Cut, Fit, Fold, Reading, Rescale, Stay, ToLinear
from .outputs import OutputCut
from .predicted import cut_as_predicted, cut_unread
from .surgery import operate
from .sweep import Sweep, SweepPoint, seconds_per_call
from .verify import Verification, dtype_to_verify, verify

FORMAT = 2  # 1 had no rescales


@dataclass(frozen=True)
class Change:
    """A module that is cut: its weights' shapes and its cost, before and after."""

    module: str
    type: str
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    before: Cost
    after: Cost


@dataclass(frozen=True, eq=False)
class PrunePlan:
    """What goes from a model when its layers are pruned to k. Made by `plan_pruning`.

    Attributes:
        k: the width that each layer gets, by qualified name.
        n: the width that it has.
        cuts: the indices that stay, for each parameter and buffer that is cut.
        folds: the constants that the columns that go contributed, added to biases.
        rescales: the root mean square norms that average over fewer features.
        fits: the layers that slice what arrives or add zeros, since a neighbour can't be cut.
        stays: what can't go although k says so, and why.
        changes: the modules that are cut.
        before: parameters and FLOPs of the model.
        after: the same of the pruned one.
        model: the one that the plan was made for.
        example_inputs: what it was analysed with.
        reading: the model's dataflow, which plans for other ks are made from too.
        asked: the k that each layer was to get, before it was rounded up.
        multiple_of: what it was rounded up to a multiple of.
        outputs: whether the features that the model returns are cut too.
        output_cuts: what goes from what the model returns.
        checked: whether the small network's own dataflow was compared with the predicted one.
        verifications: what `apply` compared, in which dtype, and what it could not compare.
        to_linears: the TailLinears that become an `nn.Linear` of their k.
    """

    k: dict[str, int]
    n: dict[str, int]
    cuts: list[Cut] = field(repr=False)
    folds: list[Fold] = field(repr=False)
    rescales: list[Rescale] = field(repr=False)
    fits: list[Fit] = field(repr=False)
    stays: list[Stay] = field(repr=False)
    changes: list[Change] = field(repr=False)
    before: Cost
    after: Cost
    model: nn.Module = field(repr=False)
    example_inputs: Inputs = field(repr=False)
    reading: Reading = field(repr=False)
    asked: dict[str, int] = field(default_factory=dict, repr=False)
    multiple_of: int = 1
    outputs: bool = False
    output_cuts: list[OutputCut] = field(default_factory=list, repr=False)
    checked: bool = field(default=True, repr=False)
    verifications: list[Verification] = field(default_factory=list, repr=False)
    to_linears: list[ToLinear] = field(default_factory=list, repr=False)

    @property
    def conditions(self) -> tuple[str, ...]:
        """What the promise rests on: that the small network computes what the large one does.

        It holds at every batch size, length and resolution but those that are named here.
        """
        return conditions_of(self.reading.flow, self.cuts)

    def apply(self, model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
        """A pruned copy of the model, verified; the model itself is left untouched.

        The copy has the classes, attribute names and state-dict keys of the model (a Linear or
        Conv without bias gets one where it has a constant to take in). Its TailDropout layers
        are still in place, with no k set, but a TailLinear is an `nn.Linear`, of the same keys
        without `tail_bias`. A model of Hugging Face gets a config that builds the
        pruned one; where there is none, `save_pretrained` says why. The copy is compared with the
        model with k set on the example inputs and on random ones, and at other sizes where the
        model takes them.

        Args:
            model: the one that the plan was made for, perhaps trained further.
            dtype: what to compare in. None: float64 where the model allows and has no more than
                2^25 parameters, else its own dtype, which takes no further copy of the weights.

        Raises:
            PruningError: the two differ by more than rounding, or the model is not the one that
                the plan was made for. Nothing is returned then.
        """
        if not self.checked:
            return self.at(self.k).apply(model, dtype=dtype)
        small = self.verified_copy(model, dtype=dtype)
        fit_configs(small, model, self.example_inputs)
        return small

    def verified_copy(self, model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
        """As `apply`, by whatever is known so far, and with the config of the large model."""
        with at_no_width(model):
            small = self._cut_copy(model)
            for layer in tail_dropouts(small).values():
                layer.set_k(None)
            compared = verify(
                model,
                small,
                self._cut_copy,
                self.k,
                self.example_inputs,
                self.reading.flow.paths.other_inputs(),
                dtype=dtype_to_verify(model) if dtype is None else dtype,
                output_cuts=self.output_cuts,
            )
        self.verifications.append(compared)
        return small

    def at(
        self,
        k: Widths,
        *,
        multiple_of: int | None = None,
        outputs: bool | None = None,
        check: bool = True,
    ) -> "PrunePlan":
        """The plan for another k, without reading the model anew.

        Args and errors as in `plan_pruning`; `multiple_of` and `outputs` are those of this plan
        where they are None. With `check=False` the small network's own dataflow is not compared
        with the predicted one, which takes a fraction of the time: enough to know costs. `apply`
        makes up for it.
        """
        with at_no_width(self.model):
            return _plan(
                self.model,
                k,
                self.example_inputs,
                self.reading,
                self.multiple_of if multiple_of is None else check_multiple_of(multiple_of),
                self.outputs if outputs is None else outputs,
                check,
            )

    def sweep(self, ks: Iterable[Widths], *, repeats: int = 15) -> Sweep:
        """What the network would cost at other ks: parameters, FLOPs, and measured time.

        Args:
            ks: as the k of `plan_pruning`. They are rounded up as those of this plan.
            repeats: the time of one call on the example inputs is the median of so many, and the
                networks take turns.

        Example:
            >>> from taildropout import TailDropout
            >>> model = nn.Sequential(nn.Linear(8, 16), TailDropout(), nn.Linear(16, 4))
            >>> sweep = plan_pruning(model, 5, torch.randn(2, 8)).sweep([2, 8, 16])
            >>> [point.parameters for point in sweep.points]
            [30, 108, 212]
        """
        ks = list(ks)
        plans = [self.at(k, check=False) for k in ks]
        small = [plan._cut_copy(self.model).eval() for plan in plans]
        seconds = seconds_per_call(small, self.example_inputs, repeats)
        return Sweep(
            [
                SweepPoint(plan._of_one(k), plan.after.parameters, plan.after.flops, time)
                for k, plan, time in zip(ks, plans, seconds, strict=True)
            ]
        )

    def summary(self) -> str:
        """What goes, module by module, with parameters and FLOPs; what stays and why.

        Its last lines are the conditions, and what was verified.
        """
        lines = self._headings()
        rows = [("module", "type", "weights", "parameters", "FLOPs"), *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
        return "\n".join(lines + self._remarks())

    def __rich__(self) -> Any:
        """What `rich.print` shows: the summary, with the rows as a table."""
        from rich.console import Group
        from rich.table import Table

        table = Table("module", "type", "weights", "parameters", "FLOPs")
        for row in self._rows():
            table.add_row(*row)
        return Group(*self._headings(), table, *self._remarks())

    def _of_one(self, k: Widths) -> Widths:
        """What the k of a model with one layer became; anything else as it was said."""
        return next(iter(self.k.values())) if isinstance(k, int) else k

    def _headings(self) -> list[str]:
        headings = []
        for name, k in self.k.items():
            asked = self.asked.get(name, k)
            note = "" if k == asked else f" ({asked} rounded up, multiple_of={self.multiple_of})"
            note += "" if k < self.n[name] else ": nothing to remove"
            headings.append(f"TailDropout {name!r}: k = {k} of {self.n[name]} features{note}")
        return headings

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        rows = []
        for change in self.changes:
            shapes = ", ".join(f"{_size(a)} -> {_size(b)}" for a, b in change.shapes.values())
            rows.append(
                (change.module, change.type, shapes, *_from_to(change.before, change.after))
            )
        return [*rows, ("all", "", "", *_from_to(self.before, self.after))]

    def _remarks(self) -> list[str]:
        remarks = [
            f"{fold.name} takes in the constant of the columns that go" for fold in self.folds
        ]
        remarks += [str(cut) for cut in self.output_cuts]
        remarks += [
            f"{' = '.join(r.weights)} takes in sqrt({r.before}/{r.after}): the norm that it belongs "
            f"to averages {r.after} features instead of {r.before}"
            for r in self.rescales
        ]
        remarks += [
            f"{to_linear.name} becomes an nn.Linear, which takes in the bias and scale of "
            f"k = {to_linear.k}"
            for to_linear in self.to_linears
        ]
        remarks += [
            f"{stay.side} {stay.layer!r} stays: {stay.name} {stay.reason}" for stay in self.stays
        ]
        remarks += [f"provided that {condition}" for condition in self.conditions]
        return remarks + [line for compared in self.verifications[-1:] for line in compared.lines()]

    def _cut_copy(self, model: nn.Module) -> nn.Module:
        check_whole_tensors(model)
        tensors = tensors_by_name(model)
        check_model_fits(self.cuts, tensors)
        # Those that are cut are shared with the copy, until the cut replaces them in it.
        small = copy_that_shares(model, [tensors[cut.name] for cut in self.cuts])
        operate(small, self.cuts, self.folds, self.fits, self.rescales, self.to_linears)
        return small

    def to_dict(self) -> dict[str, Any]:
        """The plan without its tensors and inputs, as plain data."""
        return {
            "format": FORMAT,
            "k": self.k,
            "n": self.n,
            "cuts": [[cut.name, cut.dim, cut.size, list(cut.keep)] for cut in self.cuts],
            "biases": [fold.name for fold in self.folds],
            "fits": [
                [fit.layer, fit.width, fit.size, fit.arrives, fit.behind] for fit in self.fits
            ],
            "rescales": [
                [list(r.weights), r.plus, r.module, r.eps, r.before, r.after] for r in self.rescales
            ],
            "to_linears": [[to_linear.name, to_linear.k] for to_linear in self.to_linears],
        }


def plan_pruning(
    model: nn.Module,
    k: Widths,
    example_inputs: Inputs,
    *,
    multiple_of: int = 1,
    outputs: bool = False,
) -> PrunePlan:
    """Find out what goes from a model when its TailDropout layers are pruned to k.

    The dataflow is read from `torch.export`. In front of a layer, what computes the tail goes:
    rows of a Linear or Conv, columns of an Embedding, entries of BatchNorm and other parameters
    on the way. Behind it, what reads the tail goes: columns of a Linear, Conv or recurrent layer,
    whose bias takes in what they contributed; matrix products and einsums lose what they add up,
    sums and norms (`F.normalize`) zeros. RMSNorm, of any class, averages over what is left, its
    weight and eps rescaled such that it computes the same. Elementwise functions, pooling, reshaping,
    concatenation, gating and residual additions pass features on. What can't be cut such that the
    result is the same on every input stays (`plan.stays` says why), and the layer slices what
    arrives or adds zeros instead.

    Args:
        model: in any mode; it is left untouched, and analysed in eval mode.
        k: how many features to keep: an int for a model with one layer, a dict from qualified
            layer names, or None for the ks that are set.
        example_inputs: a tensor (`model(x)`), a tuple (`model(*inputs)`) or a dict
            (`model(**inputs)`) with at least one sample.
        multiple_of: round every k up to a multiple of it (or to n): hardware likes multiples of
            8 or 64. The summary says what k became.
        outputs: cut the features that the model returns too, so that an encoder that ends in a
            layer returns the first k. All other returned values keep their shapes.

    Raises:
        PruningError: the model is sharded over processes, can't be exported, does not call a
            layer, or does not run after it was cut (a size is written in its code); with
            `outputs`, the model does not return features of a layer, or they can't be cut to k,
            since more than the first k of them are not zero or are needed.
        ValueError: no layer, no k, an unknown layer name, k outside 0, ..., n, or multiple_of
            below 1.
        TypeError: k or multiple_of is not an integer.

    Example:
        >>> from taildropout import TailDropout
        >>> model = nn.Sequential(nn.Linear(8, 16), TailDropout(), nn.ReLU(), nn.Linear(16, 4))
        >>> print(plan_pruning(model, 5, torch.randn(2, 8)).summary())
        TailDropout '1': k = 5 of 16 features
        module  type    weights          parameters  FLOPs
        0       Linear  16 x 8 -> 5 x 8  144 -> 45   512 -> 160
        3       Linear  4 x 16 -> 4 x 5  68 -> 24    256 -> 80
        all                              212 -> 69   768 -> 240
        provided that all numbers inside the network are finite: zero times an infinite one is NaN
    """
    widths_by_layer(model, k)  # complains before anything is read
    check_whole_tensors(model)
    multiple_of = check_multiple_of(multiple_of)
    with at_no_width(model):
        reading = Reading(model, example_inputs)
        plan = _plan(model, k, example_inputs, reading, multiple_of, outputs, check=True)
    warn_of_never_called([name for name in reading.flow.never_called if name not in plan.k])
    return plan


def _plan(
    model: nn.Module,
    k: Widths,
    example_inputs: Inputs,
    reading: Reading,
    multiple_of: int,
    outputs: bool,
    check: bool,
) -> PrunePlan:
    n_of = reading.flow.n_of
    asked = layer_ks(model, k, n_of, reading.flow.never_called)
    layers = tail_dropouts(model)
    ks = {
        name: rounded_up(k, math.lcm(multiple_of, layers[name].multiple_of), n_of(name))
        for name, k in asked.items()
    }
    found, small = (cut_as_predicted if check else cut_unread)(model, ks, reading, outputs)
    try:
        after = costs_by_module(small, example_inputs)
    except Exception:
        if check:
            raise
        return _plan(model, k, example_inputs, reading, multiple_of, outputs, check=True)
    return PrunePlan(
        found.k,
        found.n,
        found.cuts,
        found.folds,
        found.rescales,
        found.fits,
        found.stays,
        _changes(model, small, found.cuts, reading.costs, after),
        reading.costs[""],
        after[""],
        model,
        example_inputs,
        reading,
        asked,
        multiple_of,
        outputs,
        found.output_cuts,
        check,
        to_linears=found.to_linears,
    )


def prune(
    model: nn.Module,
    k: Widths,
    example_inputs: Inputs,
    *,
    multiple_of: int = 1,
    outputs: bool = False,
) -> nn.Module:
    """A smaller copy of the model that computes what the model computes with k set.

    `plan_pruning` and `PrunePlan.apply` in one; see there for arguments and errors.

    Example:
        >>> from taildropout import TailDropout
        >>> model = nn.Sequential(nn.Linear(8, 16), TailDropout(), nn.ReLU(), nn.Linear(16, 4))
        >>> prune(model, 5, torch.randn(2, 8))
        Sequential(
          (0): Linear(in_features=8, out_features=5, bias=True)
          (1): TailDropout(p=0.5, batch_dim=0, dropout_dim=-1)
          (2): ReLU()
          (3): Linear(in_features=5, out_features=4, bias=True)
        )

        An encoder that returns its features returns the first k of them:

        >>> encoder, x = model[:3], torch.randn(2, 8)
        >>> prune(encoder, 5, x, multiple_of=2, outputs=True)(x).shape
        torch.Size([2, 6])
    """
    plan = plan_pruning(model, k, example_inputs, multiple_of=multiple_of, outputs=outputs)
    return plan.apply(model)


def _changes(
    model: nn.Module,
    small: nn.Module,
    cuts: list[Cut],
    before: Mapping[str, Cost],
    after: Mapping[str, Cost],
) -> list[Change]:
    large_tensors, small_tensors = tensors_by_name(model), tensors_by_name(small)
    shapes: dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for cut in cuts:
        module, _, attribute = cut.name.rpartition(".")
        if cut.name not in small_tensors:  # of a TailLinear, which is none any more
            continue
        if large_tensors[cut.name].ndim > 1 or "weight" in attribute or not module:
            pair = tuple(large_tensors[cut.name].shape), tuple(small_tensors[cut.name].shape)
            shapes.setdefault(module, {})[attribute] = pair
        else:
            shapes.setdefault(module, {})
    return [
        Change(name, type(model.get_submodule(name)).__name__, pairs, before[name], after[name])
        for name, pairs in shapes.items()
        if name in before  # a module with several names has one cost
    ]


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _from_to(before: Cost, after: Cost) -> tuple[str, str]:
    return (
        f"{before.parameters:,} -> {after.parameters:,}",
        f"{before.flops:,} -> {after.flops:,}",
    )


def check_model_fits(cuts: list[Cut], tensors: Mapping[str, Tensor]) -> None:
    for cut in cuts:
        tensor = tensors.get(cut.name)
        if tensor is None or tensor.ndim <= cut.dim or tensor.shape[cut.dim] != cut.size:
            found = "none" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise PruningError(
                f"the plan cuts {cut.name!r} of size {cut.size} along dim {cut.dim}, and the model "
                f"has {found}"
            )
