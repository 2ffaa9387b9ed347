"""Losses of embeddings, at several widths at once."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils._pytree import tree_leaves, tree_map

from .draws import draw
from .lengths import Lengths, LogUniform, check_lengths

_LOG_UNIFORM = LogUniform()


class PrefixLoss(nn.Module):
    """A loss that compares embeddings, at a few ks instead of one.

    A loss that compares embeddings with each other (contrastive, ranking, distillation) needs all
    of them cut at the *same* k, where a TailDropout draws a k for each sample. In training each
    call draws `draws - 1` ks, evenly spread over their distribution, cuts all embeddings to the
    first k features, and returns the mean of the losses at these ks and at n:

        1/draws * (loss at n + sum of the losses at the drawn ks)

    Its expectation, and that of its gradient, is the expected loss where k is n with probability
    1/draws and is drawn from `lengths` otherwise: `Mixed([Full(), lengths], [1, draws - 1])`. In
    eval it is the plain loss, of whole embeddings.

    Compiled code stops for it, since it would be compiled for each k anew; the loss itself may be
    compiled: `PrefixLoss(torch.compile(loss, dynamic=True))`.

    Args:
        loss: a function or module of embeddings, and of anything else, that returns a tensor.
        lengths: distribution of k. A k of 0 is never drawn: the others keep their proportions.
        draws: how many ks a call has, n among them; at least 2. A k that comes up several times
            costs once.
        normalize: scale each prefix to length 1, as is needed where the loss takes scalar products
            for cosines.
        dim: the dim along which the features lie.
        embeddings: which arguments are embeddings: positions (ints) and keywords (strings). None:
            the first floating-point tensor is one, with n features, and so is every other that
            has n entries along `dim`, and at least two dims (if the first has). Name them where
            something else may have as many: a matrix of scores for a batch of n samples, say.
        generator: source of randomness, torch's global one on the CPU by default. Processes that
            compare their embeddings with each other must draw the same ks: seed it alike in all.

    Arguments of a call:
        Those of `loss`. The embeddings may lie in lists, tuples and dicts.

    Raises:
        ValueError: fewer than 2 draws; in a call, no floating-point tensor to cut, or embeddings
            that are named and have different numbers of features; lengths that only draw 0.
        TypeError: a loss that can't be called or returns no tensor, lengths without a pmf.

    Example:
        >>> from taildropout.lengths import Sizes
        >>> loss = PrefixLoss(nn.L1Loss(), Sizes([1]), draws=2)
        >>> loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]]))  # of 1, and of 1 and 3
        tensor(1.5000)
        >>> anchor, positive, negative = torch.randn(3, 8, 16, requires_grad=True)
        >>> PrefixLoss(nn.TripletMarginLoss(), draws=4)(anchor, positive, negative).backward()

    Source: the lengths of nested dropout, one k for the whole batch, with full width in each step
    as in Matryoshka training (Kusupati et al. 2022, arXiv 2205.13147).
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        lengths: Lengths = _LOG_UNIFORM,
        draws: int = 6,
        *,
        normalize: bool = False,
        dim: int = -1,
        embeddings: Sequence[int | str] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"loss must be a function or module of embeddings, got {loss!r}")
        if not isinstance(draws, int) or draws < 2:
            raise ValueError(
                f"draws must be an int, at least 2 for full width and a k, got {draws}"
            )
        self.loss = loss
        self.lengths = check_lengths(lengths)
        self.draws = draws
        self.normalize = normalize
        self.dim = dim
        self.embeddings = None if embeddings is None else tuple(embeddings)
        self.generator = generator

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        call = self._at_several_ks if self.training else self._at_full_width
        if self.training and torch.compiler.is_compiling():  # which would compile for each k anew
            call = torch.compiler.disable(call)
        return call(args, kwargs)

    def _at_full_width(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        n, loss_at = self._losses(args, kwargs)
        return loss_at(n)

    def _at_several_ks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        n, loss_at = self._losses(args, kwargs)
        drawn = draw(_NotZero(self.lengths), n, self.draws - 1, generator=self.generator)
        counts = Counter([n, *drawn.tolist()])
        losses = [loss_at(k) * (count / self.draws) for k, count in counts.items()]
        return sum(losses[1:], losses[0])

    def _losses(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, Callable[[int], Tensor]]:
        """n, and the loss of the first k features."""
        arguments: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}  # type: ignore[dict-item]
        named = tuple(arguments) if self.embeddings is None else self.embeddings
        embeddings = self._embeddings_in(arguments, named)

        def loss_at(k: int) -> Tensor:
            cut = {id(embedding): self._prefix(embedding, k) for embedding in embeddings}
            new = arguments | {
                name: tree_map(lambda leaf: cut.get(id(leaf), leaf), arguments[name])
                for name in named
            }
            loss = self.loss(
                *[new[i] for i in range(len(args))], **{key: new[key] for key in kwargs}
            )
            if not isinstance(loss, Tensor):
                raise TypeError(f"the loss must return a tensor, got {type(loss).__name__}")
            return loss

        return embeddings[0].shape[self.dim], loss_at

    def _embeddings_in(
        self, arguments: dict[int | str, Any], named: Sequence[int | str]
    ) -> list[Tensor]:
        """At least one; all have one number of features."""
        missing = [name for name in named if name not in arguments]
        leaves = tree_leaves([arguments[name] for name in named if name in arguments])
        found = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if missing or not found:
            raise ValueError(
                "the arguments of the loss must be embeddings, floating-point tensors, and those "
                f"that are named must be there, got arguments {list(arguments)} and "
                f"embeddings={self.embeddings}"
            )
        n = found[0].shape[self.dim]
        least = min(found[0].ndim, 2)
        alike = [e for e in found if e.ndim >= least and _has_features(e, self.dim, n)]
        if self.embeddings is not None and len(alike) < len(found):
            raise ValueError(
                f"embeddings must have one number of features along dim={self.dim}, got shapes "
                f"{[tuple(embedding.shape) for embedding in found]}"
            )
        return alike

    def _prefix(self, embedding: Tensor, k: int) -> Tensor:
        prefix = embedding.narrow(self.dim, 0, k)
        return normalize(prefix, dim=self.dim) if self.normalize else prefix

    def extra_repr(self) -> str:
        parts = [f"lengths={self.lengths}", f"draws={self.draws}"]
        parts += ["normalize=True"] if self.normalize else []
        parts += [f"dim={self.dim}"] if self.dim != -1 else []
        parts += [f"embeddings={self.embeddings}"] if self.embeddings is not None else []
        return ", ".join(parts)


def _has_features(embedding: Tensor, dim: int, n: int) -> bool:
    return -embedding.ndim <= dim < embedding.ndim and embedding.shape[dim] == n


@dataclass(frozen=True)
class _NotZero:
    """The lengths, given that k is not 0."""

    lengths: Lengths

    def pmf(self, n: int) -> Tensor:
        pmf = self.lengths.pmf(n)
        pmf = torch.cat([pmf.new_zeros(1), pmf[1:]])
        if not pmf.sum() > 0:
            raise ValueError(f"lengths must draw some k above 0, got {self.lengths} for n={n}")
        return pmf / pmf.sum()
