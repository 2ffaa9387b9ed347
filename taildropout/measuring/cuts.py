"""Which k a layer has at each point of a measurement, and what it keeps of its features then."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from ..functional import keep_prefix
from ..layers import TailDropout


@dataclass(frozen=True, eq=False)
class Swept:
    """A layer whose k is swept. Several that are swept together have equally many ks."""

    layer: TailDropout
    ks: Sequence[int]

    def keep(self, features: Tensor, k: int | Tensor) -> Tensor:
        """What the layer passes at k, of what it passes without one."""
        return keep_prefix(features, k, self.layer.dropout_dim)

    @contextmanager
    def at(self, point: int) -> Iterator[None]:
        """Inside, the layer has the k of that point."""
        with self.layer.using_k(self.ks[point]):
            yield
