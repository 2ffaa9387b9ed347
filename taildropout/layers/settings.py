"""What `set_k` and `using_width` put in force: a k, or a width that becomes one for each n."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from ..functional.checks import check_k, check_k_at_most, largest_k


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
    def of(cls, k: int | Tensor) -> "SetK":
        k = check_k(k)
        tensor = k if isinstance(k, Tensor) else torch.tensor(k, device="cpu")
        return cls(k, tensor, largest_k(k))

    def for_features(self, n: int) -> int | Tensor:
        if not torch.compiler.is_compiling():
            check_k_at_most(self.largest, n)
        return self.tensor if torch.compiler.is_dynamo_compiling() else self.value


@dataclass(frozen=True, eq=False)
class SetWidth:
    """A width w that is set: k = ceil(w * n), but for the rounding of w: k/n gives k back."""

    value: float
    tensor: Tensor

    @classmethod
    def of(cls, width: float) -> "SetWidth":
        return cls(width, torch.tensor(width, dtype=torch.float64, device="cpu"))

    def for_features(self, n: int) -> int | Tensor:
        if torch.compiler.is_dynamo_compiling():
            return torch.ceil((self.tensor - 1e-9) * n).to(torch.int64)
        return k_of_width(self.value, n)


def k_of_width(width: float, n: int) -> int:
    """The fraction of n features, rounded up, though not by a rounding error."""
    return math.ceil(width * n - 1e-9 * n)


def width_or_k(w: float) -> SetWidth | SetK:
    """What w says: an int is a k, any other number a width."""
    if isinstance(w, bool) or not isinstance(w, Real):
        raise TypeError(f"w must be a width in [0, 1] or an int, which is a k, got {w!r}")
    if isinstance(w, Integral):
        return SetK.of(int(w))
    if not 0 <= w <= 1:
        raise ValueError(f"w is the fraction of the features to keep, in [0, 1], got {w!r}")
    return SetWidth.of(float(w))
