"""The autoencoders that the figures show, each trained once for all figures that need it."""

import copy
import itertools
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

import taildropout as td
from taildropout.demo import data
from taildropout.demo.model import Autoencoder, pca_errors, train

WIDTH = 16
P = 0.5
BATCH_SIZE = 256


class Networks:
    """The demonstration's autoencoder on Fashion-MNIST, with TailDropout and with plain dropout."""

    def __init__(self, data_dir: Path | None, epochs: int) -> None:
        self.data_dir = data_dir
        self.epochs = epochs

    @cached_property
    def images(self) -> data.Images:
        return data.load("fashion-mnist", self.data_dir)

    @cached_property
    def history(self) -> list[tuple[float, Autoencoder]]:
        """The network with TailDropout, as it was at some epochs, from untrained to trained."""
        torch.manual_seed(0)
        model = Autoencoder(self.images.train.shape[1], WIDTH, P)
        batches = -(-len(self.images.train) // BATCH_SIZE)
        epochs = [0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, *range(1, self.epochs)]
        wanted = {round(epoch * batches): epoch for epoch in epochs}
        history: list[tuple[float, Autoencoder]] = []
        batch = itertools.count()

        # `train` reports nothing on the way: a hook copies the network before some batches. It
        # draws no random numbers, so this is the very network of `taildropout demo`.
        def remember(model: nn.Module, args: tuple[Tensor]) -> None:
            epoch = wanted.get(next(batch))
            if epoch is not None:
                history.append((epoch, copy.deepcopy(model)))

        hook = model.register_forward_pre_hook(remember)
        train(model, self.images.train, epochs=self.epochs, batch_size=BATCH_SIZE)
        hook.remove()
        for _, earlier in history:
            earlier._forward_pre_hooks.clear()  # they were copied along
        return [*history, (self.epochs, model)]

    @cached_property
    def tail(self) -> Autoencoder:
        """With TailDropout, trained."""
        return self.history[-1][1]

    @cached_property
    def plain(self) -> Autoencoder:
        """With `nn.Dropout` instead, trained."""
        torch.manual_seed(0)
        model = Autoencoder(self.images.train.shape[1], WIDTH)
        model.bottleneck = nn.Dropout(P)  # type: ignore[assignment]
        train(model, self.images.train, epochs=self.epochs, batch_size=BATCH_SIZE)
        return model

    @cached_property
    def scree(self) -> td.Scree:
        """Of `tail`, on held-out images."""
        return self.scree_of(self.tail)

    def scree_of(self, model: Autoencoder) -> td.Scree:
        batches = [(part, part) for part in self.images.test.split(1000)]
        return td.scree(model, nn.MSELoss(), batches, progress=False)

    @cached_property
    def pca(self) -> list[float]:
        """The error of as many principal components as features, on the same images."""
        return pca_errors(self.images.train, self.images.test, list(range(WIDTH + 1)))
