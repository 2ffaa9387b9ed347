"""WordNet's glosses, and which synset is a kind of which, from Debian's package `wordnet-base`."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from taildropout.demo.data import DataError

FOLDER = Path("/usr/share/wordnet")  # where Debian puts the files
PARTS = ["noun", "verb", "adj", "adv"]
_LICENCE = "  "  # how its lines begin


@dataclass(frozen=True)
class Synset:
    """Words of one meaning: what they mean, with examples, and the keys of their hypernyms."""

    gloss: str
    hypernyms: tuple[str, ...]


@lru_cache(maxsize=1)
def synsets(folder: Path = FOLDER) -> dict[str, Synset]:
    """All of them by key, such as `n00001740`, in the order of the files.

    Raises:
        DataError: a file is missing.
    """
    return {key: synset for part in PARTS for key, synset in _read(folder / f"data.{part}")}


def _read(path: Path) -> Iterator[tuple[str, Synset]]:
    if not path.is_file():
        raise DataError(
            f"WordNet is not in {path.parent} ({path.name} is missing): install Debian's package "
            "(apt-get install wordnet-base)"
        )
    with path.open(encoding="ascii") as lines:
        for line in lines:
            if not line.startswith(_LICENCE):
                yield _parsed(line, path.suffix[1])


def _parsed(line: str, part: str) -> tuple[str, Synset]:
    """As wndb(5WN) has it: the offset in the file, the words, the pointers, ` | `, the gloss."""
    entry, _, gloss = line.partition(" | ")
    fields = entry.split()
    pointers = fields[4 + 2 * int(fields[3], 16) :]  # two fields for each word, the count in hex
    kinds, keys = pointers[1::4], [pos + key for key, pos in zip(pointers[2::4], pointers[3::4])]
    count = int(pointers[0])
    hypernyms = [key for kind, key in zip(kinds[:count], keys, strict=False) if kind == "@"]
    return part + fields[0], Synset(gloss.strip(), tuple(hypernyms))
