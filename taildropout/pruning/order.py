"""Rearranging the features of a trained network, its outputs unchanged: what matters comes first."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from ..graph.groups import Group, Symmetries, find_groups
from ..layers.fitted import FittedTailDropout
from ..measuring.per_sample import Loss
from ..models.copies import with_own_buffers
from ..models.inputs import Inputs, cuda_devices, first_samples, inputs_of, tensors_of, to_device
from ..models.insert import layers_that_fit, tail_dropouts
from ..models.names import name_in, unwrapped
from ..models.sharded import check_whole_tensors
from .cuts import Reading
from .importance import Batches, By, Importance, importances
from .rearrange import Move, can_turn, rearrange, rearranged_copy
from .verify import Verification, dtype_to_verify, verify

_VERIFIED_SAMPLES = 4  # of the first batch, with which the model is read, too


@dataclass(frozen=True, eq=False)
class OrderedPlace:
    """Features that are rearranged.

    Attributes:
        layers: the TailDropouts that hand them on.
        n: how many there are.
        multiple_of: these many in a row stay together, as those of a head.
        how: "rotation" or "permutation".
        why: what reads the features, or touches them.
        by: for each new feature its number before, `(n,)`; or the rotation, `(n, n)`, whose
            columns say what each new feature is of the old ones.
        before: how much of the measure the first half of the features had, in [0, 1].
        after: how much it has then.
    """

    layers: tuple[str, ...]
    n: int
    multiple_of: int
    how: str
    why: str
    by: torch.Tensor = field(repr=False)
    before: float
    after: float


@dataclass(frozen=True, eq=False, repr=False)
class OrderPlan:
    """How the features of a model are rearranged. Made by `plan_ordering`; printed, it is a table.

    Attributes:
        by: the measure.
        places: the features that are rearranged.
        left: the layers whose features are left as they are, and why.
        verifications: what `apply` compared, in which dtype, and what it could not compare.
    """

    by: str
    places: tuple[OrderedPlace, ...]
    left: dict[str, str]
    verifications: list[Verification]
    _moves: tuple[Move, ...]
    _reading: Reading

    def apply(self, model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
        """The model with its features rearranged, verified.

        Its outputs are compared with those of the model with no k set, on some of the data, on
        random inputs, and at other sizes where the model takes them; in float64 where it allows
        that and has no more than 2^25 parameters.

        Args:
            model: the one that the plan was made for, perhaps trained further.
            optimizer: what trains it. Then the model is changed in place, once a copy has been
                verified, with its gradients and all that the optimizer keeps of its parameters:
                training goes on as if the features had been in this order from the start. Of a
                rotation this holds for momentum (and so for SGD), and for Adam but for rounding
                of another kind: the mean squares of gradients are turned by the squared
                coefficients of the rotation, as if the gradients' entries were uncorrelated.

        Returns:
            A copy, without what wraps the model (a compiler, DistributedDataParallel), the model
            left untouched; with an optimizer, the model itself.

        Raises:
            PruningError: outputs differ by more than rounding, or the model is not the one that
                the plan was made for. Nothing has changed then.
            ValueError: the optimizer holds no parameter of the model, or keeps tensors of other
                shapes than its parameters have, or something that a rotation can't turn. Nothing
                has changed then.
        """
        inner = unwrapped(model)
        check_whole_tensors(inner)
        with _at_full_width(inner):
            ordered = rearranged_copy(inner, self._moves)
            self.verifications.append(
                verify(
                    inner,
                    ordered,
                    lambda precise: rearranged_copy(precise, self._moves),
                    {},
                    self._reading.example_inputs,
                    self._reading.flow.paths.other_inputs(),
                    dtype=dtype_to_verify(inner),
                    made="ordered",
                )
            )
        if optimizer is not None:
            rearrange(inner, self._moves, optimizer)
            return model
        for name, layer in tail_dropouts(ordered).items():
            layer.set_k(tail_dropouts(inner)[name].k)
        return ordered

    def __repr__(self) -> str:
        rows = [("layer", "features", "rearranged by", "first half before", "after", "since")]
        for place in self.places:
            blocks = f" in blocks of {place.multiple_of}" if place.multiple_of > 1 else ""
            rows.append(
                (
                    place.layers[0] + (f" and {m} more" if (m := len(place.layers) - 1) else ""),
                    f"{place.n:,}",
                    f"{place.how}{blocks}" if place.how == "permutation" else place.how,
                    f"{place.before:.0%}",
                    f"{place.after:.0%}",
                    place.why,
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"by {self.by}: how much of it the first half of the features has"]
        for row in rows:
            padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
        lines += [f"left as it is, {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def plan_ordering(
    model: nn.Module,
    data: Iterable[Any],
    *,
    loss: Loss | None = None,
    by: By = "variance",
    layer: str = "*",
    rotate: bool = True,
    samples: int | None = None,
    device: torch.device | str | None = None,
) -> OrderPlan:
    """Find out how to rearrange the features of a model, its outputs unchanged.

    The features are those of the model's TailDropouts: written ones, or of `nest` and `insert`. A
    network that was trained without them has its features in no order; rearranged, what matters
    comes first, which is where a short training with the layers then starts.

    Where only linear maps write and read the features (the bottleneck of an autoencoder), they are
    turned onto their principal components, and the rotation is folded into the weights around.
    Elsewhere they are permuted, with all that goes along: rows and columns of weights, biases,
    entries of BatchNorm and depthwise convolutions, channels behind a flatten, whole heads with
    their keys and values. `multiple_of` of the layer says what stays together; more does where the
    network has larger groups. Several layers of the same features, as on a residual stream, have
    one order. Features that the model gets or returns, and those that something takes by their
    number or mixes (LayerNorm over them), are left as they are: the plan says why.

    Args:
        model: in any mode; it is left untouched, and measured in eval mode with no k in force.
        data: yields `(inputs, target)` as in `scree`, or, where no loss is needed, inputs alone (a
            tuple or list of two is a pair). Training data is fine.
        loss: as in `scree`; for "saliency" and "greedy".
        by: what counts.

            - "variance": the mean square of the feature times the squared norm of the weights that
              read it, which is the mean square of what it adds there. Of components, the mean
              square. One run over the data.
            - "saliency": half the mean square, over samples, of activation times gradient (summed
              over positions): to second order, what the loss rises by without the feature. One run
              with gradients, and one more where features are turned.
            - "greedy": the loss itself. From none on, those features are added with which it is
              smallest: in each round it is measured with each of the features that remain, and
              the best eighth of them is taken. About eight runs over the data, from the layer on,
              for each feature of each layer: use `samples`.
        layer: qualified name of the layer, or a pattern, with `*`, `?` and `[...]` as in a shell,
            or "re:...".
        rotate: turn features where that is possible; False permutes everywhere.
        samples: stop after so many, rounded up to whole batches. None: all data.
        device: where the batches are moved to. None: the device of the model's parameters.

    Source: of saliency, Theis, Korshunova, Tejani and Huszar, Faster gaze prediction with dense
    networks and Fisher pruning (2018), arXiv 1801.05787.

    Raises:
        PruningError: the model can't be exported, or is sharded over processes.
        ValueError: no TailDropout that fits, another word for `by`, no loss where one is needed, no
            data, data that can be gone through once only where it is gone through more often,
            features that are not finite.
        TypeError: the loss does not give one value per sample.

    Example:
        >>> from taildropout import TailDropout
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), TailDropout(), nn.Linear(8, 2))
        >>> plan = plan_ordering(model, [torch.randn(64, 4)])
        >>> [(place.layers, place.how) for place in plan.places]
        [(('2',), 'permutation')]
        >>> plan.places[0].after > plan.places[0].before
        True
        >>> ordered, x = plan.apply(model), torch.randn(3, 4)
        >>> torch.allclose(ordered.eval()(x), model.eval()(x), atol=1e-6)
        True
    """
    inner = unwrapped(model)
    names = _checked(inner, layer, by, loss, samples)
    check_whole_tensors(inner)
    if device is None:
        device = next((parameter.device for parameter in inner.parameters()), None)
    # Data that are shuffled draw random numbers, too.
    with torch.random.fork_rng(devices=cuda_devices(inner)), _at_full_width(inner):
        data, first = _with_first(data, again=by != "variance")
        reading = Reading(inner, _few(to_device(inputs_of(first), device)))
        groups, left = _groups(reading, names, rotate)
        probe, batches = with_own_buffers(inner).eval(), Batches(data, device, samples)
        found = importances(probe, groups, batches, by, loss) if groups else []
    symmetries = Symmetries(reading.flow, reading.say, reading.norms)
    moves = [
        move
        for group, one in zip(groups, found, strict=True)
        for move in _moves(reading, symmetries, group, one)
    ]
    places = tuple(_place(*pair) for pair in zip(groups, found, strict=True))
    return OrderPlan(by, places, left, [], tuple(moves), reading)


def order(
    model: nn.Module,
    data: Iterable[Any],
    *,
    loss: Loss | None = None,
    by: By = "variance",
    layer: str = "*",
    optimizer: Optimizer | None = None,
    rotate: bool = True,
    samples: int | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """The model with its features rearranged, what matters first, and its outputs unchanged.

    `plan_ordering` and `OrderPlan.apply` in one; see there for arguments and errors. A copy, or
    with an `optimizer` the model itself, changed in place with all that the optimizer keeps.

    Example:
        >>> from taildropout import TailDropout
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 3), TailDropout(), nn.Linear(3, 4))
        >>> x = torch.randn(64, 4)
        >>> ordered = order(model, [x])
        >>> features = ordered[0](x)  # principal components
        >>> gram = features.T @ features
        >>> torch.allclose(gram, gram.diagonal().diag(), atol=1e-4)
        True
    """
    plan = plan_ordering(
        model,
        data,
        loss=loss,
        by=by,
        layer=layer,
        rotate=rotate,
        samples=samples,
        device=device,
    )
    return plan.apply(model, optimizer)


def order_in_place(
    model: nn.Module, optimizer: Optimizer, data: Iterable[Any], **options: Any
) -> str:
    """As a training wants it: turned only where the optimizer's state can be; what was done."""
    plan = plan_ordering(model, data, rotate=can_turn(optimizer), **options)
    plan.apply(model, optimizer)
    return str(plan)


def check_orderable(
    model: nn.Module, data: Iterable[Any], loss: Loss | None, by: By, samples: int | None
) -> None:
    """Whether the model can be ordered by these data later: raises what `plan_ordering` raises."""
    with torch.random.fork_rng(devices=cuda_devices(model)):
        iterator = iter(data)
        if iterator is data:
            raise ValueError(
                "data is gone through later: pass a list or DataLoader, got a "
                f"{type(data).__name__} that can be gone through once"
            )
        first = list(islice(iterator, 1))
    by = by if loss is None else "saliency"  # which also runs the loss, and is fast
    plan_ordering(model, first, loss=loss, by=by, samples=samples)


def _checked(
    model: nn.Module, layer: str, by: str, loss: Loss | None, samples: int | None
) -> list[str]:
    """The names of the layers."""
    if by not in get_args(By):
        raise ValueError(f"by must be one of {get_args(By)}, got {by!r}")
    if by != "variance" and loss is None:
        raise ValueError(f'by="{by}" needs a loss: pass loss=, as in scree, and pairs as data')
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    names = list(layers_that_fit(model, layer))
    if not names:
        raise ValueError(
            f"layer must fit TailDropout layers of the model, {sorted(tail_dropouts(model))}, got "
            f"{layer!r}: put them where features are to be rearranged, with nest or insert"
        )
    return names


def _with_first(data: Iterable[Any], again: bool) -> tuple[Iterable[Any], Any]:
    """The data, and their first batch, which of a generator is not lost."""
    iterator = iter(data)
    once = iterator is data
    if once and again:
        raise ValueError(
            "data is gone through several times, unless by is variance: pass a list or DataLoader, "
            f"got a {type(data).__name__} that can be gone through once"
        )
    first = next(iterator, None)
    if first is None:
        raise ValueError("data must yield at least one batch, got none (a used-up generator?)")
    return (_chained(first, iterator) if once else data), first


def _chained(first: Any, others: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from others


def _few(inputs: Inputs) -> Any:
    """The first samples, where all tensors have as many."""
    sizes = {len(tensor) for tensor in tensors_of(inputs) if tensor.ndim}
    return first_samples(inputs, _VERIFIED_SAMPLES) if len(sizes) == 1 else inputs


@contextmanager
def _at_full_width(model: nn.Module) -> Iterator[None]:
    """Inside no layer has a k or a width; outside they have what they had."""
    with ExitStack() as stack:
        for layer in tail_dropouts(model).values():
            stack.enter_context(layer.using_width(None))
        yield


def _groups(reading: Reading, names: list[str], rotate: bool) -> tuple[list[Group], dict[str, str]]:
    flow, left = reading.flow, dict[str, str]()
    for name in names:
        if name not in flow.n:
            left[name] = "the model does not call it with one number of features"
        elif isinstance(flow.layers[name], FittedTailDropout):
            left[name] = "it was pruned, and fits other features"
        elif name in flow.tail_linears.values() and _has_tail_bias(reading, name):
            left[name] = "its TailLinear has a trained bias for each number of the first features"
    called = [name for name in names if name not in left]
    groups, others = find_groups(flow, reading.say, reading.norms, called)
    if not rotate:
        groups = [replace(group, turns=None) for group in groups]
    return groups, left | others


def _has_tail_bias(reading: Reading, name: str) -> bool:
    (linear,) = (own for own, layer in reading.flow.tail_linears.items() if layer == name)
    tail_bias: Any = reading.model.get_submodule(linear).tail_bias
    return bool(tail_bias.any())


def _moves(
    reading: Reading, symmetries: Symmetries, group: Group, found: Importance
) -> Iterator[Move]:
    flow = reading.flow
    moves: list[Move] = []
    if found.by.ndim == 2:
        assert group.turns is not None
        moves = [Move(names, dim, found.by) for names, dim in group.turns]
    else:
        carried = symmetries.carried(group.layers[0], found.by)
        moves = [
            Move(tuple(flow.names[node]), dim, order)
            for (node, dim), order in carried.items()
            if flow.names.get(node)
        ]
    yield from moves
    for linear in flow.tail_linears:  # tail_bias has the outputs of the weight, in no dataflow
        for move in moves:
            if name_in(linear, "weight") in move.names and move.dim == 0:
                yield Move((name_in(linear, "tail_bias"),), 1, move.by)


def _place(group: Group, found: Importance) -> OrderedPlace:
    turned = found.by.ndim == 2
    readers = list(dict.fromkeys(name.rpartition(".")[0] or name for name, _, _ in group.readers))
    read = f"read by {', '.join(readers[:2])}{' and others' if readers[2:] else ''}"
    if turned:
        why = f"only linear maps touch them; {read}"
    else:
        why = read if readers else "read by no weight alone"
    return OrderedPlace(
        group.layers,
        group.n,
        group.multiple_of,
        "rotation" if turned else "permutation",
        why,
        found.by,
        found.before,
        found.after,
    )
