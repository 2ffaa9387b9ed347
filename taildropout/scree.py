"""Measuring loss(k): how much each further feature is worth, on held-out data."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

from . import choose
from .fanout import FanOut, FanOutError
from .functional import check_k, check_k_at_most
from .insert import Inputs, call, tail_dropouts
from .layers import TailDropout, TailMLP
from .pruning.fitted import FittedTailDropout

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Loss = nn.Module | Callable[[Any, Any], Tensor]
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Scree:
    """Loss as a function of k, measured on the same samples for every k.

    Attributes:
        layer: qualified name of the layer.
        ks: the measured prefix lengths, increasing.
        loss: mean loss for each of them; float64, shape `(len(ks),)`.
        count: number of samples.
        cov: covariance of the per-sample losses of two ks; float64, `(len(ks), len(ks))`.
    """

    layer: str
    ks: list[int]
    loss: Tensor
    count: int
    cov: Tensor = field(repr=False)

    @property
    def stderr(self) -> Tensor:
        """Standard error of each mean loss: float64, shape `(len(ks),)`. NaN for one sample."""
        return (self.cov.diagonal() / self.count).sqrt()

    def choose(self, tolerance: float = 0.01, confidence: float = 0.95) -> int:
        """The smallest k that surely loses at most a tolerance against the largest measured k.

        See `taildropout.choose.choose`.
        """
        return choose.choose(self, tolerance, confidence)

    def explain(self, tolerance: float = 0.01, confidence: float = 0.95) -> str:
        """What `choose` answers and why, and what it would take to go further down.

        See `taildropout.choose.explain`.
        """
        return choose.explain(self, tolerance, confidence)

    def one_standard_error(self) -> int:
        """The smallest k whose loss is within one standard error of the smallest loss.

        See `taildropout.choose.one_standard_error`.
        """
        return choose.one_standard_error(self)

    def knee(self) -> int | None:
        """The k where the curve bends most, or None if it does not bend.

        See `taildropout.choose.knee`.
        """
        return choose.knee(self)

    def to_dict(self) -> dict[str, Any]:
        """The measurement as plain data, fit for JSON; `from_dict` reads it back."""
        return {
            "layer": self.layer,
            "ks": self.ks,
            "loss": self.loss.tolist(),
            "count": self.count,
            "cov": self.cov.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Scree":
        """The Scree that `to_dict` wrote.

        Example:
            >>> s = Scree("1", [0, 1], torch.tensor([2.0, 1.0]).double(), 9, torch.eye(2).double())
            >>> Scree.from_dict(s.to_dict()).to_dict() == s.to_dict()
            True
        """
        return cls(
            data["layer"],
            list(data["ks"]),
            torch.tensor(data["loss"], dtype=torch.float64),
            data["count"],
            torch.tensor(data["cov"], dtype=torch.float64),
        )

    def to_pandas(self) -> "pd.DataFrame":
        """A table with the columns k (the index), loss and stderr. Needs pandas."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "to_pandas needs pandas: pip install 'taildropout[pandas]'"
            ) from error
        columns = {"loss": self.loss.tolist(), "stderr": self.stderr.tolist()}
        return pd.DataFrame(columns, index=pd.Index(self.ks, name="k"))

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Loss against k with its standard error. Needs matplotlib. See `taildropout.plot`."""
        from .plot import plot_scree

        return plot_scree(self, ax=ax)


def scree(
    model: nn.Module,
    loss: Loss,
    data: Iterable[tuple[Inputs, Any]],
    *,
    layer: str | None = None,
    ks: Iterable[int] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    memory: int = 2**30,
) -> Scree:
    """Measure the loss for each prefix length k of one TailDropout layer.

    The model is run in eval mode without gradients, and comes back in the state that it was in:
    modes, ks, and the state of torch's random generator, also after an exception or Ctrl-C.

    The part of the model before the layer runs once for many ks: the layer fans its input out to
    a chunk of the ks along the batch dim, and the rest of the model sees one larger batch. Where
    a single `nn.Linear` reads the layer, its outputs for all ks are one running sum. On the first
    batch this is checked against plain runs with `set_k`; where it does not agree (a skip
    connection around the layer, say), all ks are run one by one, and the log says why.

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
        layer: qualified name of the layer, needed if there are several.
        ks: the ks to measure. None: all of 0, ..., n up to n = 256, else 0, n and up to 128
            sizes spaced geometrically. The largest is what `choose` compares with, so include n.
        device: where the batches are moved to. None: the device of the model's parameters.
        progress: show a progress bar.
        memory: bytes that the activations of a chunk of ks may take, about.

    Raises:
        ValueError: no TailDropout layer, several and none named, a layer that the model does not
            call, no data, a k outside 0, ..., n, a loss with class weights or ignored targets.
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
    name, swept = _find_layer(model, layer)
    per_sample_loss = _per_sample(loss)
    chosen = None if ks is None else _check_ks(ks)
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), None)
    moments: _Moments | None = None
    fan_out: FanOut | None = FanOut(model, swept, per_sample_loss, memory)
    total = len(data) if isinstance(data, Sized) else None
    with _as_it_was(model, swept), torch.no_grad():

        def one_by_one(inputs: Inputs, target: Any, ks: list[int]) -> Tensor:  # (len(ks), batch)
            losses = []
            for k in ks:
                with swept.using_k(k):
                    losses.append(per_sample_loss(call(model, inputs), target))
            return torch.stack(losses).double().cpu()

        for batch in tqdm(data, desc="scree", total=total, disable=not progress):
            inputs, target = _to_device(_pair(batch), device)
            if moments is None or chosen is None:
                n = _width(model, swept, name, inputs)
                chosen = _default_ks(n) if chosen is None else chosen
                check_k_at_most(chosen[-1], n)
                moments = _Moments(len(chosen))
            if fan_out is not None and not fan_out.checked:
                some = sorted({chosen[i * (len(chosen) - 1) // 3] for i in range(4)})
                expected = one_by_one(inputs, target, some)
                try:
                    fan_out.check(inputs, target, some, expected)
                except FanOutError as error:
                    fan_out = None
                    log.info("scree of layer %r runs each k by itself: %s", name, error)
            losses: Tensor | None = None
            if fan_out is not None and fan_out.checked:
                try:
                    losses = fan_out.losses(inputs, target, chosen)
                except Exception as error:  # this batch took another way through the network
                    fan_out = None
                    log.info("scree of layer %r runs each k by itself from here: %s", name, error)
            moments.add(one_by_one(inputs, target, chosen) if losses is None else losses)
    chosen, moments = _of_all_processes(chosen, moments)
    if moments is None or chosen is None or moments.count == 0:
        raise ValueError("data must yield at least one sample, got none (a used-up generator?)")
    return Scree(name, chosen, moments.mean, moments.count, moments.covariance())


class _Moments:
    """Count, mean and covariance of vectors that come in batches, in constant memory.

    Chan, Golub and LeVeque (1979): two sets' sums of squares around their own means add up with
    a correction for the distance of the means.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.squares = torch.zeros(size, size, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:  # (size, batch)
        if vectors.shape[1] > 0:
            mean = vectors.mean(1)
            centred = vectors - mean[:, None]
            self.merge(vectors.shape[1], mean, centred @ centred.T)

    def merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if count == 0:
            return
        shift = mean - self.mean
        total = self.count + count
        self.squares += squares + shift.outer(shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def covariance(self) -> Tensor:
        """NaN for one sample, which has none."""
        divisor = self.count - 1 if self.count > 1 else float("nan")
        return self.squares / divisor


def _of_all_processes(
    ks: list[int] | None, moments: _Moments | None
) -> tuple[list[int] | None, _Moments | None]:
    """The moments of all processes' data together, the same in each; alone, what is given."""
    if not (dist.is_available() and dist.is_initialized()):
        return ks, moments
    mine = None if moments is None else (ks, moments.count, moments.mean, moments.squares)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    shares = [share for share in shares if share is not None]
    if not shares:
        return None, None
    measured: list[int] = shares[0][0]
    if any(share[0] != measured for share in shares):
        raise ValueError("all processes must measure the same ks of the same layer")
    together = _Moments(len(measured))
    for _, count, mean, squares in shares:
        together.merge(count, mean, squares)
    return measured, together


def _find_layer(model: nn.Module, name: str | None) -> tuple[str, TailDropout]:
    layers = tail_dropouts(model)
    if not layers:
        raise ValueError("the model must contain a TailDropout layer to be swept, and has none")
    if name is None and len(layers) == 1:
        return next(iter(layers.items()))
    if name not in layers:
        raise ValueError(
            f"layer must name one of the model's TailDropout layers {sorted(layers)}, got {name!r}"
        )
    return name, layers[name]


def _check_ks(ks: Iterable[int]) -> list[int]:
    checked = set()
    for k in ks:
        value = check_k(k)
        checked.add(int(value))
    if not checked or min(checked) < 0:
        raise ValueError(f"ks must be at least one k, each at least 0, got {sorted(checked)}")
    return sorted(checked)


def _default_ks(n: int) -> list[int]:
    if n <= 256:
        return list(range(n + 1))
    spaced = torch.logspace(0, torch.tensor(n).log2().item(), 128, base=2, dtype=torch.float64)
    return sorted({0, n, *spaced.round().long().tolist()})


def _width(model: nn.Module, layer: TailDropout, name: str, inputs: Inputs) -> int:
    """n of the layer, by running the model once."""
    widths: list[int] = []

    def look(module: TailDropout, args: Any, output: Tensor) -> None:
        if isinstance(module, FittedTailDropout):  # zeros come behind its features
            widths.append(module.width)
        else:
            widths.append(output.shape[module.dropout_dim])

    handle = layer.register_forward_hook(look)
    try:
        call(model, inputs)
    finally:
        handle.remove()
    if len(set(widths)) != 1:
        raise ValueError(
            f"layer {name!r} must be called by the model with one number of features, "
            f"got {widths or 'no call'}"
        )
    return widths[0]


def _pair(batch: Any) -> tuple[Inputs, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(f"data must yield pairs (inputs, target), got {type(batch).__name__}")
    return batch[0], batch[1]


def _to_device(values: Any, device: torch.device | str | None) -> Any:
    if device is None:
        return values
    return tree_map(lambda value: value.to(device) if hasattr(value, "to") else value, values)


def _per_sample(loss: Loss) -> Callable[[Any, Any], Tensor]:
    """The loss as a function that gives one value per sample, shape `(batch,)`."""
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        classifies = isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss)
        if classifies and loss.weight is not None:
            raise ValueError(
                f"{type(loss).__name__} with class weights has no loss of one sample by itself, "
                "since it divides by the weights of the batch: pass a function that gives one "
                "value per sample"
            )
        unreduced: Any = copy.copy(loss)
        unreduced.reduction = "none"

        def module_loss(output: Any, target: Any) -> Tensor:
            if classifies and bool((target == loss.ignore_index).any()):
                raise ValueError(
                    f"{type(loss).__name__} with ignored targets ({loss.ignore_index}) averages "
                    "over another number of targets for each sample: pass a function that gives "
                    "one value per sample"
                )
            values: Tensor = unreduced(output, target)
            return values.flatten(1).mean(1) if values.ndim > 1 else values

        return module_loss

    def function_loss(output: Any, target: Any) -> Tensor:
        values = loss(output, target)
        if not isinstance(values, Tensor) or values.ndim != 1:
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"{values!r}"
            name = getattr(loss, "__name__", type(loss).__name__)
            raise TypeError(
                f"loss must give one value per sample, a tensor of shape (batch,), got {got}: "
                f"call {name} with reduction='none' and average over the other dims "
                "(.flatten(1).mean(1)), or pass a loss module such as nn.MSELoss()"
            )
        return values

    return function_loss


@contextmanager
def _as_it_was(model: nn.Module, swept: TailDropout) -> Iterator[None]:
    """Eval mode inside, with every layer but `swept` at its k; afterwards all as before."""
    training = {module: module.training for module in model.modules()}
    ks = {layer: layer.k for layer in tail_dropouts(model).values()}
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            for layer, k in ks.items():
                layer.set_k(None if layer is swept else k)
            yield
        finally:
            for module, mode in training.items():
                module.training = mode
            for layer, k in ks.items():
                layer.set_k(k)


class LiveScree:
    """The scree curve of a layer from the losses of its own training batches.

    In training every sample has its own k anyway. Its loss goes to the bin of that k: a curve with
    standard errors, for no extra forward pass and in constant memory. It is the loss on training
    data, of a network that changes while it is measured: good for watching, not for choosing.
    Samples of different ks are different samples, so the covariance is diagonal.

    Args:
        layer: a TailDropout, or a TailMLP.
        half_life: after this many updates an old loss counts half. None: all count alike.

    Raises:
        ValueError: `half_life` is not above 0.

    Example:
        >>> layer = TailDropout()
        >>> live = LiveScree(layer)
        >>> for _ in range(10):
        ...     kept = layer(torch.ones(8, 4)).sum(1)
        ...     live.update((4 - kept) ** 2)  # one loss per sample
        >>> live.result().loss
        tensor([16.,  9.,  4.,  1.,  0.], dtype=torch.float64)
    """

    def __init__(self, layer: TailDropout | TailMLP, *, half_life: float | None = None) -> None:
        if half_life is not None and not half_life > 0:
            raise ValueError(f"half_life must be above 0 updates, got {half_life}")
        self.layer = layer.dropout if isinstance(layer, TailMLP) else layer
        self._keep = 1.0 if half_life is None else 0.5 ** (1 / half_life)
        # For each k: sum of the weights, of their squares, mean, weighted squares around it.
        self._bins = torch.zeros(4, 0, dtype=torch.float64)

    def update(self, per_sample_loss: Tensor) -> None:
        """Take in the losses of the batch that the layer saw last in training.

        Args:
            per_sample_loss: one value for each k that was drawn, the shape of `layer.drawn_k`.

        Raises:
            RuntimeError: the layer has drawn no k yet.
            ValueError: another shape, or a loss that is not finite.
        """
        k = self.layer.drawn_k
        if k is None:
            raise RuntimeError("the layer must have drawn a k: run the model in training first")
        if per_sample_loss.shape != k.shape:
            raise ValueError(
                "per_sample_loss must have one value for each k that was drawn, shape "
                f"{tuple(k.shape)}, got {tuple(per_sample_loss.shape)}"
            )
        k = k.detach().flatten().cpu()
        loss = per_sample_loss.detach().flatten().double().cpu()
        if not loss.isfinite().all():
            raise ValueError("per_sample_loss must be finite, got NaN or infinity")
        if k.numel() == 0:
            return
        bins = max(self._bins.shape[1], int(k.max()) + 1)
        self._bins = torch.nn.functional.pad(self._bins, [0, bins - self._bins.shape[1]])
        count = torch.bincount(k, minlength=bins).double()
        mean = torch.bincount(k, loss, minlength=bins) / count.clamp(min=1)
        squares = torch.bincount(k, (loss - mean[k]).square(), minlength=bins)

        weight, weight_squares, old_mean, old_squares = self._bins
        weight, weight_squares = weight * self._keep, weight_squares * self._keep**2
        total = weight + count
        shift = (mean - old_mean) * (count > 0)
        share = count / total.clamp(min=1e-300)
        self._bins = torch.stack(
            [
                total,
                weight_squares + count,
                old_mean + shift * share,
                old_squares * self._keep + squares + shift.square() * weight * share,
            ]
        )

    def result(self) -> Scree:
        """The curve so far, at the ks that occurred.

        A k that occurred once has no standard error: NaN.

        Raises:
            ValueError: there is nothing yet.
        """
        ks = self._bins[0].nonzero().flatten()
        if len(ks) == 0:
            raise ValueError("there is no loss yet: call update after each batch")
        weight, weight_squares, mean, squares = self._bins[:, ks]
        variance = squares / (weight - weight_squares / weight).clamp(min=0)
        variance[weight_squares >= weight**2] = torch.nan
        stderr_squared = variance * weight_squares / weight**2
        count = max(round(float(weight.sum())), 1)
        return Scree("", ks.tolist(), mean, count, torch.diag(stderr_squared * count))
