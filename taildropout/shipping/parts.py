"""Safetensors files of parts: bytes with a checksum each, which are read one by one."""

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b, sha256
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.copies import PruningError

_MOST_OF_HEADER = 100_000_000  # bytes, as in safetensors
_DIGEST = 16  # bytes

Blocks = Callable[[], Iterable[Tensor]]
"""The bytes of a part, piece by piece, as uint8 tensors; asked for twice."""


def write_parts(
    path: Path, key: str, record: Mapping[str, Any], parts: Mapping[str, Blocks]
) -> None:
    """Write the parts, in this order, and the record under `key` of the metadata."""
    header: dict[str, Any] = {}
    digests, end = [], 0
    for name, blocks in parts.items():
        digest, start = blake2b(digest_size=_DIGEST), end
        for block in blocks():
            digest.update(block.numpy().data)
            end += len(block)
        digests.append(digest.hexdigest())
        header[name] = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
    whole = {**record, "digests": digests}
    whole["sha256"] = _digest(whole, header)
    header["__metadata__"] = {key: _json(whole)}
    text = _json(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for blocks in parts.values():
            for block in blocks():
                file.write(block.numpy().data)


class Parts:
    """An opened file by `write_parts`, of which nothing but the header is read yet.

    Attributes:
        record: what was written.
        bytes_of_header: how many were read for it.

    Raises:
        PruningError: the file is damaged, or another one.
    """

    def __init__(self, file: FileIO, key: str, written_by: str) -> None:
        self._file, self._name = file, repr(str(file.name))
        header = self._header()
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or key not in metadata:
            raise PruningError(f"{self._name} was not written by {written_by}")
        try:
            self.record = json.loads(metadata[key])
            intact = self.record.pop("sha256") == _digest(self.record, header)
            self._digests = dict(zip(header, self.record.pop("digests"), strict=True))
            end = max(place["data_offsets"][1] for place in header.values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self.damaged(repr(error)) from error
        if not intact:
            raise PruningError(f"{self._name} has been changed since it was written")
        self._places = header
        if file.seek(0, 2) != self.bytes_of_header + end:
            raise self._not_whole(f"it has {file.tell()} bytes")

    def damaged(self, what: str) -> PruningError:
        return PruningError(f"{self._name} holds a damaged plan: {what}")

    def size(self, part: str) -> int:
        size: int = self._places[part]["shape"][0]
        return size

    @contextmanager
    def reading(self, part: str) -> Iterator[Callable[[Sequence[int], torch.dtype], Tensor]]:
        """A function that reads the next tensor of a part, from its start: its shape, its dtype.

        Raises:
            PruningError: at the end, the bytes that were read are not those that were written.
        """
        digest = blake2b(digest_size=_DIGEST)
        self._file.seek(self.bytes_of_header + self._places[part]["data_offsets"][0])

        def following(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            count = torch.Size(shape).numel() * dtype.itemsize
            data = torch.empty(count, dtype=torch.uint8)
            self._fill(data.numpy().data)
            digest.update(data.numpy().data)
            return data.view(dtype).reshape(tuple(shape))

        yield following
        if digest.hexdigest() != self._digests[part]:
            raise PruningError(f"{self._name} has been changed since it was written: {part!r}")

    def _header(self) -> dict[str, Any]:
        length = bytearray(8)
        self._fill(memoryview(length))
        (size,) = struct.unpack("<Q", length)
        if size > _MOST_OF_HEADER:
            raise self._not_whole(f"its header has {size} bytes")
        text = bytearray(size)
        self._fill(memoryview(text))
        self.bytes_of_header = 8 + size
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._not_whole(str(error)) from error
        if not isinstance(header, dict):
            raise self._not_whole("its header is no table")
        return header

    def _fill(self, view: memoryview) -> None:
        while view:
            count = self._file.readinto(view)
            if not count:
                raise self._not_whole("it ends too early")
            view = view[count:]

    def _not_whole(self, why: str) -> PruningError:
        return PruningError(f"{self._name} is not a whole safetensors file: {why}")


def _json(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"))


def _digest(record: Mapping[str, Any], header: Mapping[str, Any]) -> str:
    return sha256(_json([record, header]).encode()).hexdigest()
