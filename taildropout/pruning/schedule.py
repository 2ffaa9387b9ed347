"""The recipe, carried through any training loop: plain, then ordered, then nested."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..layers import TailDropout
from ..lengths import AtLeast, Full, Lengths, check_lengths, lengths_or_exponential
from ..measuring.per_sample import Loss
from ..models.insert import tail_dropouts
from ..models.names import unwrapped
from .importance import By
from .order import check_orderable, order_in_place

STAGES = 4  # of shrinking: the smallest width is 1/2, 1/4, 1/8, 1/16, and then that of the lengths


class Schedule:
    """A plain start, the features put in order, then nested lengths: `step()` after each step.

    For the first share of the steps, `plain`, all TailDropouts of the model draw full width: the
    network trains as one without them. Then its features are put in order, with what the optimizer
    keeps of them, if `data` and `optimizer` are given; from there on each layer draws the lengths
    that it had. Layers that are drawn together (`nest`) stay so.

    The plain steps are for the large widths: a published run of a transformer (needle's
    docs/learned_matryoshka_plan) loses 1.5 % of perplexity at full width with 40 % of them, and
    6.6 % when it is nested from the start; 10 to 50 % do about the same. The smallest widths are
    better with `plain=0`, which trains them longest.

    Args:
        model: changed in place, by the lengths of its layers. Also one that is compiled or wrapped.
        total_steps: how many times the optimizer will step.
        plain: the share of the steps at full width, in [0, 1). 0: nested from the start.
        shrink: the share of the steps, after the plain ones, in which the smallest width falls to
            that of the lengths: no sample has less than 1/2, then 1/4, 1/8 and 1/16, for a quarter
            of them each.
        lengths: what all layers draw after the plain share. None: what each of them has.
        data: what the features are ordered by, as in `order`: something that can be gone through
            then. None: they are not ordered.
        loss: as in `order`.
        by: as in `order`; "greedy" takes longest and is best where features are permuted.
        optimizer: the one that trains the model; needed where `data` is given. Features are turned
            only if it is known what a rotation makes of its state, else permuted.
        samples: of the data, for `order`. None: all.

    Attributes:
        steps: how many were made.
        plain_steps: the number at which the layers begin to draw.
        ordering: what was rearranged, as a table; None before.

    Raises:
        ValueError: `total_steps` below 1, shares outside of [0, 1) or above 1 together, no
            TailDropout, layers that all draw full width already (as those of a model that has a
            schedule), `data` without `optimizer`, with `plain=0` (call `order` first, then), or
            that can be gone through once.
        PruningError: with `data`, if the model can't be read; from `step()`, see `order`.

    Example:
        >>> import torch
        >>> from taildropout import TailDropout
        >>> model = nn.Sequential(nn.Linear(4, 8), TailDropout(), nn.Linear(8, 4))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> x = torch.randn(64, 4)
        >>> schedule = Schedule(model, 10, data=[x], optimizer=optimizer)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     (model(x) - x).square().mean().backward()
        ...     optimizer.step()
        ...     schedule.step()
        >>> schedule.plain_steps, schedule.steps
        (4, 10)
        >>> print(schedule.ordering.splitlines()[2].split()[:3])
        ['1', '8', 'rotation']
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        plain: float = 0.4,
        shrink: float = 0.0,
        lengths: Lengths | None = None,
        data: Iterable[Any] | None = None,
        loss: Loss | None = None,
        by: By = "variance",
        optimizer: Optimizer | None = None,
        samples: int | None = None,
    ) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be an int of at least 1, got {total_steps!r}")
        if not (0 <= plain < 1 and 0 <= shrink < 1 and plain + shrink <= 1):
            raise ValueError(
                "plain and shrink must be shares of the steps in [0, 1), together at most 1, got "
                f"plain={plain} and shrink={shrink}"
            )
        self.model, self.data, self.loss, self.by = model, data, loss, by
        self.optimizer, self.samples = optimizer, samples
        self.layers = list(tail_dropouts(unwrapped(model)).values())
        self.lengths = [lengths or layer.lengths for layer in self.layers]
        self._check(lengths, plain)
        self.total_steps = total_steps
        self.plain_steps = max(1, round(plain * total_steps)) if plain else 0
        self.shrink_steps = round(shrink * total_steps)
        self.steps = 0
        self.ordering: str | None = None
        self._stage: int | None = None
        self._set_lengths()

    def step(self) -> None:
        """Count a step of the optimizer; at the end of the plain share, order and begin to nest.

        Beyond `total_steps` nothing changes any more.

        Raises:
            PruningError: the features can't be ordered with the outputs unchanged, see `order`.
            ValueError: the optimizer keeps something of which it is not known what becomes of it.
        """
        if self.steps + 1 == self.plain_steps and self.data is not None and self.ordering is None:
            assert self.optimizer is not None
            self.ordering = order_in_place(
                self.model,
                self.optimizer,
                self.data,
                loss=self.loss,
                by=self.by,
                samples=self.samples,
            )
        self.steps += 1
        self._set_lengths()

    def state_dict(self) -> dict[str, Any]:
        """How far it is: to be saved with the model and the optimizer."""
        return {"steps": self.steps, "ordering": self.ordering}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, for a model and an optimizer that were loaded: nothing is ordered.

        Raises:
            ValueError: it is not the state of a schedule.
        """
        if state_dict.keys() != {"steps", "ordering"}:
            raise ValueError(
                "state_dict must be that of a Schedule, with 'steps' and 'ordering', got "
                f"{sorted(state_dict)}"
            )
        self.steps, self.ordering = state_dict["steps"], state_dict["ordering"]
        self._set_lengths()

    def _check(self, lengths: Lengths | None, plain: float) -> None:
        if not self.layers:
            raise ValueError(
                "the model must have TailDropout layers to be scheduled, and has none: put them "
                "there with nest or insert"
            )
        if lengths is not None:
            check_lengths(lengths)
        if all(isinstance(own, Full) for own in self.lengths):
            raise ValueError(
                "the layers must have lengths to draw after the plain share, and all of them draw "
                "full width. If the model has had a Schedule, pass what they should draw, lengths="
            )
        if self.data is None:
            return
        if self.optimizer is None:
            raise ValueError(
                "data is for ordering the features while the model trains: pass the optimizer too, "
                "whose state goes along"
            )
        if not plain:
            raise ValueError(
                "data is for ordering the features after the plain share, and plain=0 has none: "
                "call td.order before training"
            )
        check_orderable(self.model, self.data, self.loss, self.by, self.samples)

    def _set_lengths(self) -> None:
        """Those of now, where they are others than before: compiled code is compiled anew then."""
        stage = self._stage_of(self.steps)
        if stage != self._stage:
            self._stage = stage
            for layer, lengths in zip(self.layers, self.lengths, strict=True):
                layer.lengths = _at_stage(layer, lengths, stage)

    def _stage_of(self, steps: int) -> int:
        """-1 in the plain share, 0, 1, ... while the smallest width shrinks, `STAGES` behind."""
        if steps < self.plain_steps:
            return -1
        since = steps - self.plain_steps
        return STAGES * since // self.shrink_steps if since < self.shrink_steps else STAGES


def _at_stage(layer: TailDropout, lengths: Lengths | None, stage: int) -> Lengths | None:
    if stage < 0:
        return Full()
    if stage == STAGES:
        return lengths
    return AtLeast(lengths_or_exponential(lengths, layer.p), 0.5 ** (stage + 1))
