"""Fashion-MNIST with its labels."""

import gzip
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from taildropout.demo.data import DEBIAN_FOLDER, load_fashion_mnist


@dataclass(frozen=True)
class Labelled:
    """Images in [0, 1] as rows of pixels, and the number of each one's class."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@lru_cache(maxsize=1)
def fashion_mnist() -> Labelled:
    images = load_fashion_mnist()
    return Labelled(images.train, _labels("train"), images.test, _labels("t10k"))


def _labels(part: str) -> Tensor:
    raw = gzip.decompress((DEBIAN_FOLDER / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    return torch.frombuffer(bytearray(raw[8:]), dtype=torch.uint8).long()
