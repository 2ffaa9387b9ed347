"""The losses of one network at the ks of its layers, measured again and again."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..layers import TailDropout
from ..models.hooks import with_forwards
from ..models.inputs import Inputs, pair_of, to_device
from ..models.sharded import check_whole_layers
from ..models.width import as_it_was
from .at_once import Losses
from .cuts import First, keep_some
from .moments import Moments, of_all_processes
from .once import RandomNumbers
from .per_sample import Loss, per_sample
from .vmapped import quiet


class MeasuredAgain:
    """Curves of several layers, each with the others at ks of their own.

    What the first measurement of a layer finds out about the network, and checks against plain
    runs, serves all later ones. The curves of one call see the same batches and random numbers.

    Args:
        model: it is in the state that it was in after each measurement.
        loss: as in `scree`.
        data: as in `scree`.
        layers: by name.
        n_of: their numbers of features.
        progress: show a progress bar for each time that the data are gone through.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Iterable[tuple[Inputs, Any]],
        layers: Mapping[str, TailDropout],
        n_of: Mapping[str, int],
        progress: bool,
    ) -> None:
        check_whole_layers(model, "choose_widths")
        self.model, self.data, self.layers = model, data, layers
        self.n_of, self.progress = n_of, progress
        self.device = next((parameter.device for parameter in model.parameters()), None)
        self.losses = {
            name: Losses(
                model,
                per_sample(loss),
                f"layer {name!r}",
                {layer: First(layer.dropout_dim)},
                memory=2**30,
            )
            for name, layer in layers.items()
        }

    def curves(
        self, widths: Mapping[str, int], ks_of: Mapping[str, Sequence[int]]
    ) -> dict[str, Moments]:
        """Of each named layer the losses at its ks, the others at their widths.

        Raises:
            ValueError: no data.
        """
        found = {name: Moments(len(ks)) for name, ks in ks_of.items()}
        if not found:
            return {}
        total = len(self.data) if isinstance(self.data, Sized) else None
        with as_it_was(self.model), quiet(), torch.no_grad():
            numbers = RandomNumbers(self.model)
            bar = tqdm(self.data, desc="scree", total=total, disable=not self.progress)
            for batch in bar:
                inputs, target = to_device(pair_of(batch), self.device)
                start = numbers.now()
                for name, ks in ks_of.items():
                    numbers.go_back_to(start)
                    grid = [{self.layers[name]: k} for k in ks]
                    masks: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
                    with ExitStack() as stack:
                        for other, layer in self.layers.items():
                            stack.enter_context(layer.using_width(None))
                            full = other == name or widths[other] == self.n_of[other]
                            layer.set_k(None if full else widths[other])
                            if not full:
                                masks[layer] = _masked(layer, widths[other])
                        stack.enter_context(with_forwards(masks))
                        found[name].add(self.losses[name].of(inputs, target, grid))
        return {name: self._whole(ks_of[name], moments) for name, moments in found.items()}

    def _whole(self, ks: Sequence[int], moments: Moments) -> Moments:
        _, together = of_all_processes(ks, moments)
        if together is None or together.count == 0:
            raise ValueError("data must yield at least one sample, got none (a used-up generator?)")
        return together


def _masked(layer: TailDropout, k: int) -> Callable[[Tensor], Tensor]:
    """What the layer does with k set; under vmap its own function, made for gradients, is slow."""

    def forward(features: Tensor) -> Tensor:
        kept = torch.arange(features.shape[layer.dropout_dim], device=features.device) < k
        return keep_some(features, kept, layer.dropout_dim)

    return forward
