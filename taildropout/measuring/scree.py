"""Measuring loss(k): how much each further feature is worth, on held-out data."""

from collections.abc import Iterable, Sequence, Sized
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..functional.checks import check_k_at_most
from ..layers import TailDropout
from ..models.inputs import Inputs, pair_of, to_device
from ..models.names import is_pattern
from ..models.sharded import check_whole_layers
from ..models.width import (
    Width,
    as_it_was,
    check_ks,
    check_widths,
    features_of,
    find_layer,
    k_at,
    matched_layers,
)
from .at_once import Losses
from .curve import Scree
from .cuts import Cut, Features, First, Principal, Random, check_features
from .moments import Moments, of_all_processes
from .per_sample import Loss, per_sample
from .vmapped import quiet


def scree(
    model: nn.Module,
    loss: Loss,
    data: Iterable[tuple[Inputs, Any]],
    *,
    layer: str | None = None,
    ks: Iterable[Width] | None = None,
    features: Features = "first",
    device: torch.device | str | None = None,
    progress: bool = True,
    memory: int = 2**30,
) -> Scree:
    """Measure the loss for each prefix length k of one TailDropout layer, or each width of several.

    The model is run in eval mode without gradients, and comes back in the state that it was in:
    modes, ks, and the state of torch's random generator, also after an exception or Ctrl-C.

    What does not depend on k runs once for each batch: the part of the model before the layer,
    and what passes the layer by. The rest runs under `torch.vmap`, for a chunk of the ks at once.
    Where a single `nn.Linear` reads the layer, its outputs for all ks are one running sum. On the
    first batch this is checked against plain runs with `set_k`; where it does not agree or can't
    run, the ks run one by one from the layer on, and a warning says why.

    Under `torch.distributed` each process passes its own share of the data, all must take part,
    and all get the same result. Of a DistributedDataParallel pass `model.module`: the wrapper
    itself talks to the other processes in each call, and shares need not have as many batches.

    Args:
        model: a model with a TailDropout layer. Other TailDropout layers keep the k that is
            set, or pass everything.
        loss: `loss(output, target)` must give one value per sample. A torch loss module with a
            `reduction` is used with `reduction="none"` and averaged over the sample's other dims.
        data: yields `(inputs, target)`, where inputs is a tensor (`model(inputs)`), a tuple
            (`model(*inputs)`) or a dict (`model(**inputs)`). Held-out data: on the training
            data every further feature seems to help.
        layer: qualified name of the layer, needed if there are several. Or a pattern, with `*`,
            `?` and `[...]` as in a shell, or "re:...": all layers that it fits are measured at
            one width, `ks` are fractions in (0, 1] (None: 0, 1/32, ..., 1), and so is what
            `choose` returns. `"*"` is the whole network.
        ks: the ks to measure, ints or fractions of n in (0, 1]. None: all of 0, ..., n up to
            n = 256, else 0, n and up to 128 sizes spaced geometrically. The largest is what
            `choose` compares with, so include n.
        features: which of the n features the k are, for comparison:

            - "first": those that the layer keeps.
            - "random": k in a random order, the same at each k and in each call: what any k are
              worth.
            - "principal": the mean of the features, and what their first k principal components
              have of the rest: the k directions in which they vary most. The data are gone
              through twice, first for the components, so pass no generator.

            At k = n all three are the whole network. The last two need no training with the
            layer: insert it into any trained network. They are no ks to prune to.
        device: where the batches are moved to. None: the device of the model's parameters.
        progress: show a progress bar.
        memory: bytes that the activations of a chunk of ks may take, about.

    Source: of the projection on principal components, m + V_k V_k' (x - m), Pearson, On lines and
    planes of closest fit to systems of points in space (1901); of the first features as its
    nonlinear counterpart, Rippel, Gelbart and Adams, Learning ordered representations with nested
    dropout (2014).

    Raises:
        ValueError: no TailDropout layer, several and none named, a layer that the model does not
            call, no data, a k outside 0, ..., n, a fraction outside (0, 1], a loss with class
            weights or ignored targets, a generator where the data are gone through twice, a model
            whose layers are sharded over processes.
        TypeError: the loss does not give one value per sample; the message says how to mend it.

    Example:
        >>> from taildropout import TailDropout
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 3), TailDropout(), nn.Linear(3, 2))
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(5)]
        >>> s = scree(model, nn.MSELoss(), batches, progress=False)
        >>> s.layer, s.ks, s.count
        ('1', [0, 1, 2, 3], 40)
    """
    together = is_pattern(layer)
    layers = matched_layers(model, str(layer)) if together else dict([find_layer(model, layer)])
    name = str(layer) if together else next(iter(layers))
    check_whole_layers(model, "scree")
    per_sample_loss = per_sample(loss)
    chosen: Sequence[float] | None = None
    if together:
        chosen = _WIDTHS if ks is None else check_widths(ks, name)
    elif ks is not None:
        chosen = check_ks(ks, name, layers[name].multiple_of)
    check_features(features, data)
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), None)
    total = len(data) if isinstance(data, Sized) else None
    moments: Moments | None = None
    with ExitStack() as stack:
        stack.enter_context(as_it_was(model))
        for swept in layers.values():
            stack.enter_context(swept.using_width(None))
        stack.enter_context(quiet())
        stack.enter_context(torch.no_grad())
        components: dict[TailDropout, Principal] = {}
        if features == "principal":
            components = Principal.of_each(model, layers.values(), data, device)
        bar = tqdm(data, desc="scree", total=total, disable=not progress)
        batches = (to_device(pair_of(batch), device) for batch in bar)
        first = next(batches, None)
        if first is not None:
            n_of = features_of(model, layers, first[0])
            if not together:
                chosen = _ks_of_one(chosen, *next(iter(n_of.items())))
            assert chosen is not None
            grid = [
                {swept: k_at(w, n, swept.multiple_of) for swept, n in n_of.items()} for w in chosen
            ]
            cuts = {
                swept: components.get(swept) or _cut(features, swept, n)
                for swept, n in n_of.items()
            }
            words = f"layers {name!r}" if together else f"layer {name!r}"
            losses = Losses(model, per_sample_loss, words, cuts, memory)
            moments = Moments(len(grid))
            for inputs, target in chain([first], batches):
                moments.add(losses.of(inputs, target, grid))
    chosen, moments = of_all_processes(chosen, moments)
    if moments is None or chosen is None or moments.count == 0:
        raise ValueError("data must yield at least one sample, got none (a used-up generator?)")
    return Scree(name, list(chosen), moments.mean, moments.count, moments.covariance(), features)


_WIDTHS = [i / 32 for i in range(33)]  # of several layers, by default


def _cut(features: Features, layer: TailDropout, n: int) -> Cut:
    return Random(layer.dropout_dim, n) if features == "random" else First(layer.dropout_dim)


def _ks_of_one(widths: Sequence[float] | None, layer: TailDropout, n: int) -> list[int]:
    """What was asked for, or the default, as numbers of the features of one layer."""
    m = layer.multiple_of
    if widths is None:
        return [m * k for k in _default_ks(n // m)]
    ks = sorted({k_at(w, n, m) for w in widths})
    check_k_at_most(ks[-1], n)
    return ks


def _default_ks(n: int) -> list[int]:
    if n <= 256:
        return list(range(n + 1))
    spaced = torch.logspace(0, torch.tensor(n).log2().item(), 128, base=2, dtype=torch.float64)
    return sorted({0, n, *spaced.round().long().tolist()})
