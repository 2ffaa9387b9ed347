"""The statistics of BatchNorm layers, at the width that the network has now."""

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ..models.hooks import hooked
from ..models.inputs import Inputs, call, inputs_of, to_device
from ..models.sharded import check_whole_layers
from ..models.width import as_it_was


def recalibrate(
    model: nn.Module,
    data: Iterable[Inputs | tuple[Inputs, Any]],
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> None:
    """Estimate the running statistics of all BatchNorm layers anew, in place.

    A BatchNorm layer behind a TailDropout gathers its statistics over all the widths of training.
    This runs the network over some data at the width that it has now: that of a pruned network, of
    `at_width`, or the ks that are set. All other layers are in eval mode, and every weight stays.

    It is for networks whose steps had one width each (`batch_dim=()`), or were trained without the
    layers. Where each sample has a width of its own, training itself normalises by a batch of all
    widths, and the statistics gathered then usually serve better: compare on held-out data.

    Each statistic is the mean over all batches, weighted by the number of values that a batch has
    for it, so that a small last batch counts little. (In SyncBatchNorm every batch counts alike,
    since processes may not have the same numbers.) As in training a layer sees the features as
    the layers before normalise them, by the batch: batches should be shuffled, and not small.

    Afterwards modes, momentum, ks and the state of torch's random generator are what they were;
    after an exception or Ctrl-C the statistics too. Under `torch.distributed` each process
    estimates from the data that it passes.

    Args:
        model: changed in place.
        data: yields inputs, or pairs of inputs and a target, which is not used: a tuple or list
            of two is a pair. Inputs are a tensor (`model(inputs)`), a tuple (`model(*inputs)`) or
            a dict (`model(**inputs)`). Training data is fine: a few thousand samples will do.
        device: where the batches are moved to. None: the device of the model's parameters.
        progress: show a progress bar.

    Raises:
        ValueError: no BatchNorm layer that keeps statistics, no data, a batch with one value for
            each of a layer's features, or a model whose layers are sharded over processes.

    Example:
        >>> from taildropout import TailDropout, prune
        >>> norm = nn.BatchNorm1d(16)
        >>> model = nn.Sequential(nn.Linear(8, 16), TailDropout(), norm, nn.Linear(16, 4))
        >>> small = prune(model, 5, torch.randn(2, 8))
        >>> recalibrate(small, [torch.randn(32, 8) for _ in range(4)], progress=False)
        >>> small[2].num_batches_tracked
        tensor(4)
    """
    norms = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        raise ValueError(
            "the model must contain a BatchNorm layer that keeps running statistics, and has none: "
            "nothing depends on the data, and it is fine as it is"
        )
    check_whole_layers(model, "recalibrate")
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), None)
    seen: dict[nn.Module, int] = {}  # values of each feature so far

    def weigh(norm: _BatchNorm, args: tuple[Any, ...]) -> None:
        if norm not in seen:
            norm.reset_running_stats()
        values = args[0].numel() // max(args[0].shape[1], 1)
        seen[norm] = seen.get(norm, 0) + values
        if isinstance(norm, nn.SyncBatchNorm):
            return
        if values < 2:
            raise ValueError(
                "recalibrate needs more than one value for each feature in a batch, got an input "
                f"of shape {tuple(args[0].shape)} in layer {norms[norm]!r}: use larger batches, or "
                "drop_last=True in the DataLoader"
            )
        norm.momentum = values / seen[norm]

    count = 0
    total = len(data) if isinstance(data, Sized) else None
    with (
        as_it_was(model),
        _restored_on_failure(norms),
        hooked(dict.fromkeys(norms, weigh), before=True),
        torch.no_grad(),
    ):
        for norm in norms:
            norm.training, norm.momentum = True, None
        for batch in tqdm(data, desc="recalibrate", total=total, disable=not progress):
            call(model, to_device(inputs_of(batch), device))
            count += 1
        if count == 0:
            raise ValueError("data must yield at least one batch, got none (a used-up generator?)")


@contextmanager
def _restored_on_failure(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """The momentum as before, and after an exception the statistics too."""
    momenta = {norm: norm.momentum for norm in norms}
    before: dict[Tensor, Tensor] = {
        buffer: buffer.clone() for norm in momenta for buffer in norm.buffers(recurse=False)
    }
    try:
        yield
    except BaseException:  # Ctrl-C too
        for buffer, value in before.items():
            buffer.copy_(value)
        raise
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
