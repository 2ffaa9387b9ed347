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

# Fashion-MNIST's classes, in the order of their labels (Xiao, Rasul and Vollgraf 2017).
CLOTHES = ["T-shirt", "trouser", "pullover", "dress", "coat"]
CLOTHES += ["sandal", "shirt", "sneaker", "bag", "ankle boot"]
CONTRAST = {
    "shoes": ["sandal", "sneaker", "ankle boot"],
    "shirts": ["T-shirt", "pullover", "coat", "shirt"],
}


class DataError(RuntimeError):
    """The images are not there, or not what they should be."""


@dataclass(frozen=True)
class Images:
    """Grey images as rows of pixels in [0, 1]: float32, `(images, height * width)`.

    Attributes:
        train, test: the images to learn, and those that are held out.
        height, width: pixels of one image.
        test_labels: the class of each held-out image by name, or None where nobody knows.
        contrast: two groups of classes by name that even one feature should tell apart, if the
            held-out images have some of both.
    """

    train: Tensor
    test: Tensor
    height: int
    width: int
    test_labels: list[str] | None = None
    contrast: dict[str, list[str]] | None = None


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
    digits = load()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return Images(
        pixels[order[397:]],
        pixels[order[:397]],
        height=8,
        width=8,
        test_labels=[str(digits.target[i]) for i in order[:397].tolist()],
        contrast={"zeros": ["0"], "ones": ["1"]},
    )


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
    labels = _test_labels(folder, len(test))
    there = all(not set(group).isdisjoint(labels or []) for group in CONTRAST.values())
    contrast = CONTRAST if there else None
    return Images(train.flatten(1), test.flatten(1), height, width, labels, contrast)


def _test_labels(folder: Path, count: int) -> list[str] | None:
    """The names of the held-out images' classes; None if the file is missing."""
    path = _found(folder, "t10k-labels-idx1-ubyte")
    if path is None:
        return None
    labels = read_idx_labels(path).tolist()
    if len(labels) != count or max(labels) >= len(CLOTHES):
        raise DataError(
            f"{path} must hold a label below {len(CLOTHES)} for each of {count} images, got "
            f"{len(labels)} labels up to {max(labels)}"
        )
    return [CLOTHES[label] for label in labels]


def read_idx_images(path: Path) -> Tensor:
    """Images from an IDX file, plain or gzipped: float32 in [0, 1], `(images, height, width)`.

    Raises:
        DataError: the file is not of this form, or is cut short.
    """
    return _read_idx(path, 3, "images", "pixels") / 255


def read_idx_labels(path: Path) -> Tensor:
    """Labels from an IDX file, plain or gzipped: uint8, `(images,)`.

    Raises:
        DataError: the file is not of this form, or is cut short.
    """
    return _read_idx(path, 1, "labels", "labels")


def _read_idx(path: Path, dims: int, what: str, units: str) -> Tensor:
    """The bytes of an IDX file.

    The format: two zero bytes, the type (8: unsigned byte), the number of dims, the size of each
    dim as a big-endian 32-bit integer, the data. Source: LeCun, Cortes and Burges, the MNIST
    database.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    start = 4 + 4 * dims
    if len(raw) < start or raw[:4] != bytes([0, 0, 8, dims]):
        raise DataError(f"{path} must be an IDX file of {what} (first bytes 00 00 08 0{dims})")
    shape = tuple(int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4))
    if len(raw) != start + math.prod(shape) or math.prod(shape) == 0:
        raise DataError(
            f"{path} must hold {' x '.join(map(str, shape))} {units}, got {len(raw) - start} bytes"
        )
    return torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8).view(shape)


def _found(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _find(folder: Path, name: str) -> Path:
    path = _found(folder, name)
    if path is not None:
        return path
    raise DataError(
        f"Fashion-MNIST is not in {folder} ({name}[.gz] is missing). Either install Debian's "
        "package (apt-get install dataset-fashion-mnist), or download the four IDX files "
        "(see github.com/zalandoresearch/fashion-mnist) and name their folder with --data-dir"
    )
