"""Train every prefix in every step, or draw one for each sample?

One hidden layer whose first k features are to be a good network for every k, as in Matryoshka
training. Where a single Linear reads the layer, `prefix_linear` gives its outputs for all prefixes
as one running sum, so that the mean loss over all k is exact. `TailDropout` draws one k for each
sample instead: the same mean, estimated, at the price of one forward pass.

    python examples/every_prefix.py [--quick]
"""

import argparse
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import taildropout as td
from taildropout.functional import prefix_linear

WIDTH = 64


def every_prefix(model: nn.Sequential, pixels: Tensor, digits: Tensor) -> Tensor:
    features, head = model[:2](pixels), model[3]
    logits = prefix_linear(features, head.weight, head.bias, ks=range(1, WIDTH + 1))
    return cross_entropy(logits.flatten(0, 1), digits.repeat(WIDTH))


def one_prefix_per_sample(model: nn.Sequential, pixels: Tensor, digits: Tensor) -> Tensor:
    return cross_entropy(model(pixels), digits)


def train(
    loss: Callable[[nn.Sequential, Tensor, Tensor], Tensor],
    pixels: Tensor,
    digits: Tensor,
    steps: int,
) -> tuple[nn.Sequential, float]:
    """The trained network, and the seconds that each step took."""
    torch.manual_seed(0)
    layer = td.TailDropout(lengths=td.lengths.Uniform(min_k=1))
    model = nn.Sequential(nn.Linear(64, WIDTH), nn.GELU(), layer, nn.Linear(WIDTH, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    start = time.perf_counter()
    for _ in range(steps):
        batch = torch.randint(len(pixels), (128,))
        optimizer.zero_grad()
        loss(model, pixels[batch], digits[batch]).backward()
        optimizer.step()
    return model, (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    steps = 150 if parser.parse_args().quick else 2000

    pixels, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
    pixels = pixels.float() / 16
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    training, held_out = order[:1200], order[1200:]

    def wrong(output: Tensor, target: Tensor) -> Tensor:  # one value per sample
        return (output.argmax(1) != target).float()

    ks = [1, 2, 4, 8, 16, 32, WIDTH]
    print("held-out accuracy at k =" + "".join(f"{k:7}" for k in ks) + "    ms per step")
    for name, loss in [("every prefix", every_prefix), ("sampled", one_prefix_per_sample)]:
        model, seconds = train(loss, pixels[training], digits[training], steps)
        errors = td.scree(
            model, wrong, [(pixels[held_out], digits[held_out])], ks=ks, progress=False
        )
        row = "".join(f"{1 - error:7.1%}" for error in errors.loss)
        print(f"{name:24}{row}{1000 * seconds:15.2f}")


if __name__ == "__main__":
    main()
