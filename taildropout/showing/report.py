"""One page on which somebody explores a measured network: written once, opened anywhere."""

import base64
import io
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..layers import TailDropout
from ..measuring.curve import Scree
from ..models.copies import PruningError
from ..models.inputs import Inputs, call, count_samples, first_samples
from ..models.insert import tail_dropouts
from ..models.width import as_it_was
from ..pruning.plan import plan_pruning
from ..shipping.files import written_whole

TEMPLATE = Path(__file__).with_name("report.html")
LIMIT = 8 * 10**6  # bytes of a page, of which plotly takes 5 million
SHOWN = 24  # pictures
FEATURES = 16  # features that get a panel
STEPS = 9  # values that the feature of a panel takes
OUTPUTS = 6  # outputs in a panel, where they are no picture
POINTS = 2000  # points in the scatter


def report(
    path: str | os.PathLike[str],
    scree: Scree,
    model: nn.Module | None = None,
    inputs: Inputs | None = None,
    *,
    labels: Sequence[Any] | Tensor | None = None,
    contrast: Mapping[str, Collection[Any]] | None = None,
    image_shape: tuple[int, ...] | None = None,
    tolerance: float = 0.01,
    title: str = "One network, every width",
) -> None:
    """Write a page with a slider for k. It needs no network when it is opened, and no server.

    What is on it depends on what is given:

    - a scree alone: the loss at every k, its standard error, and the k that `choose` picks;
    - model and inputs: parameters and FLOPs of the network pruned to k (or why it can't be
      pruned), and a panel per feature: what the output does when that feature alone runs from its
      5th to its 95th percentile, with all others at their medians;
    - inputs that are images, of a model whose outputs have their size: the reconstructions from
      the first k features, and the squared error of each image by k;
    - labels: the first two features as a scatter in the colours of the classes, and how well the
      first feature alone tells classes apart.

    The model is run in eval mode without gradients and comes back in the state that it was in.
    Counting parameters and FLOPs takes about half a second for each k. The same arguments give
    the same file, which is written whole or not at all.

    Args:
        path: where to write, `report.html` say.
        scree: a measurement of one of the model's layers, on held-out data.
        model: the model that was measured.
        inputs: a batch of held-out samples: a tensor, a tuple or a dict, as the model takes it.
            The first 24 are shown, all others count for percentiles and classes.
        labels: the class of each sample, a number or a name.
        contrast: two groups of classes by name, such as
            `{"shoes": ["sneaker", "boot"], "shirts": ["shirt", "coat"]}`, for a claim made before
            looking: how well does the first feature tell one group from the other?
        image_shape: (height, width) or (channels, height, width) of the images, one channel or
            three. None: what the inputs have, if they have three or four dims.
        tolerance: of `choose`, whose k the slider starts at.
        title: the heading.

    Raises:
        ValueError: inputs without a model or the reverse, a model without the measured layer,
            labels that don't fit the inputs, images that don't have the shape, a page of more
            than 8 MB.
        ImportError: plotly or pillow is missing.

    Example:
        >>> import tempfile
        >>> from taildropout import TailDropout
        >>> from taildropout import scree as measure
        >>> model = nn.Sequential(nn.Linear(4, 3), TailDropout(), nn.Linear(3, 2))
        >>> inputs, labels = torch.randn(50, 4), torch.arange(50) % 2
        >>> scree = measure(model, nn.CrossEntropyLoss(), [(inputs, labels)], progress=False)
        >>> path = Path(tempfile.mkdtemp()) / "report.html"
        >>> report(path, scree, model, inputs, labels=labels)
        >>> path.read_text(encoding="utf-8").startswith("<!doctype html>")
        True
    """
    try:
        import PIL.Image  # noqa: F401
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(
            "report needs plotly and pillow: pip install 'taildropout[report]'"
        ) from error
    if (model is None) != (inputs is None):
        raise ValueError("model and inputs belong together: give both, or neither")
    if model is None and not (labels is None and image_shape is None):
        raise ValueError("labels and image_shape are those of inputs: give model and inputs too")
    if labels is None and contrast is not None:
        raise ValueError("contrast needs the labels of the inputs")
    page: dict[str, Any] = {"title": title, **_curve(scree, tolerance)}
    if model is not None and inputs is not None:
        names = None if labels is None else _names(labels, count_samples(inputs))
        page |= _explored(scree, model, inputs, names, contrast, image_shape)
    html = TEMPLATE.read_text(encoding="utf-8")
    # "<" would end the script that holds the data; in JSON it stands in strings only.
    data = json.dumps(_finite(page), allow_nan=False, sort_keys=True).replace("<", "\\u003c")
    html = html.replace("@DATA@", data).replace("@PLOTLY@", get_plotlyjs())
    if len(html.encode()) > LIMIT:
        raise ValueError(
            f"the page must stay below {LIMIT / 1e6:.0f} MB, got {len(html.encode()) / 1e6:.1f}: "
            "give fewer or smaller images, or a scree of fewer ks"
        )
    with written_whole(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def _curve(scree: Scree, tolerance: float) -> dict[str, Any]:
    try:
        chosen, explanation = scree.choose(tolerance), scree.explain(tolerance)
    except ValueError as error:  # one sample, or losses that are not finite
        if scree.loss.isfinite().all() and scree.count > 1:
            raise
        chosen, explanation = scree.ks[-1], f"No k is chosen: {error}."
    return {
        "layer": scree.layer,
        "ks": scree.ks,
        "loss": scree.loss.tolist(),
        "stderr": scree.stderr.tolist(),
        "count": scree.count,
        "chosen": chosen,
        "explanation": explanation,
    }


def _explored(
    scree: Scree,
    model: nn.Module,
    inputs: Inputs,
    names: list[str] | None,
    contrast: Mapping[str, Collection[Any]] | None,
    image_shape: tuple[int, ...] | None,
) -> dict[str, Any]:
    """Everything that is found out by running the model."""
    layers = tail_dropouts(model)
    if scree.layer not in layers:
        raise ValueError(
            f"model must have the layer that was measured, {scree.layer!r}, got a model with "
            f"{sorted(layers)}"
        )
    layer = layers[scree.layer]
    with as_it_was(model, layer), torch.no_grad():
        features, outputs = _features(model, layer, inputs)
        page: dict[str, Any] = {"costs": _costs(model, scree, inputs)}
        shape = _image_shape(inputs, outputs, image_shape)
        if shape is not None and isinstance(inputs, Tensor):
            shades = _Shades(shape, inputs)
            page["images"] = _images(model, layer, scree.ks, inputs[:SHOWN], shades, names)
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


def _names(labels: Sequence[Any] | Tensor, count: int) -> list[str]:
    names = [str(label) for label in (labels.tolist() if isinstance(labels, Tensor) else labels)]
    if len(names) != count:
        raise ValueError(
            f"labels must be one for each of the {count} samples of inputs, got {len(names)}"
        )
    return names


def _features(model: nn.Module, layer: TailDropout, inputs: Inputs) -> tuple[Tensor, Any]:
    """What goes into the layer, and what comes out of the model."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        outputs = call(model, inputs)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ValueError(f"the model must call the layer once in each call, got {len(seen)} calls")
    return seen[0], outputs


@contextmanager
def _fed_with(layer: TailDropout, features: Tensor) -> Iterator[None]:
    """Whatever goes into the layer, `features` come out of it."""
    handle = layer.register_forward_hook(lambda module, args, output: features)
    try:
        yield
    finally:
        handle.remove()


def _costs(model: nn.Module, scree: Scree, inputs: Inputs) -> dict[str, Any]:
    """Parameters and FLOPs, per sample, of the model that is pruned to each k."""
    samples = min(count_samples(inputs), 2)
    example = first_samples(inputs, samples)
    try:
        plans = [plan_pruning(model, {scree.layer: k}, example) for k in scree.ks]
    except PruningError as error:
        return {"why_not": str(error)}
    return {
        "parameters": [plan.after.parameters for plan in plans],
        "flops": [plan.after.flops / samples for plan in plans],
        "stays": sorted({f"{stay.name} {stay.reason}" for plan in plans for stay in plan.stays}),
    }


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
    ks: list[int],
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
    example = tree_map(
        lambda leaf: leaf[:1].expand(STEPS, *leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf,
        inputs,
    )
    for j in range(shown):
        low, high = features[:, j].double().cpu().quantile(quantiles).tolist()
        moved = middle.repeat(STEPS, 1)
        moved[:, j] = torch.linspace(low, high, STEPS, dtype=moved.dtype, device=moved.device)
        with _fed_with(layer, moved):
            outputs = call(model, example)
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
    with _fed_with(layer, middle.repeat(2, 1)):
        outputs = call(model, first_samples(inputs, 2))
    return all(
        torch.allclose(leaf[0], leaf[1], rtol=1e-4, atol=1e-6)
        for leaf in tree_leaves(outputs)
        if isinstance(leaf, Tensor) and leaf.ndim
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


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: None stands for both."""
    return tree_map(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x, value)
