"""Operations that only put entries to other places, dim by dim: where each feature comes from."""

from collections.abc import Callable, Iterator, Sequence

import sympy
import torch
from torch import Tensor, fx

from .dataflow import Operation, count_of
from .exports import Size, shape
from .relations import Made, Part, Relation, Saying, dims_alike, related, same

Taken = Callable[[int], Tensor] | None
"""Of n features, the number of the one that is at each place of the output, -1 for none of them.

None where sizes say it that are no fixed numbers.
"""


def reshape(operation: Operation) -> Iterator[Saying]:
    """Views, flatten, unflatten: dims in a row that multiply to the same number are one group."""
    source, output = operation.args[0], operation.output
    for dims, out_dims in _groups(shape(source), shape(output)):
        yield from _of_a_group(source, dims, output, out_dims)


def _groups(
    sizes: Sequence[Size], out_sizes: Sequence[Size]
) -> Iterator[tuple[list[int], list[int]]]:
    """The dims of both that hold the same entries, dims of size 1 left out."""
    left = [d for d, size in enumerate(sizes) if size != 1]
    right = [d for d, size in enumerate(out_sizes) if size != 1]
    while left and right:
        dims, out_dims = [left.pop(0)], [right.pop(0)]
        while (ratio := _ratio([sizes[d] for d in dims], [out_sizes[d] for d in out_dims])) != 1:
            # The side with fewer entries takes one dim more. Where symbols don't tell: both do.
            more, fewer = ratio.as_numer_denom()
            if right and not fewer.free_symbols and (more.free_symbols or more > fewer):
                out_dims.append(right.pop(0))
            elif left and not more.free_symbols and (fewer.free_symbols or fewer > more):
                dims.append(left.pop(0))
            elif left or right:
                dims += [left.pop(0)] if left else []
                out_dims += [right.pop(0)] if right else []
            else:
                return
        yield dims, out_dims


def _ratio(sizes: Sequence[Size], out_sizes: Sequence[Size]) -> sympy.Expr:
    if all(isinstance(size, int) for size in [*sizes, *out_sizes]):
        return sympy.Rational(_product(sizes), _product(out_sizes))
    return sympy.cancel(_product(sizes) / _product(out_sizes))


def _product(sizes: Sequence[Size]) -> sympy.Expr:
    return sympy.prod([sympy.sympify(size) for size in sizes])


def _of_a_group(
    source: fx.Node, dims: list[int], output: fx.Node, out_dims: list[int]
) -> Iterator[Relation]:
    whole, parts = None, []
    if len(dims) == len(out_dims) == 1:
        yield from same((source, dims[0]), (output, out_dims[0]))
    elif len(dims) == 1:
        whole, parts = (source, dims[0]), [(output, d) for d in out_dims]
    elif len(out_dims) == 1:
        whole, parts = (output, out_dims[0]), [(source, d) for d in dims]
    if whole is None or (n := count_of(whole)) is None:
        return
    # The number of a feature of the whole, written with one digit for each part.
    digits, stride = [], n
    for place in parts:
        size = count_of(place)
        assert size is not None  # since their product is a number
        stride //= max(size, 1)
        digits.append(Part(place, torch.arange(size), torch.arange(n) // max(stride, 1) % size))
    yield Relation(whole, tuple(digits))


def rearrange(operation: Operation) -> Iterator[Saying]:
    """permute, transpose, movedim, squeeze, unsqueeze: found by what becomes of each dim's size."""
    source, output = operation.args[0], operation.output
    sizes = [1 if size == 1 else 2 + d for d, size in enumerate(shape(source))]
    moved = list(operation.run({source: torch.empty(sizes, device="meta")}).shape)
    yield from dims_alike(
        source, output, {d: moved.index(size) for d, size in enumerate(sizes) if size != 1}
    )


def take_away(dim_argument: int) -> Callable[[Operation], Iterator[Saying]]:
    """select, unbind: one dim is gone."""

    def says(operation: Operation) -> Iterator[Saying]:
        source = operation.args[0]
        rank = len(shape(source))
        gone = operation.arg(dim_argument, "dim", 0) % rank
        yield from dims_alike(
            source, operation.output, {d: d - (d > gone) for d in range(rank) if d != gone}
        )

    return says


def pick_rows(operation: Operation) -> Iterator[Saying]:
    """x[index] with one tensor of numbers: along the other dims all is as it was."""
    source, indices = operation.args[:2]
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) == 1 and given[0][1].meta["val"].dtype in (torch.int64, torch.int32):
        (along, index), rank = given[0], len(shape(source))
        more = len(shape(index)) - 1
        dims = {d: d + more * (d > along) for d in range(rank) if d != along}
        yield from dims_alike(source, operation.output, dims)


def expand(operation: Operation) -> Iterator[Saying]:
    source, output = operation.args[0], operation.output
    missing = len(shape(output)) - len(shape(source))
    for dim, size in enumerate(shape(output)):
        if dim >= missing and shape(source)[dim - missing] != 1:
            yield from same((source, dim - missing), (output, dim))
        elif isinstance(size, int) and size > 1:  # however many copies there are
            yield Relation((output, dim), ())


def fill(operation: Operation) -> Iterator[Saying]:
    """Tensors of one number: however many of it there are."""
    for dim, size in enumerate(shape(operation.output)):
        if isinstance(size, int) and size > 1:
            yield Relation((operation.output, dim), ())


def concatenate(operation: Operation) -> Iterator[Saying]:
    output, sources = operation.output, operation.args[0]
    rank = len(shape(output))
    along = operation.arg(1, "dim", 0) % rank
    start, total = 0, count_of((output, along))
    for source in sources:
        yield from dims_alike(source, output, [d for d in range(rank) if d != along])
        n = count_of((source, along)) if len(shape(source)) == rank else None
        if total is not None and n is not None:
            labels = torch.full((total,), -1)
            labels[start : start + n] = torch.arange(n)
            yield related((source, along), (output, along), torch.arange(n), labels)
            start += n


def stack(operation: Operation) -> Iterator[Saying]:
    """The new dim holds whole values; nothing is said along it."""
    output, sources = operation.output, operation.args[0]
    new = operation.arg(1, "dim", 0) % len(shape(output))
    for source in sources:
        yield from dims_alike(
            source, output, {d: d + (d >= new) for d in range(len(shape(source)))}
        )


def shuffle_pixels(operation: Operation) -> Iterator[Saying]:
    """pixel_shuffle and pixel_unshuffle: a channel is factor² positions, or the reverse."""
    source, output, factor = operation.args[0], operation.output, operation.args[1]
    dim = len(shape(source)) - 3
    yield from dims_alike(source, output, range(dim))
    n, out_n = count_of((source, dim)), count_of((output, dim))
    if n is not None and out_n is not None:
        labels = torch.arange(n) // (factor**2 if n > out_n else 1)
        out_labels = torch.arange(out_n) // (factor**2 if out_n > n else 1)
        yield related((source, dim), (output, dim), labels, out_labels)


# --------------------------------------------------------------- what is taken, along which dims


def take(
    taken: Callable[[Operation], dict[int, Taken]],
) -> Callable[[Operation], Iterator[Saying]]:
    """Along the dims of `taken` features are taken; the others are as they were, seen from behind."""

    def says(operation: Operation) -> Iterator[Saying]:
        source, output = operation.args[0], operation.output
        rank, missing = len(shape(source)), len(shape(output)) - len(shape(source))
        by_dim = taken(operation)
        for dim in range(rank):
            place, out_place = (source, dim), (output, dim + missing)
            n, number_of = count_of(place), by_dim.get(dim)
            if dim not in by_dim:
                yield from same(place, out_place)
            elif n is not None and number_of is not None:
                numbers = number_of(n)
                if len(numbers) == count_of(out_place):
                    yield related(place, out_place, torch.arange(n), numbers)
                    if (numbers < 0).any():
                        yield Made(out_place, numbers < 0)

    return says


def _along(operation: Operation, position: int, default: int = 0) -> int:
    return int(operation.arg(position, "dim", default)) % len(shape(operation.args[0]))


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, int)


def by_slice(operation: Operation) -> dict[int, Taken]:
    start, end, step = (
        operation.arg(i, name) for i, name in ((2, "start"), (3, "end"), (4, "step"))
    )
    known = all(map(_is_number, (start, end, step)))
    return {_along(operation, 1): (lambda n: torch.arange(n)[start:end:step]) if known else None}


def by_narrow(operation: Operation) -> dict[int, Taken]:
    start, length = operation.arg(2, "start"), operation.arg(3, "length")
    known = isinstance(start, int) and isinstance(length, int)
    taken: Taken = (lambda n: torch.arange(n).narrow(0, start, length)) if known else None
    return {_along(operation, 1): taken}


def by_split(operation: Operation) -> dict[int, Taken]:
    """Parts of one size, mostly computed from the number of features: as many parts of another n."""
    dim, size, pick = _along(operation, 2), operation.arg(1, "split_size"), operation.pick
    whole = count_of((operation.args[0], dim))
    if not isinstance(size, int) or whole is None or pick is None:
        return {dim: None}
    parts = -(-whole // size)

    def taken(n: int) -> Tensor:
        of_size = size if n == whole else max(1, -(-n // parts))
        part: Tensor = torch.arange(n).split(of_size)[pick]
        return part

    return {dim: taken}


def by_chunk(operation: Operation) -> dict[int, Taken]:
    chunks, pick = operation.arg(1, "chunks"), operation.pick
    return {_along(operation, 2): lambda n: torch.arange(n).chunk(chunks)[pick or 0]}


def by_split_with_sizes(operation: Operation) -> dict[int, Taken]:
    sizes, pick = operation.arg(1, "split_sizes"), operation.pick
    known = all(map(_is_number, sizes)) and pick is not None
    taken: Taken = (lambda n: torch.arange(n).split(list(sizes))[pick]) if known else None
    return {_along(operation, 2): taken}


def by_roll(operation: Operation) -> dict[int, Taken]:
    shifts, dims = operation.arg(1, "shifts"), operation.arg(2, "dims", ())
    rank = len(shape(operation.args[0]))
    if not dims:  # of all entries in a row
        return dict.fromkeys(range(rank))

    def roll(shift: object) -> Taken:
        return (lambda n: torch.arange(n).roll(shift)) if isinstance(shift, int) else None

    return {dim % rank: roll(shift) for shift, dim in zip(shifts, dims, strict=True)}


def by_flip(operation: Operation) -> dict[int, Taken]:
    rank = len(shape(operation.args[0]))
    return {dim % rank: lambda n: torch.arange(n).flip(0) for dim in operation.arg(1, "dims")}


def by_channel_shuffle(operation: Operation) -> dict[int, Taken]:
    groups = operation.arg(1, "groups")
    return {1: lambda n: torch.arange(n).view(groups, -1).T.flatten()}


def by_repeat(operation: Operation) -> dict[int, Taken]:
    rank, repeats = len(shape(operation.args[0])), operation.arg(1, "repeats")

    def tile(count: object) -> Taken:
        return (lambda n: torch.arange(n).repeat(count)) if isinstance(count, int) else None

    return {d: tile(count) for d, count in enumerate(repeats[len(repeats) - rank :])}


def by_repeat_interleave(operation: Operation) -> dict[int, Taken]:
    rank, count = len(shape(operation.args[0])), operation.arg(1, "repeats")
    dim = operation.arg(2, "dim")
    if dim is None or not isinstance(count, int):
        return dict.fromkeys(range(rank) if dim is None else [dim % rank])
    return {dim % rank: lambda n: torch.arange(n).repeat_interleave(count)}


def by_index(operation: Operation) -> dict[int, Taken]:
    index = operation.args[2]
    if not operation.flow.is_constant(index):
        return {_along(operation, 1): None}
    numbers = operation.flow.constant(index).long().flatten()
    return {_along(operation, 1): lambda n: numbers if n > int(numbers.max()) else numbers[:0]}


def by_constant_pad(operation: Operation) -> dict[int, Taken]:
    rank, amounts = len(shape(operation.args[0])), operation.arg(1, "pad")
    result: dict[int, Taken] = {}
    for i in range(len(amounts) // 2):
        before, after = amounts[2 * i : 2 * i + 2]
        if (before, after) != (0, 0):
            known = isinstance(before, int) and isinstance(after, int)
            result[rank - 1 - i] = _padded(before, after) if known else None
    return result


def _padded(before: int, after: int) -> Taken:
    return lambda n: torch.nn.functional.pad(torch.arange(n), [before, after], value=-1)


def by_pad(operation: Operation) -> dict[int, Taken]:
    by_dim = by_constant_pad(operation)
    return by_dim if is_filled(operation) else dict.fromkeys(by_dim)


def is_filled(operation: Operation) -> bool:
    """Whether what is padded gets one value, and not entries from elsewhere."""
    return bool(operation.arg(2, "mode", "constant") == "constant")
