"""What layers have in common that hold their TailDropout inside."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor

from .dropout import TailDropout

Holder = TypeVar("Holder", bound="HoldsDropout")


class HoldsDropout:
    """A module whose child `dropout` is its TailDropout: what is said to it is said to the child."""

    dropout: TailDropout

    @property
    def p(self) -> float:
        """Expected fraction of the features dropped."""
        return self.dropout.p

    @p.setter
    def p(self, p: float) -> None:
        self.dropout.p = p

    @property
    def k(self) -> int | Tensor | None:
        """The k that is set, or None."""
        return self.dropout.k

    def set_k(self, k: int | Tensor | None) -> None:
        """As `TailDropout.set_k`."""
        self.dropout.set_k(k)

    @contextmanager
    def using_k(self: Holder, k: int | Tensor | None) -> Iterator[Holder]:
        """As `TailDropout.using_k`."""
        with self.dropout.using_k(k):
            yield self

    @contextmanager
    def using_width(self: Holder, w: float | None) -> Iterator[Holder]:
        """As `TailDropout.using_width`."""
        with self.dropout.using_width(w):
            yield self
