"""The record of what goes from a network: made, applied and verified, saved and loaded."""

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from ..files import written_whole
from ..functional import check_k
from ..insert import Inputs, call, tail_dropouts
from .analysis import Cut, Fit, Fold, Stay, analyse
from .graph import PruningError, structural_copy, tensors_by_name
from .surgery import operate

FORMAT = 1

# The largest difference, relative to the largest output, that rounding explains.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Cost:
    """What a network takes: its parameters, and the FLOPs of one call on the example inputs.

    FLOPs are torch's count (`torch.utils.flop_counter`) of matrix products and convolutions.
    """

    parameters: int
    flops: int


@dataclass(frozen=True)
class PrunePlan:
    """What goes from a model when its layers are pruned to k. Made by `plan_pruning`.

    Attributes:
        k: the width that each layer gets, by qualified name.
        n: the width that it has.
        cuts: the indices that stay, for each parameter and buffer that is cut.
        folds: the constants that the columns that go contributed, added to biases.
        fits: the layers that slice what arrives or add zeros, since a neighbour can't be cut.
        stays: what can't go although k says so, and why.
        before: parameters and FLOPs of the model.
        after: the same of the pruned one.
    """

    k: dict[str, int]
    n: dict[str, int]
    cuts: list[Cut]
    folds: list[Fold]
    fits: list[Fit]
    stays: list[Stay]
    before: Cost
    after: Cost
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(repr=False)
    example_inputs: Inputs = field(repr=False)

    def apply(self, model: nn.Module) -> nn.Module:
        """A pruned copy of the model, verified; the model itself is left untouched.

        The copy has the classes, attribute names and state-dict keys of the model (a Linear or
        Conv without bias gets one where it has a constant to take in). Its TailDropout layers
        are still in place, with no k set. It is compared with the model with k set on the
        example inputs and on random ones, in float64 where the model allows.

        Raises:
            PruningError: the two differ by more than rounding, or the model is not the one that
                the plan was made for. Nothing is returned then.
        """
        small = self._cut_copy(model)
        for layer in tail_dropouts(small).values():
            layer.set_k(None)
        self._verify(model)
        return small

    def summary(self) -> str:
        """What goes, as a table: tensors with their shapes, parameters and FLOPs."""
        lines = []
        for name, k in self.k.items():
            note = "" if k < self.n[name] else ": nothing to remove"
            lines.append(f"TailDropout {name!r}: k = {k} of {self.n[name]} features{note}")
        rows = [("", "before", "after")]
        for name, shapes in self.shapes.items():
            before, after = (" x ".join(map(str, shape)) for shape in shapes)
            rows.append((name, before, after))
        rows.append(("parameters", f"{self.before.parameters:,}", f"{self.after.parameters:,}"))
        rows.append(("FLOPs", f"{self.before.flops:,}", f"{self.after.flops:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines += [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
        lines += [
            f"{fold.name} takes in the constant of the columns that go" for fold in self.folds
        ]
        lines += [
            f"{stay.side} of layer {stay.layer!r} stays: {stay.name} {stay.reason}"
            for stay in self.stays
        ]
        return "\n".join(lines)

    def _cut_copy(self, model: nn.Module) -> nn.Module:
        tensors = tensors_by_name(model)
        _check_model_fits(self.cuts, tensors)
        # Those that are cut are shared with the copy, until the cut replaces them in it.
        shared = {id(tensors[cut.name]): tensors[cut.name] for cut in self.cuts}
        small = copy.deepcopy(model, shared)
        operate(small, self.cuts, self.folds, self.fits)
        return small

    def _verify(self, model: nn.Module) -> None:
        examples = [self.example_inputs, tree_map(_random_like, self.example_inputs)]
        large = copy.deepcopy(model).eval()
        try:
            large.double()
            examples_64 = tree_map(_in_float64, examples)
            for inputs in examples_64:
                _run(large, inputs)
            examples = examples_64
        except Exception:  # the model insists on its own dtype
            large = copy.deepcopy(model).eval()
        small = self._cut_copy(large)
        for name, k in self.k.items():
            tail_dropouts(large)[name].set_k(k)
        for inputs in examples:
            expected = _run(large, inputs)
            actual = _run_pruned(small, inputs)
            _compare(self.k, expected, actual)

    def to_dict(self) -> dict[str, Any]:
        """The plan without its tensors and inputs, as plain data."""
        return {
            "format": FORMAT,
            "k": self.k,
            "n": self.n,
            "cuts": [[cut.name, cut.dim, cut.size, list(cut.keep)] for cut in self.cuts],
            "biases": [fold.name for fold in self.folds],
            "fits": [[fit.layer, fit.width, fit.size] for fit in self.fits],
        }


def plan_pruning(
    model: nn.Module, k: int | Mapping[str, int] | None, example_inputs: Inputs
) -> PrunePlan:
    """Find out what goes from a model when its TailDropout layers are pruned to k.

    The model must be a chain around each layer: a Linear or Conv computes the features, a Linear
    or Conv reads them, and between these and the layer are elementwise functions, BatchNorm,
    pooling, reshaping and dropout only. Anything else is refused.

    Args:
        model: in any mode; it is left untouched, and analysed in eval mode.
        k: how many features to keep: an int for a model with one layer, a dict from qualified
            layer names, or None for the ks that are set.
        example_inputs: a tensor (`model(x)`), a tuple (`model(*inputs)`) or a dict
            (`model(**inputs)`) with at least one sample.

    Raises:
        PruningError: what k removes can't be removed such that the outputs provably stay; the
            message says what is in the way.
        ValueError: no layer, no k, an unknown layer name, or k outside 0, ..., n.
        TypeError: k is not an integer.

    Example:
        >>> from taildropout import TailDropout
        >>> model = nn.Sequential(nn.Linear(8, 16), TailDropout(), nn.ReLU(), nn.Linear(16, 4))
        >>> print(plan_pruning(model, 5, torch.randn(2, 8)).summary())
        TailDropout '1': k = 5 of 16 features
                    before  after
        0.weight    16 x 8  5 x 8
        0.bias          16      5
        3.weight    4 x 16  4 x 5
        parameters     212     69
        FLOPs          768    240
    """
    findings = analyse(model, _layer_ks(model, k), example_inputs)
    small = _with_own_buffers(model)
    operate(small, findings.cuts, findings.folds, findings.fits)
    tensors, small_tensors = tensors_by_name(model), tensors_by_name(small)
    return PrunePlan(
        findings.k,
        findings.n,
        findings.cuts,
        findings.folds,
        findings.fits,
        findings.stays,
        before=_cost(_with_own_buffers(model), example_inputs),
        after=_cost(small, example_inputs),
        shapes={
            cut.name: (tuple(tensors[cut.name].shape), tuple(small_tensors[cut.name].shape))
            for cut in findings.cuts
        },
        example_inputs=example_inputs,
    )


def prune(model: nn.Module, k: int | Mapping[str, int] | None, example_inputs: Inputs) -> nn.Module:
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
    """
    return plan_pruning(model, k, example_inputs).apply(model)


def save_pruned(small: nn.Module, plan: PrunePlan, path: str | os.PathLike[str]) -> None:
    """Write a pruned model to a safetensors file, with the plan in its metadata.

    The file is written whole or not at all.

    Example:
        >>> import tempfile
        >>> from taildropout import TailDropout
        >>> def fresh():
        ...     return nn.Sequential(nn.Linear(8, 16), TailDropout(), nn.Linear(16, 4)).eval()
        >>> model, x = fresh(), torch.randn(2, 8)
        >>> plan = plan_pruning(model, 5, x)
        >>> small = plan.apply(model)
        >>> path = tempfile.mkdtemp() + "/small.safetensors"
        >>> save_pruned(small, plan, path)
        >>> torch.equal(load_pruned(fresh(), path)(x), small(x))
        True
    """
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in small.state_dict().items()
    }
    record = plan.to_dict()
    record["sha256"] = _digest(record, tensors)
    with written_whole(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={"taildropout": json.dumps(record)}))


def load_pruned(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Shrink a fresh full-size model to a saved pruned one, in place, and load its weights.

    Args:
        model: built as the model that was pruned; its weights don't matter. It keeps its device
            and dtype.
        path: a file by `save_pruned`.

    Returns:
        The model.

    Raises:
        PruningError: the file is damaged, from a newer version, not by `save_pruned`, or of
            another model. The model is untouched then.
        FileNotFoundError: there is no such file.
    """
    cuts, biases, fits, tensors = _read(path)
    biases = [name for name in biases if tensors_by_name(model).get(name) is None]
    try:
        _check_model_fits(cuts, tensors_by_name(model))
        folds = [Fold(name, torch.zeros_like(tensors[name])) for name in biases]
        rehearsal = structural_copy(model)
        operate(rehearsal, cuts, folds, fits)
        expected = {name: t.shape for name, t in rehearsal.state_dict().items()}
        found = {name: t.shape for name, t in tensors.items()}
        if expected != found:
            names = sorted(
                name for name in expected | found if expected.get(name) != found.get(name)
            )
            raise PruningError(f"these tensors differ: {', '.join(names[:5])}")
    except (PruningError, AttributeError, KeyError) as error:
        raise PruningError(
            f"{os.fspath(path)!r} was pruned from another model than this one: {error}"
        ) from error
    operate(model, cuts, folds, fits)
    model.load_state_dict(tensors)
    return model


def _layer_ks(model: nn.Module, k: int | Mapping[str, int] | None) -> dict[str, int]:
    layers = tail_dropouts(model)
    if not layers:
        raise ValueError("the model must contain a TailDropout layer to be pruned, and has none")
    if k is None:
        given: Mapping[str, Any] = {name: m.k for name, m in layers.items() if m.k is not None}
        if not given:
            raise ValueError("k=None prunes to the ks that are set, and none is: call set_k(k)")
    elif isinstance(k, Mapping):
        given = k
    elif len(layers) == 1:
        given = dict.fromkeys(layers, k)
    else:
        raise ValueError(
            f"the model has several TailDropout layers, give k as a dict: {sorted(layers)}"
        )
    unknown = sorted(set(given) - set(layers))
    if unknown:
        raise ValueError(
            f"k must name TailDropout layers of the model, {sorted(layers)}, got {unknown}"
        )
    ks = {}
    for name, value in given.items():
        value = check_k(value)
        if not isinstance(value, int):
            raise TypeError(f"k must be one int for all samples, got {value} for layer {name!r}")
        if value < 0:
            raise ValueError(f"k must be at least 0, got {value} for layer {name!r}")
        ks[name] = value
    return ks


def _with_own_buffers(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters only: running it may change buffers."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _cost(model: nn.Module, inputs: Inputs) -> Cost:
    for layer in tail_dropouts(model).values():
        layer.set_k(None)
    with FlopCounterMode(display=False) as counter:
        _run_pruned(model.eval(), inputs)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops())


@torch.no_grad()
def _run(model: nn.Module, inputs: Inputs) -> Any:
    copied = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
    return call(model, copied)


def _run_pruned(model: nn.Module, inputs: Inputs) -> Any:
    try:
        return _run(model, inputs)
    except Exception as error:
        raise PruningError(
            f"the pruned network does not run: {error}. Its forward may spell out a size that "
            "pruning changes, as in x.view(-1, 3136): read it from the tensors instead, as in "
            "x.flatten(1). With k = 0, a layer may be one that torch can't run on no features"
        ) from error


def _random_like(value: Any) -> Any:
    """Other values of the same shape and type: Gaussian, or integers that occurred already."""
    if not isinstance(value, Tensor):
        return value
    generator = torch.Generator().manual_seed(0)
    if value.is_floating_point() or value.is_complex():
        return torch.randn(value.shape, dtype=value.dtype, generator=generator).to(value.device)
    index = torch.randint(max(value.numel(), 1), value.shape, generator=generator)
    return value.flatten()[index.to(value.device)]


def _in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _compare(k: dict[str, int], expected: Any, actual: Any) -> None:
    for one, other in zip(tree_leaves(expected), tree_leaves(actual), strict=True):
        if not isinstance(one, Tensor) or one.numel() == 0:
            continue
        if one.shape != other.shape:
            raise PruningError(
                f"an output of the pruned network has shape {tuple(other.shape)} instead of "
                f"{tuple(one.shape)}"
            )
        same = (one == other) | (one.isnan() & other.isnan())
        difference = torch.where(same, 0, (one - other).abs()).max().item()
        scale = one.nan_to_num(posinf=0, neginf=0).abs().max().item()
        if not difference <= TOLERANCE.get(one.dtype, 0) * max(scale, 1e-30):
            raise PruningError(
                f"the pruned network must compute what the model computes with k={k}, but differs "
                f"by up to {difference:.3g} where the outputs are up to {scale:.3g}. (If the "
                "weights have changed since plan_pruning, plan again.)"
            )


def _check_model_fits(cuts: list[Cut], tensors: Mapping[str, Tensor]) -> None:
    for cut in cuts:
        tensor = tensors.get(cut.name)
        if tensor is None or tensor.ndim <= cut.dim or tensor.shape[cut.dim] != cut.size:
            found = "none" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise PruningError(
                f"the plan cuts {cut.name!r} of size {cut.size} along dim {cut.dim}, and the model "
                f"has {found}"
            )


def _digest(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    plan = {key: value for key, value in record.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(
    path: str | os.PathLike[str],
) -> tuple[list[Cut], list[str], list[Fit], dict[str, Tensor]]:
    """The cuts, the biases that may have to be made, the layers to be fitted, and the tensors."""
    file_name = repr(os.fspath(path))
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise PruningError(f"{file_name} is not a whole safetensors file: {error}") from error
    if "taildropout" not in metadata:
        raise PruningError(f"{file_name} was not written by save_pruned: it holds no plan")
    try:
        record = json.loads(metadata["taildropout"])
        if record["format"] > FORMAT:
            raise PruningError(
                f"{file_name} has format {record['format']}, and this version of taildropout "
                f"reads up to {FORMAT}: update taildropout"
            )
        cuts = [Cut(name, dim, size, tuple(keep)) for name, dim, size, keep in record["cuts"]]
        if not all(0 <= index < cut.size for cut in cuts for index in cut.keep):
            raise ValueError("an index is out of range")
        biases = [str(name) for name in record["biases"]]
        fits = [Fit(str(name), int(width), int(size)) for name, width, size in record["fits"]]
        intact = record["sha256"] == _digest(record, tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise PruningError(f"{file_name} holds a damaged plan: {error!r}") from error
    if not intact:
        raise PruningError(f"{file_name} has been changed since it was written")
    return cuts, biases, fits, tensors
