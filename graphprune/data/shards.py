"""Rows of tokens in files: written piece by piece, opened without reading them into memory.

A shard is a safetensors file with ``tokens`` (int32, all rows joined), ``offsets`` (int64, where each row begins, and
where the last ends) and, of instructions, ``counts`` (uint8, 1 where a loss is taken).
"""

from __future__ import annotations

import hashlib
import os
import secrets
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from graphprune.errors import GraphPruneError

NO_LOSS = -100
SHARD_TOKENS = 2**24
_READ = 2**20


@dataclass(frozen=True)
class Written:
    """What an index says of a shard: its file's name, rows, tokens, those that count in the loss, bytes and sha256."""

    file: str
    rows: int
    tokens: int
    counted: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """An open shard. What is kept of the file is a map; processes that get a copy open the file for themselves."""

    path: Path
    written: Written
    instruct: bool

    def row(self, index: int) -> dict[str, torch.Tensor]:
        begin, end = self._offsets[index : index + 2].tolist()
        tokens = self._slices["tokens"][begin:end].to(torch.int64)
        if not self.instruct:
            return {"input_ids": tokens, "labels": tokens.clone()}
        counts = self._slices["counts"][begin:end].bool()
        return {"input_ids": tokens, "labels": tokens.where(counts, NO_LOSS)}

    @cached_property
    def _slices(self) -> dict[str, Any]:
        file = safe_open(self.path, framework="pt")
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118

    @cached_property
    def _offsets(self) -> torch.Tensor:
        return self._slices["offsets"][:]

    def __reduce__(self) -> Any:
        return Shard, (self.path, self.written, self.instruct)

    def check(self) -> Shard:
        """The shard, when the file is what the index says; else a :class:`GraphPruneError` that names it."""
        try:
            self._check()
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise GraphPruneError(f"{self.path} is damaged: {error}.") from error
        return self

    def _check(self) -> None:
        written = self.written
        size = self.path.stat().st_size
        if size != written.bytes:
            raise ValueError(f"it has {size:,} bytes instead of {written.bytes:,}")
        if sha256_of(self.path) != written.sha256:
            raise ValueError("its sha256 is not that of the index")
        shapes = {name: (part.get_shape(), part.get_dtype()) for name, part in self._slices.items()}
        wanted = {"tokens": ([written.tokens], "I32"), "offsets": ([written.rows + 1], "I64")}
        if self.instruct:
            wanted["counts"] = ([written.tokens], "U8")
        if shapes != wanted:
            raise ValueError(f"it holds {shapes} instead of {wanted}")
        offsets = self._offsets
        if int(offsets[0]) != 0 or int(offsets[-1]) != written.tokens or bool((offsets.diff() <= 0).any()):
            raise ValueError("its rows do not follow one another")


@dataclass(frozen=True)
class Rows:
    """Rows in memory-mapped shards, as a dataset of ``torch.utils.data``.

    ``rows[i]`` is ``{"input_ids": int64 (n,), "labels": int64 (n,)}``; labels are −100 where no loss is taken. All rows
    of pretraining text have the length they were prepared with (packed); instructions have at most that, one example
    a row, without padding.
    """

    shards: Sequence[Shard]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"There is no row {index}: there are {len(self)}.")
        number = bisect_right(self._ends, at)
        return self.shards[number].row(at - (self._ends[number - 1] if number else 0))

    @property
    def tokens(self) -> int:
        """The number of labels that count, in all."""
        return sum(shard.written.counted for shard in self.shards)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(shard.written.rows for shard in self.shards))


# ------------------------------------------------------------------------------------------------------------ writing


def write_shards(rows: Iterable[np.ndarray], folder: Path, part: str, instruct: bool) -> list[Written]:
    """Write rows of int32 tokens, coded as :func:`coded` does, as shards ``PART-00000.safetensors`` and so on.

    Raises :class:`GraphPruneError` when they cannot be written.
    """
    return [_write(some, folder, f"{part}-{n:05}.safetensors", instruct) for n, some in enumerate(_groups(rows))]


def coded(tokens: Sequence[int], counts: Sequence[bool]) -> np.ndarray:
    """Tokens and whether each counts, in one int32: a token that does not count is ``~token``, which is negative."""
    ids = np.asarray(tokens, dtype=np.int32)
    return np.where(np.asarray(counts, dtype=bool), ids, ~ids)


def _groups(rows: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    group: list[np.ndarray] = []
    size = 0
    for row in rows:
        if group and size + len(row) > SHARD_TOKENS:
            yield group
            group, size = [], 0
        group.append(row)
        size += len(row)
    if group:
        yield group


def _write(rows: Sequence[np.ndarray], folder: Path, name: str, instruct: bool) -> Written:
    flat = np.concatenate(rows)
    counts = flat >= 0
    tensors: dict[str, np.ndarray] = {
        "tokens": np.where(counts, flat, ~flat).astype(np.int32),
        "offsets": np.array([0, *accumulate(map(len, rows))], dtype=np.int64),
    }
    if instruct:
        tensors["counts"] = counts.astype(np.uint8)
    data = save(tensors)
    replace_bytes(folder / name, data)
    return Written(name, len(rows), len(flat), int(counts.sum()), len(data), hashlib.sha256(data).hexdigest())


def replace_bytes(target: Path, data: bytes) -> None:
    """Write a file that has all of ``data``, on the disk and not only in its cache, or is as it was.

    Raises :class:`GraphPruneError` when it cannot be written.
    """
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        with opened(partial) as file:
            put(file, data, target.parent)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:  # of flush, fsync and replace
        raise not_written(target.parent, len(data), error) from error
    finally:
        partial.unlink(missing_ok=True)


def opened(path: Path) -> BinaryIO:
    """A new file to write to. Raises :class:`GraphPruneError` when it cannot be made."""
    try:
        return path.open("wb")
    except OSError as error:
        raise not_written(path.parent, 0, error) from error


def put(file: BinaryIO, data: bytes, folder: Path) -> None:
    """Write to a file in ``folder``. Raises :class:`GraphPruneError` when there is no space left, or another reason."""
    try:
        write(file, data)
    except OSError as error:
        raise not_written(folder, len(data), error) from error


def write(file: BinaryIO, data: bytes) -> None:
    """The one place where bytes of a corpus are written."""
    file.write(data)


def not_written(folder: Path, wanted: int, error: OSError) -> GraphPruneError:
    return GraphPruneError(
        f"{wanted:,} bytes could not be written to {folder}: {error.strerror or error}. What was begun is removed: "
        "make room, or give another folder, and call again."
    )


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read piece by piece."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ):
            found.update(piece)
    return found.hexdigest()
