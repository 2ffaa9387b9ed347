"""Watch how much each further feature is worth, while the network trains.

In training every sample has its own k anyway, so its loss belongs to one point of the scree curve:
`td.LiveScree` collects them, for no extra forward pass. The curve beside the progress bar falls
from k = 0 on the left to k = n on the right. At the end it stands next to what `td.scree` measures
on held-out data, which is what to choose k from.

    python examples/live_scree.py [--quick]
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import taildropout as td

WIDTH = 32


def sparkline(values: torch.Tensor) -> str:
    """One bar per value, the largest a full one."""
    return "".join("▁▂▃▄▅▆▇█"[i] for i in (7.99 * values / values.max()).long().tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few epochs only")
    epochs = 10 if parser.parse_args().quick else 100

    torch.manual_seed(0)
    pixels, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
    pixels = pixels.float() / 16
    order = torch.randperm(len(pixels))
    training, held_out = order[:1200], order[1200:]

    # With uniform lengths every k from 0 to n occurs equally often.
    layer = td.TailDropout(lengths=td.lengths.Uniform(min_k=0))
    model = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), layer, nn.Linear(WIDTH, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    live = td.LiveScree(layer, half_life=20)  # in updates: the network of long ago is forgotten

    for _ in (bar := tqdm(range(epochs), unit="epoch")):
        for batch in training[torch.randperm(len(training))].split(100):
            losses = cross_entropy(model(pixels[batch]), digits[batch], reduction="none")
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            live.update(losses)  # all there is to it
        bar.set_postfix_str(sparkline(live.result().loss))

    watched = live.result()
    measured = td.scree(
        model, nn.CrossEntropyLoss(), [(pixels[held_out], digits[held_out])], progress=False
    )
    print("  k    live, on training batches    held-out data")
    for k in (0, 1, 2, 4, 8, 16, WIDTH):
        i, j = watched.ks.index(k), measured.ks.index(k)
        print(
            f"{k:3}    {watched.loss[i]:7.3f} ± {watched.stderr[i]:.3f}         "
            f"    {measured.loss[j]:7.3f} ± {measured.stderr[j]:.3f}"
        )
    print(measured.explain(tolerance=0.1))


if __name__ == "__main__":
    main()
