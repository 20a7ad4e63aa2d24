"""The tokens of all documents of a source in one file on the disk, until it is known which are held out."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from graphprune.data import shards


class Spool:
    """Documents as int32; ``sizes`` has the number of tokens of each, ``hashes`` a hash of them and of the seed.

    Hashes are uniform numbers of 64 bits, the same for documents that are equal.
    """

    def __init__(self, path: Path, seed: int):
        self.path = path
        self._key = str(seed).encode()[: hashlib.blake2b.MAX_KEY_SIZE]
        self.sizes, self.hashes = array("q"), array("Q")
        self.tokens = 0
        self._file = shards.opened(path)

    def add(self, tokens: np.ndarray) -> None:
        """Add a document. Raises :class:`GraphPruneError` when it cannot be written."""
        data = tokens.astype("<i4").tobytes()
        shards.put(self._file, data, self.path.parent)
        self.sizes.append(len(tokens))
        self.hashes.append(int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self._key).digest(), "little"))
        self.tokens += len(tokens)

    def finish(self) -> None:
        """Nothing is added any more, and documents can be read."""
        try:
            self._file.close()
        except OSError as error:
            raise shards.not_written(self.path.parent, 4 * self.tokens, error) from error

    def documents(self, which: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """The tokens of some documents, read as they are wanted."""
        flat = np.memmap(self.path, dtype="<i4", mode="r")
        ends = np.cumsum(np.asarray(self.sizes))
        for n in which:
            yield flat[ends[n] - self.sizes[n] : ends[n]]

    def remove(self) -> None:
        """Remove the file."""
        with suppress(OSError):  # on a full disk closing fails too, and what it would have written is not wanted
            self._file.close()
        self.path.unlink(missing_ok=True)
