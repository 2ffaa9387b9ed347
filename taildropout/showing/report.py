"""One page on which somebody explores a measured network: written once, opened anywhere."""

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..measuring.curve import Scree
from ..models.copies import PruningError
from ..models.inputs import Inputs, count_samples, first_samples
from ..models.sharded import check_whole_layers
from ..models.width import as_it_was, find_layer
from ..pruning.plan import plan_pruning
from ..shipping.files import written_whole
from .explore import explored, names_of

TEMPLATE = Path(__file__).with_name("report.html")
LIMIT = 8 * 10**6  # bytes of a page, of which plotly takes 5 million


def report(
    model: nn.Module | None,
    scree: Scree,
    inputs: Inputs | None,
    path: str | os.PathLike[str],
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
        model: the model that was measured, or None with inputs None: a scree alone.
        scree: a measurement of one of the model's layers, on held-out data.
        inputs: a batch of held-out samples: a tensor, a tuple or a dict, as the model takes it.
            The first 24 are shown, all others count for percentiles and classes.
        path: where to write, `report.html` say.
        labels: the class of each sample, a number or a name.
        contrast: two groups of classes by name, such as
            `{"shoes": ["sneaker", "boot"], "shirts": ["shirt", "coat"]}`, for a claim made before
            looking: how well does the first feature tell one group from the other?
        image_shape: (height, width) or (channels, height, width) of the images, one channel or
            three. None: what the inputs have, if they have three or four dims.
        tolerance: of `choose`, whose k the slider starts at.
        title: the heading.

    Raises:
        ValueError: a scree of other features than the first, inputs without a model or the
            reverse, a model without the measured layer,
            labels that don't fit the inputs, images that don't have the shape, a page of more
            than 8 MB, a model whose layers are sharded over processes.
        ImportError: plotly or pillow is missing.

    Example:
        >>> import tempfile
        >>> from taildropout import TailDropout
        >>> from taildropout import scree as measure
        >>> model = nn.Sequential(nn.Linear(4, 3), TailDropout(), nn.Linear(3, 2))
        >>> inputs, labels = torch.randn(50, 4), torch.arange(50) % 2
        >>> scree = measure(model, nn.CrossEntropyLoss(), [(inputs, labels)], progress=False)
        >>> path = Path(tempfile.mkdtemp()) / "report.html"
        >>> report(model, scree, inputs, path, labels=labels)
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
    if scree.features != "first":
        raise ValueError(
            'the page tells of the first k features: scree must be one with features="first", got '
            f"{scree.features!r}"
        )
    if (model is None) != (inputs is None):
        raise ValueError("model and inputs belong together: give both, or neither")
    if model is None and not (labels is None and image_shape is None):
        raise ValueError("labels and image_shape are those of inputs: give model and inputs too")
    if labels is None and contrast is not None:
        raise ValueError("contrast needs the labels of the inputs")
    page: dict[str, Any] = {"title": title, **_curve(scree, tolerance)}
    if model is not None and inputs is not None:
        name, layer = find_layer(model, scree.layer or None)
        check_whole_layers(model, "report")
        samples = count_samples(inputs)
        names = None if labels is None else names_of(labels, samples)
        with as_it_was(model), layer.using_k(None), torch.no_grad():
            page |= explored(model, layer, scree.ks, inputs, names, contrast, image_shape)
            page["costs"] = _costs(model, name, scree.ks, inputs)
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
        chosen, explanation = int(scree.choose(tolerance)), scree.explain(tolerance)
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


def _costs(model: nn.Module, layer: str, ks: list[int], inputs: Inputs) -> dict[str, Any]:
    """Parameters and FLOPs, per sample, of the model that is pruned to each k."""
    samples = min(count_samples(inputs), 2)
    example = first_samples(inputs, samples)
    try:
        first = plan_pruning(model, {layer: ks[0]}, example)
        plans = [first.at({layer: k}, check=False) for k in ks]
    except PruningError as error:
        return {"why_not": str(error)}
    return {
        "parameters": [plan.after.parameters for plan in plans],
        "flops": [plan.after.flops / samples for plan in plans],
        "stays": sorted({f"{stay.name} {stay.reason}" for plan in plans for stay in plan.stays}),
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: None stands for both."""
    return tree_map(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x, value)
