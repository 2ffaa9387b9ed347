"""Writing files whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to, in the same folder, renamed to `path` at the end.

    When the block fails, the temporary file is removed and what was at `path` is left as it was.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with written_whole(folder / "note.txt") as temporary:
        ...     _ = temporary.write_text("hello")
        >>> [file.name for file in folder.iterdir()]
        ['note.txt']
    """
    path = Path(path)
    # The ending stays: matplotlib, for one, takes the format from it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def bytes_of(tensor: Tensor) -> Tensor:
    """Of its numbers, in the order of its dims: uint8, on the CPU."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)  # of stride 1
    flat.copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8)
