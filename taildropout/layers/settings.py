"""What `set_k` and `using_width` put in force: a k, or a width that becomes one for each n."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..functional.checks import check_k, check_k_at_most, largest_k
from ..lengths import size_of


@dataclass(frozen=True, eq=False)
class SetK:
    """A k that is set.

    The compiler specialises on numbers but not on the values of tensors: it reads the tensor, so
    that another k does not recompile. The largest k is found here, so that a call waits for no
    device to check it.
    """

    value: int | Tensor
    tensor: Tensor
    largest: int

    @classmethod
    def of(cls, k: int | Tensor, multiple_of: int = 1) -> "SetK":
        k = check_k(k)
        tensor = k if isinstance(k, Tensor) else torch.tensor(k, device="cpu")
        set_k = cls(k, tensor, largest_k(k))
        check_multiple(k, multiple_of)
        return set_k

    def for_features(self, n: int) -> int | Tensor:
        if not torch.compiler.is_compiling():
            check_k_at_most(self.largest, n)
        return self.tensor if torch.compiler.is_dynamo_compiling() else self.value


@dataclass(frozen=True, eq=False)
class SetWidth:
    """A width w that is set: of n/m groups of m features the fraction w, rounded up."""

    value: float
    tensor: Tensor
    multiple_of: int = 1

    @classmethod
    def of(cls, width: float, multiple_of: int = 1) -> "SetWidth":
        tensor = torch.tensor(width, dtype=torch.float64, device="cpu")
        return cls(width, tensor, multiple_of)

    def for_features(self, n: int) -> int | Tensor:
        if torch.compiler.is_dynamo_compiling():
            groups = n // self.multiple_of
            return torch.ceil((self.tensor - 1e-9) * groups).to(torch.int64) * self.multiple_of
        return k_of_width(self.value, n, self.multiple_of)


def k_of_width(width: float, n: int, multiple_of: int = 1) -> int:
    """The fraction of n features, rounded up to a multiple: k/n gives k back."""
    check_groups(n, multiple_of)
    return size_of(float(width), n // multiple_of) * multiple_of


def width_or_k(w: float, multiple_of: int = 1) -> SetWidth | SetK:
    """What w says: an int is a k, any other number a width."""
    if isinstance(w, bool) or not isinstance(w, Real):
        raise TypeError(f"w must be a width in [0, 1] or an int, which is a k, got {w!r}")
    if isinstance(w, Integral):
        return SetK.of(int(w), multiple_of)
    if not 0 <= w <= 1:
        raise ValueError(f"w is the fraction of the features to keep, in [0, 1], got {w!r}")
    return SetWidth.of(float(w), multiple_of)


def check_multiple(k: int | Tensor, multiple_of: int) -> None:
    """Tensors without values to look at (meta, fake, inside vmap) pass."""
    if multiple_of == 1 or (isinstance(k, Tensor) and k.is_meta):
        return
    try:
        fits = bool((k % multiple_of == 0).all()) if isinstance(k, Tensor) else not k % multiple_of
    except RuntimeError:  # fake, or inside vmap
        return
    if not fits:
        raise ValueError(f"k must be a multiple of multiple_of={multiple_of}, got k={k}")


def check_groups(n: int, multiple_of: int) -> None:
    if n % multiple_of:
        raise ValueError(
            f"the number of features must be a multiple of multiple_of={multiple_of}, got n={n}"
        )


def check_multiple_of(multiple_of: Any) -> int:
    """What ks are multiples of: an int of at least 1."""
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, Integral):
        raise TypeError(f"multiple_of must be an int, got {multiple_of!r}")
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, got {multiple_of}")
    return int(multiple_of)
