"""The images that the demonstration learns: scikit-learn's digits, or Fashion-MNIST."""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Where Debian's package dataset-fashion-mnist puts the files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class DataError(RuntimeError):
    """The images are not there, or not what they should be."""


@dataclass(frozen=True)
class Images:
    """Grey images as rows of pixels in [0, 1]: float32, `(images, height * width)`."""

    train: Tensor
    test: Tensor
    height: int
    width: int


def load(name: str, folder: Path | None = None) -> Images:
    """Load "digits" or "fashion-mnist".

    Args:
        name: which data set.
        folder: where the IDX files of Fashion-MNIST are; None: where Debian puts them.

    Raises:
        DataError: files are missing or damaged.
        ImportError: scikit-learn is missing.
    """
    return load_digits() if name == "digits" else load_fashion_mnist(folder)


def load_digits() -> Images:
    """1,797 handwritten digits of 8 x 8 pixels, which come with scikit-learn; 397 held out."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError(
            "the digits need scikit-learn: pip install 'taildropout[demo]'"
        ) from error
    pixels = torch.tensor(load().data, dtype=torch.float32) / 16
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return Images(pixels[order[397:]], pixels[order[:397]], height=8, width=8)


def load_fashion_mnist(folder: Path | None = None) -> Images:
    """70,000 pictures of clothes of 28 x 28 pixels, 10,000 held out (Xiao et al. 2017)."""
    folder = DEBIAN_FOLDER if folder is None else folder
    train, test = (
        read_idx_images(_find(folder, f"{part}-images-idx3-ubyte")) for part in ("train", "t10k")
    )
    height, width = train.shape[1:]
    if test.shape[1:] != train.shape[1:]:
        raise DataError(
            f"training and test images in {folder} must have one size, got "
            f"{height} x {width} and {test.shape[1]} x {test.shape[2]}"
        )
    return Images(train.flatten(1), test.flatten(1), height, width)


def read_idx_images(path: Path) -> Tensor:
    """Images from an IDX file, plain or gzipped: float32 in [0, 1], `(images, height, width)`.

    The format: two zero bytes, the type (8: unsigned byte), the number of dims, the size of each
    dim as a big-endian 32-bit integer, the data. Source: LeCun, Cortes and Burges, the MNIST
    database.

    Raises:
        DataError: the file is not of this form, or is cut short.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    if len(raw) < 16 or raw[:4] != bytes([0, 0, 8, 3]):
        raise DataError(f"{path} must be an IDX file of images (first bytes 00 00 08 03)")
    shape = tuple(int.from_bytes(raw[4 * i : 4 * i + 4], "big") for i in (1, 2, 3))
    if len(raw) != 16 + math.prod(shape) or math.prod(shape) == 0:
        raise DataError(
            f"{path} must hold {' x '.join(map(str, shape))} pixels, got {len(raw) - 16} bytes"
        )
    return torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8).view(shape) / 255


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(
        f"Fashion-MNIST is not in {folder} ({name}[.gz] is missing). Either install Debian's "
        "package (apt-get install dataset-fashion-mnist), or download the four IDX files "
        "(see github.com/zalandoresearch/fashion-mnist) and name their folder with --data-dir"
    )
