"""WordNet's glosses, and which synset is a kind of which, from Debian's package `wordnet-base`."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from taildropout.demo.data import DataError

FOLDER = Path("/usr/share/wordnet")  # where Debian puts the files
PARTS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
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
    return {
        part + offset: synset
        for part, name in PARTS.items()
        for offset, synset in _read(folder / f"data.{name}")
    }


def _read(path: Path) -> Iterator[tuple[str, Synset]]:
    if not path.is_file():
        raise DataError(
            f"WordNet is not in {path.parent} ({path.name} is missing): install Debian's package "
            "(apt-get install wordnet-base)"
        )
    with path.open(encoding="ascii") as lines:
        for line in lines:
            if not line.startswith(_LICENCE):
                yield _parsed(line)


def _parsed(line: str) -> tuple[str, Synset]:
    """As wndb(5WN) has it: the offset in the file, the words, the pointers, ` | `, the gloss."""
    entry, _, gloss = line.partition(" | ")
    fields = entry.split()
    first = 4 + 2 * int(fields[3], 16)  # two fields for each word, the count in hex
    pointers = range(first + 1, first + 1 + 4 * int(fields[first]), 4)
    hypernyms = [fields[i + 2] + fields[i + 1] for i in pointers if fields[i] == "@"]
    return fields[0], Synset(gloss.strip(), tuple(hypernyms))
