"""Looking into a network: its pictures at each k, its features one by one, its classes."""

import base64
import io
import math
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import TailDropout
from ..models.hooks import hooked
from ..models.inputs import (
    Inputs,
    call,
    count_samples,
    first_samples,
    repeat_first_sample,
    tensors_of,
)

SHOWN = 24  # pictures
FEATURES = 16  # features that get a panel
STEPS = 9  # values that the feature of a panel takes
OUTPUTS = 6  # outputs in a panel, where they are no picture
POINTS = 2000  # points in the scatter


def explored(
    model: nn.Module,
    layer: TailDropout,
    ks: Sequence[int],
    inputs: Inputs,
    names: list[str] | None,
    contrast: Mapping[str, Collection[Any]] | None,
    image_shape: tuple[int, ...] | None,
) -> dict[str, Any]:
    """What goes through one layer of a model in eval mode, as plain data for the page.

    Args:
        model: in eval mode, without gradients, and with no k set in the layer.
        layer: the one that is looked into.
        ks: at which there are pictures.
        inputs: the samples.
        names: of the class of each.
        contrast: as in `report`.
        image_shape: as in `report`.
    """
    features, outputs = _features(model, layer, inputs)
    page: dict[str, Any] = {}
    shape = _image_shape(inputs, outputs, image_shape)
    if shape is not None and isinstance(inputs, Tensor):
        shades = _Shades(shape, inputs)
        page["images"] = _images(model, layer, ks, inputs[:SHOWN], shades, names)
    else:
        shades = None
    if features.ndim != 2 or layer.dropout_dim not in (1, -1):
        page["panels"] = {
            "why_not": "Features that are maps or sequences have no single number to move."
        }
        return page
    page["panels"] = _panels(model, layer, inputs, features, shades)
    if names is not None and features.shape[1] > 0:
        page["scatter"] = _scatter(features, names, contrast)
    return page


def names_of(labels: Sequence[Any] | Tensor, count: int) -> list[str]:
    """The class of each sample as a text."""
    names = [str(label) for label in (labels.tolist() if isinstance(labels, Tensor) else labels)]
    if len(names) != count:
        raise ValueError(
            f"labels must be one for each of the {count} samples of inputs, got {len(names)}"
        )
    return names


def _features(model: nn.Module, layer: TailDropout, inputs: Inputs) -> tuple[Tensor, Any]:
    """What goes into the layer, and what comes out of the model."""
    seen: list[Tensor] = []
    with hooked({layer: lambda module, args: seen.append(args[0])}, before=True):
        outputs = call(model, inputs)
    if len(seen) != 1:
        raise ValueError(f"the model must call the layer once in each call, got {len(seen)} calls")
    return seen[0], outputs


def _outputs_at(model: nn.Module, layer: TailDropout, features: Tensor, inputs: Inputs) -> Any:
    """What comes out of the model when `features` come out of the layer, whatever went into it."""
    with hooked({layer: lambda module, args, output: features}):
        return call(model, inputs)


# --- pictures ---------------------------------------------------------------------------------


class _Shades:
    """Tensors to PNGs: the range of the inputs becomes black to white."""

    def __init__(self, shape: tuple[int, int, int], inputs: Tensor) -> None:
        self.shape = shape
        self.low = float(inputs.min())
        self.range = float(inputs.max()) - self.low or 1.0

    def strip(self, images: Tensor) -> str:
        """The images side by side, as a data URL."""
        from PIL import Image

        scaled = (images.detach().float().cpu() - self.low) / self.range
        grey = (255 * scaled.nan_to_num().clamp(0, 1)).round().to(torch.uint8)
        channels, height, width = self.shape
        grey = grey.reshape(-1, *self.shape).permute(2, 0, 3, 1)  # (height, image, width, channel)
        size = (grey.shape[1] * width, height)
        picture = Image.frombytes(
            "L" if channels == 1 else "RGB", size, bytes(grey.flatten().tolist())
        )
        file = io.BytesIO()
        picture.save(file, "png", optimize=True)
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _image_shape(
    inputs: Inputs, outputs: Any, shape: tuple[int, ...] | None
) -> tuple[int, int, int] | None:
    """(channels, height, width) if these are images with a reconstruction, else None."""
    given = shape is not None
    if shape is None and isinstance(inputs, Tensor) and inputs.ndim in (3, 4):
        shape = tuple(inputs.shape[1:])
    if shape is None:
        return None
    if len(shape) == 2:
        shape = (1, *shape)
    if (
        len(shape) == 3
        and shape[0] in (1, 3)
        and isinstance(inputs, Tensor)
        and isinstance(outputs, Tensor)
        and inputs[0].numel() == outputs[0].numel() == math.prod(shape)
    ):
        return (shape[0], shape[1], shape[2])
    if given:
        raise ValueError(
            "image_shape must be (height, width) or (channels, height, width) with 1 or 3 "
            f"channels, and each input and output one image of that size, got {shape} for "
            f"inputs of {_sizes(inputs)} and outputs of {_sizes(outputs)}"
        )
    return None


def _sizes(values: Any) -> str:
    return f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__


def _images(
    model: nn.Module,
    layer: TailDropout,
    ks: Sequence[int],
    images: Tensor,
    shades: _Shades,
    names: list[str] | None,
) -> dict[str, Any]:
    strips, errors = [], []
    for k in ks:
        with layer.using_k(k):
            outputs = call(model, images).reshape(images.shape)
        strips.append(shades.strip(outputs))
        errors.append((outputs - images).double().square().flatten(1).mean(1))
    return {
        "width": shades.shape[2],
        "height": shades.shape[1],
        "inputs": shades.strip(images),
        "outputs": strips,
        "errors": torch.stack(errors, 1).tolist(),  # (image, k)
        "names": None if names is None else names[: len(images)],
    }


# --- features ---------------------------------------------------------------------------------


def _panels(
    model: nn.Module, layer: TailDropout, inputs: Inputs, features: Tensor, shades: _Shades | None
) -> dict[str, Any]:
    """The outputs when one feature runs and the others stay at their medians."""
    samples = count_samples(inputs)
    middle = features.median(0).values
    if samples > 1 and not _outputs_are_of_features(model, layer, inputs, middle):
        return {
            "why_not": "The output depends on more than these features: something goes around "
            "the layer, so no feature can be moved by itself."
        }
    shown = min(features.shape[1], FEATURES)
    quantiles = torch.tensor([0.05, 0.95], dtype=torch.float64)
    values, swept = [], []
    example = repeat_first_sample(inputs, STEPS)
    for j in range(shown):
        low, high = features[:, j].double().cpu().quantile(quantiles).tolist()
        moved = middle.repeat(STEPS, 1)
        moved[:, j] = torch.linspace(low, high, STEPS, dtype=moved.dtype, device=moved.device)
        outputs = _outputs_at(model, layer, moved, example)
        if not isinstance(outputs, Tensor):
            return {"why_not": f"The model returns a {type(outputs).__name__}, not a tensor."}
        values.append(moved[:, j].tolist())
        swept.append(outputs.reshape(STEPS, -1))
    page: dict[str, Any] = {"n": features.shape[1], "values": values}
    if shades is not None:
        return page | {"strips": [shades.strip(outputs) for outputs in swept]}
    # Of many outputs, those that the features change most.
    change = torch.stack([outputs.amax(0) - outputs.amin(0) for outputs in swept]).amax(0)
    most = change.topk(min(OUTPUTS, len(change))).indices.sort().values
    return page | {
        "outputs": most.tolist(),
        "curves": [outputs[:, most].T.tolist() for outputs in swept],  # (feature, output, step)
    }


def _outputs_are_of_features(
    model: nn.Module, layer: TailDropout, inputs: Inputs, middle: Tensor
) -> bool:
    """Whether two different samples give one output once their features are the same."""
    outputs = _outputs_at(model, layer, middle.repeat(2, 1), first_samples(inputs, 2))
    return all(
        torch.allclose(output[0], output[1], rtol=1e-4, atol=1e-6)
        for output in tensors_of(outputs)
        if output.ndim
    )


def _scatter(
    features: Tensor, names: list[str], contrast: Mapping[str, Collection[Any]] | None
) -> dict[str, Any]:
    first = features[:, 0].double().cpu()
    second = features[:, 1].double().cpu() if features.shape[1] > 1 else torch.zeros_like(first)
    classes = sorted(set(names))
    members = {name: torch.tensor([name == other for other in names]) for name in classes}
    groups = []
    for name in classes:
        shown = members[name].clone()
        shown[POINTS:] = False
        groups.append({"name": name, "x": _rounded(first[shown]), "y": _rounded(second[shown])})
    page: dict[str, Any] = {"groups": groups, "one_feature": features.shape[1] == 1}
    if len(classes) > 1:
        pairs = {
            pair: separation(first[members[pair[0]]], first[members[pair[1]]])
            for pair in combinations(classes, 2)
        }
        page["pairs"] = {"count": len(pairs), "median": median(pairs.values())}
    if contrast is not None:
        page["contrast"] = _contrast(first, names, contrast)
    return page


def _contrast(
    first: Tensor, names: list[str], contrast: Mapping[str, Collection[Any]]
) -> dict[str, Any]:
    groups = {group: {str(label) for label in labels} for group, labels in contrast.items()}
    chosen = [first[[name in group for name in names]] for group in groups.values()]
    if len(groups) != 2 or any(len(values) == 0 for values in chosen):
        raise ValueError(
            "contrast must be two groups of labels that occur, "
            f"got {groups} for the labels {sorted(set(names))}"
        )
    return {
        "groups": list(groups),
        "members": [sorted(group) for group in groups.values()],
        "counts": [len(values) for values in chosen],
        "auc": separation(*chosen),
    }


def separation(a: Tensor, b: Tensor) -> float:
    """How well a number tells two groups apart: the area under the ROC curve, 0.5 to 1.

    The probability that a random member of one group has the larger number, ties counting half,
    in whichever direction is better: 0.5 is guessing, 1 is a threshold that makes no error.

    Example:
        >>> separation(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0]))
        0.875
    """
    ordered = b.sort().values
    below = torch.searchsorted(ordered, a, right=False)
    not_above = torch.searchsorted(ordered, a, right=True)
    area = float((below + not_above).double().sum()) / (2 * len(a) * len(b))
    return max(area, 1 - area)


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
