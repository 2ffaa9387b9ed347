"""Draw the pictures and animations of docs/images.

It trains two autoencoders on Fashion-MNIST (a minute each on two cores) if a figure needs them.

    python -m docs.figures [--only NAME ...] [--data-dir DIR] [--epochs 12]
"""

import argparse
from pathlib import Path

import torch

from . import arrows, bottleneck, order, svd
from .animate import save_animation, save_picture
from .networks import Networks
from .overview import overview

ANIMATIONS = {
    "arrows": lambda networks: arrows.prefixes(),
    "arrows-tail-dropout": lambda networks: arrows.tail_dropout(),
    "arrows-plain-dropout": lambda networks: arrows.plain_dropout(),
    "svd": lambda networks: svd.directions(networks),
    "autoencoder-tail-dropout": bottleneck.tail_dropout,
    "autoencoder-plain-dropout": bottleneck.plain_dropout,
    "training": order.training,
}
PICTURES = {"overview": overview}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m docs.figures", description=__doc__.splitlines()[0]
    )
    names = [*PICTURES, *ANIMATIONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--data-dir", type=Path, help="where the IDX files of Fashion-MNIST are")
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    networks = Networks(arguments.data_dir, arguments.epochs)
    for name in arguments.only:
        torch.manual_seed(0)
        if name in PICTURES:
            save_picture(name, PICTURES[name](networks))
        else:
            save_animation(name, ANIMATIONS[name](networks))


if __name__ == "__main__":
    main()
