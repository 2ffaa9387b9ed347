"""How much features matter, and in which order: by their size, by the loss's gradient, by the loss."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..functional.checks import as_dims
from ..graph.groups import Group
from ..layers import TailDropout
from ..measuring.at_once import Losses
from ..measuring.cuts import keep_some
from ..measuring.moments import sum_of_all_processes
from ..measuring.per_sample import Loss, per_sample
from ..measuring.vmapped import quiet
from ..models.hooks import hooked
from ..models.inputs import Inputs, call, count_samples, inputs_of, pair_of, to_device

By = Literal["variance", "saliency", "greedy"]

TAKEN_AT_ONCE = 8  # of the features that remain, greedy takes one in so many in each round


@dataclass(frozen=True, eq=False)
class Importance:
    """The order of a group of features.

    Attributes:
        by: for each new feature its number before, `(n,)`; or a rotation, `(n, n)`, whose columns
            say what each new feature is of the old ones.
        before: how much of the measure the first half of the features has, in [0, 1].
        after: the same in the new order.
    """

    by: Tensor
    before: float
    after: float


class Batches:
    """The data, as often as it is gone through, on one device, up to a number of samples."""

    def __init__(self, data: Iterable[Any], device: Any, samples: int | None) -> None:
        self.data, self.device, self.samples = data, device, samples

    def inputs(self) -> Iterator[Inputs]:
        yield from (to_device(inputs_of(batch), self.device) for batch in self._enough(inputs_of))

    def pairs(self) -> Iterator[tuple[Inputs, Any]]:
        for batch in self._enough(lambda batch: pair_of(batch)[0]):
            yield to_device(pair_of(batch), self.device)

    def _enough(self, inputs: Callable[[Any], Inputs]) -> Iterator[Any]:
        seen = 0
        for batch in self.data:
            yield batch
            if self.samples is not None:
                seen += count_samples(inputs(batch))
                if seen >= self.samples:
                    return


def importances(
    model: nn.Module, groups: Sequence[Group], batches: Batches, by: By, loss: Loss | None
) -> list[Importance]:
    """Of each group; the model is one that may be run in eval mode, with no k set.

    Under `torch.distributed` the data of all processes count, and all get the same.

    Raises:
        ValueError: no data, or features that are not finite.
    """
    sizes = _Sizes(model, groups)
    if by == "variance" or any(group.turns for group in groups):
        with torch.no_grad():
            sizes.add(batches)
    axes = [sizes.axes(group) if group.turns else None for group in groups]
    if by == "variance":
        return [sizes.importance(group, own) for group, own in zip(groups, axes, strict=True)]
    assert loss is not None
    if by == "saliency":
        return _by_saliency(model, groups, axes, batches, per_sample(loss))
    return [
        _by_greed(model, group, own, batches, per_sample(loss))
        for group, own in zip(groups, axes, strict=True)
    ]


def _importance(
    group: Group, axes: Tensor | None, before: Tensor, after: Tensor | None = None
) -> Importance:
    """By scores of the features before a rotation and after it, `(n,)`."""
    scores = before if after is None else after
    if not (before.isfinite().all() and scores.isfinite().all()):
        raise ValueError(f"the features of layer {group.layers[0]!r} must be finite numbers")
    order = _in_blocks(scores.view(-1, group.multiple_of).sum(1), group.multiple_of)
    return Importance(
        order if axes is None else axes[:, order],
        _of_first_half(before, group),
        _of_first_half(scores[order], group),
    )


def _in_blocks(scores: Tensor, multiple_of: int) -> Tensor:
    """The features by falling scores of their blocks."""
    blocks = scores.sort(descending=True, stable=True).indices
    return (blocks[:, None] * multiple_of + torch.arange(multiple_of)).flatten()


def half_of(group: Group) -> int:
    return math.ceil(group.n / group.multiple_of / 2) * group.multiple_of


def _of_first_half(scores: Tensor, group: Group) -> float:
    total = float(scores.sum())
    return float(scores[: half_of(group)].sum()) / total if total > 0 else 1.0


def _last(features: Tensor, dim: int) -> Tensor:
    """In at least float32, the features along the last dim."""
    return features.movedim(dim, -1).to(torch.promote_types(features.dtype, torch.float32))


# ------------------------------------------------------------------------------- by their size


class _Sizes:
    """Mean products of features, of those that may be turned with each other, else with themselves.

    A feature's score is its mean square times the squared norm of the weights that read it: the
    mean square of what it adds to what comes next. Of features that are turned the components are
    taken, eigenvectors of their mean products (not around their mean, since what is dropped is
    zero), by falling eigenvalue.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.model, self.groups = model, groups
        self.products: dict[str, Tensor] = {}
        self.count = 0

    def add(self, batches: Batches) -> None:
        layers = _layers(self.model, self.groups)
        turns = {name for group in self.groups if group.turns for name in group.layers}

        def look(name: str) -> Callable[..., None]:
            def add(layer: TailDropout, args: Any, output: Tensor) -> None:
                features = _last(output, layer.dropout_dim).flatten(0, -2)
                products = features.T @ features if name in turns else features.square().sum(0)
                products = products.double().cpu()
                self.products[name] = self.products.get(name, 0.0) + products

            return add

        with hooked({layer: look(name) for name, layer in layers.items()}):
            for inputs in batches.inputs():
                call(self.model, inputs)
                self.count += 1
        self.count = int(sum_of_all_processes(torch.tensor(self.count)))
        if self.count == 0:
            raise ValueError("data must yield at least one batch, got none (a used-up generator?)")
        self.products = {name: sum_of_all_processes(p) for name, p in self.products.items()}

    def of(self, group: Group) -> Tensor:
        return torch.stack([self.products[name] for name in group.layers]).sum(0)

    def axes(self, group: Group) -> Tensor:
        """In the columns, largest eigenvalue first; of each the largest entry is positive."""
        products = self.of(group)
        if not products.isfinite().all():
            raise ValueError(f"the features of layer {group.layers[0]!r} must be finite numbers")
        axes = torch.linalg.eigh(products).eigenvectors.flip(1)
        largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
        return torch.where(largest < 0, -axes, axes)

    def importance(self, group: Group, axes: Tensor | None) -> Importance:
        products = self.of(group)
        if axes is None:
            return _importance(group, None, products * _norms_of_readers(self.model, group))
        eigenvalues = (axes * (products @ axes)).sum(0).clamp(min=0)
        return _importance(group, axes, products.diagonal(), eigenvalues)


def _norms_of_readers(model: nn.Module, group: Group) -> Tensor:
    """Squared, of the weights that read each feature; ones where none are known."""
    norms = torch.zeros(group.n, dtype=torch.float64)
    for name, dim, features in group.readers:
        weight = dict(model.named_parameters(remove_duplicate=False)).get(name)
        if weight is None:
            continue
        rows = weight.detach().movedim(dim, 0).flatten(1).double().square().sum(1).cpu()
        read = features >= 0
        norms.index_add_(0, features[read], rows[read])
    return norms if bool((norms > 0).any()) else torch.ones_like(norms)


def _layers(model: nn.Module, groups: Sequence[Group]) -> dict[str, TailDropout]:
    modules: Any = {name: model.get_submodule(name) for group in groups for name in group.layers}
    return dict(modules)


# ------------------------------------------------------------------------ by the loss's gradient


_Pair = tuple[Tensor, Tensor | None, TailDropout]  # features, their gradient, what hands them on


def _by_saliency(
    model: nn.Module,
    groups: Sequence[Group],
    axes: Sequence[Tensor | None],
    batches: Batches,
    loss: Callable[[Any, Any], Tensor],
) -> list[Importance]:
    """By half the mean square, over samples, of activation times gradient, summed over positions.

    To second order, with the Fisher information for the curvature, it is what the loss rises by
    without the feature. Source: Theis, Korshunova, Tejani and Huszar, Faster gaze prediction with
    dense networks and Fisher pruning (2018), arXiv 1801.05787.
    """
    layers = _layers(model, groups)
    passed: dict[str, list[Tensor]] = {}
    scores = [torch.zeros(2, group.n, dtype=torch.float64) for group in groups]
    count = 0

    def look(name: str) -> Callable[..., Tensor]:
        def mark(layer: TailDropout, args: Any, output: Tensor) -> Tensor:
            marked = output.clone() if output.requires_grad else output.detach().requires_grad_()
            passed.setdefault(name, []).append(marked)
            return marked.clone()  # which may be changed in place

        return mark

    hooks: dict[nn.Module, Any] = {layer: look(name) for name, layer in layers.items()}
    # CuDNN has no gradients for recurrent layers in eval mode.
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False), hooked(hooks):
        for inputs, target in batches.pairs():
            passed.clear()
            losses = loss(call(model, inputs), target)
            found = [x for marked in passed.values() for x in marked]
            gradients = torch.autograd.grad(losses.sum(), found, allow_unused=True)
            of = dict(zip(map(id, found), gradients, strict=True))
            for group, own, total in zip(groups, axes, scores, strict=True):
                pairs: list[_Pair] = [
                    (x.detach(), of[id(x)], layers[name])
                    for name in group.layers
                    for x in passed.get(name, [])
                ]
                for i, turned in enumerate((None, own)):
                    total[i] += _squares(group, pairs, turned)
            count += len(losses)
    count = int(sum_of_all_processes(torch.tensor(count)))
    if count == 0:
        raise ValueError("data must yield at least one sample, got none (a used-up generator?)")
    scores = [sum_of_all_processes(score) / (2 * count) for score in scores]
    return [
        _importance(group, own, score[0], None if own is None else score[1])
        for group, own, score in zip(groups, axes, scores, strict=True)
    ]


def _squares(group: Group, pairs: list[_Pair], axes: Tensor | None) -> Tensor:
    """Of each feature's products, in blocks: the square of their sum in each sample, summed."""
    by_shape: dict[torch.Size, Tensor] = {}
    for features, gradient, layer in pairs:
        if gradient is None:
            continue
        one, other = (_last(x, layer.dropout_dim) for x in (features, gradient))
        if axes is not None:
            turn = axes.to(one.device, one.dtype)
            one, other = one @ turn, other @ turn
        dims = as_dims(layer.batch_dim) or (0,)
        samples = {range(features.ndim)[dim] for dim in dims}
        along = range(features.ndim)[layer.dropout_dim]
        rest = [d - (d > along) for d in range(features.ndim) if d != along and d not in samples]
        products = one * other
        products = (products.sum(rest) if rest else products).flatten(0, -2)  # (samples, n)
        if group.multiple_of > 1 and axes is None:
            blocks = products.unflatten(1, (-1, group.multiple_of)).sum(2) / group.multiple_of
            products = blocks.repeat_interleave(group.multiple_of, 1)
        by_shape[products.shape] = by_shape.get(products.shape, 0.0) + products
    squares = [products.square().sum(0).double().cpu() for products in by_shape.values()]
    return torch.stack(squares).sum(0) if squares else torch.zeros(group.n, dtype=torch.float64)


# ---------------------------------------------------------------------------------- by the loss


class Subsets:
    """Some of the features, or of their components: k is the number of a subset.

    Attributes:
        masks: bool, `(subsets, n)`.
    """

    def __init__(self, dim: int, axes: Tensor | None) -> None:
        self.dim, self.axes = dim, axes
        self.masks = torch.empty(0)

    def at(self, layer: TailDropout, k: int) -> AbstractContextManager[object]:
        return hooked({layer: lambda module, args, output: self.keep(output, k)})

    def keep(self, features: Tensor, k: int | Tensor) -> Tensor:
        number = torch.as_tensor(k).to(features.device).reshape(1)
        mask = self.masks.to(features.device).index_select(0, number)[0]
        if self.axes is None:
            return keep_some(features, mask, self.dim)
        x = features.movedim(self.dim, -1)
        axes = self.axes.to(x.device, torch.promote_types(x.dtype, torch.float32))
        kept = (((x.to(axes.dtype) @ axes) * mask) @ axes.T).to(x.dtype)
        return kept.movedim(-1, self.dim)

    def read(self, features: Tensor, k: Tensor, linear: nn.Linear) -> Tensor:
        return nn.functional.linear(self.keep(features, k), linear.weight, linear.bias)


def _by_greed(
    model: nn.Module,
    group: Group,
    axes: Tensor | None,
    batches: Batches,
    loss: Callable[[Any, Any], Tensor],
) -> Importance:
    """From none on, those first without which the loss falls least: measured, in rounds.

    In each round the loss is measured with each one of the features that remain, and the eighth of
    them is taken with which it is smallest, at least one: all in all about eight times as many
    networks are measured as there are features, or blocks of them.
    """
    m = group.multiple_of
    blocks = group.n // m
    layers = _layers(model, [group])
    subsets = {layer: Subsets(layer.dropout_dim, axes) for layer in layers.values()}
    losses = Losses(model, loss, f"layer {group.layers[0]!r}", subsets, memory=2**30)

    def measured(masks: Tensor) -> Tensor:  # (subsets, blocks)
        for cut in subsets.values():
            cut.masks = masks.repeat_interleave(m, 1)
        grid = [dict.fromkeys(subsets, i) for i in range(len(masks))]
        total, count = torch.zeros(len(masks), dtype=torch.float64), 0
        for inputs, target in batches.pairs():
            found = losses.of(inputs, target, grid)
            total, count = total + found.sum(1), count + found.shape[1]
        total = sum_of_all_processes(torch.cat([total, torch.tensor([count]).double()]))
        if total[-1] == 0:
            raise ValueError("data must yield at least one sample, got none (a used-up generator?)")
        return total[:-1] / total[-1]

    with quiet(), torch.no_grad():
        order: list[int] = []
        remaining = list(range(blocks))
        while len(remaining) > 1:
            kept = torch.zeros(blocks, dtype=torch.bool)
            kept[order] = True
            masks = kept.repeat(len(remaining), 1)
            masks[torch.arange(len(remaining)), remaining] = True
            best = measured(masks).sort(stable=True).indices
            taken = [remaining[i] for i in best[: max(1, len(remaining) // TAKEN_AT_ONCE)].tolist()]
            order += taken
            remaining = [block for block in remaining if block not in taken]
        order += remaining
        half = half_of(group) // m
        masks = torch.zeros(3, blocks, dtype=torch.bool)
        masks[1, order[:half]], masks[2] = True, True
        none, after, full = measured(masks).tolist()
        for cut in subsets.values():
            cut.axes = None
        (before,) = measured((torch.arange(blocks) < half)[None]).tolist()
    features = (torch.tensor(order)[:, None] * m + torch.arange(m)).flatten()
    falls = none - full
    return Importance(
        features if axes is None else axes[:, features],
        (none - before) / falls if falls > 0 else 1.0,
        (none - after) / falls if falls > 0 else 1.0,
    )
