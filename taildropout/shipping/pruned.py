"""Pruned networks as safetensors files, with the plan in the metadata."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..models.copies import PruningError, structural_copy, tensors_by_name
from ..models.sharded import check_whole_tensors
from ..pruning.configs import fit_configs
from ..pruning.cuts import Cut, Fit, Fold, Rescale, ToLinear
from ..pruning.plan import FORMAT, PrunePlan, check_model_fits
from ..pruning.surgery import operate
from .files import bytes_of, written_whole


def save_pruned(small: nn.Module, plan: PrunePlan, path: str | os.PathLike[str]) -> None:
    """Write a pruned model to a safetensors file, with the plan in its metadata.

    The file is written whole or not at all.

    Example:
        >>> import tempfile
        >>> from taildropout import TailDropout
        >>> from taildropout import plan_pruning
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
            and dtype. A config that it was built from is left as it is: the model gets another.
        path: a file by `save_pruned`.

    Returns:
        The model.

    Raises:
        PruningError: the file is damaged, from a newer version, not by `save_pruned`, or of
            another model, or the model is sharded over processes. The model is untouched then.
        FileNotFoundError: there is no such file.
    """
    check_whole_tensors(model)
    saved, tensors = _read(path)
    try:
        check_model_fits(saved.cuts, tensors_by_name(model))
        saved.cut(structural_copy(model), tensors)
    except (PruningError, AttributeError, KeyError) as error:
        raise PruningError(
            f"{os.fspath(path)!r} was pruned from another model than this one: {error}"
        ) from error
    before = structural_copy(model)
    saved.cut(model, tensors)
    model.load_state_dict(tensors)
    fit_configs(model, before)
    return model


@dataclass(frozen=True)
class SavedPlan:
    """What becomes of a model, but for the numbers in its tensors.

    `biases` are those that take in constants, and may have to be made.
    """

    cuts: list[Cut]
    biases: list[str]
    fits: list[Fit]
    rescales: list[Rescale]
    to_linears: list[ToLinear]

    @classmethod
    def of(cls, record: Mapping[str, Any], cuts: list[Cut]) -> "SavedPlan":
        """From what `PrunePlan.to_dict` made, with its cuts."""
        if not all(0 <= index < cut.size for cut in cuts for index in cut.keep):
            raise ValueError("an index is out of range")
        return cls(
            cuts,
            [str(name) for name in record["biases"]],
            [_fit(*values) for values in record["fits"]],
            [
                Rescale(tuple(map(str, names)), plus, module, eps, before, after)
                for names, plus, module, eps, before, after in record.get("rescales", [])
            ],
            [ToLinear(str(name), int(k)) for name, k in record.get("to_linears", [])],
        )

    def cut(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Cut a model in place, such that these tensors can be loaded into it.

        Raises:
            PruningError, AttributeError, KeyError: it is another model.
        """
        there = tensors_by_name(model)
        new = [name for name in self.biases if there.get(name) is None]
        folds = [Fold(name, torch.zeros_like(tensors[name])) for name in new]
        operate(model, self.cuts, folds, self.fits, self.rescales, self.to_linears)
        expected = {name: t.shape for name, t in model.state_dict().items()}
        found = {name: t.shape for name, t in tensors.items()}
        if expected != found:
            names = sorted(
                name for name in expected | found if expected.get(name) != found.get(name)
            )
            raise PruningError(f"these tensors differ: {', '.join(names[:5])}")


def _fit(
    name: str, width: int, size: int, arrives: int | None = None, behind: int | None = None
) -> Fit:
    known = [None if value is None else int(value) for value in (arrives, behind)]
    return Fit(str(name), int(width), int(size), *known)


def _digest(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    plan = {key: value for key, value in record.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(bytes_of(tensors[name]).numpy().data)
    return digest.hexdigest()


def _read(path: str | os.PathLike[str]) -> tuple[SavedPlan, dict[str, Tensor]]:
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
        saved = SavedPlan.of(record, cuts)
        intact = record["sha256"] == _digest(record, tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise PruningError(f"{file_name} holds a damaged plan: {error!r}") from error
    if not intact:
        raise PruningError(f"{file_name} has been changed since it was written")
    return saved, tensors
