"""Read a safetensors file tensor by tensor and row by row, without mapping it: what is read is all that is resident."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphprune.errors import GraphPruneError
from graphprune.io.checked_json import of_kind, take
from graphprune.trace.stored import Stored

# As safetensors names them. Packed and 8-bit floating-point weights are those of quantised checkpoints.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MOST_DIMENSIONS = 64
_LARGEST_HEADER = 100_000_000  # safetensors refuses longer ones too


class TensorFile:
    """A safetensors file: ``tensors`` has every tensor in it, by name.

    Raises :class:`GraphPruneError` when its header says anything that is not so; nothing that it says is allocated.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed by close)
            self.bytes = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise GraphPruneError(f"{path} could not be read: {error.strerror or error}.") from error
        try:
            self.header = self._read_header()
            self.tensors = self._parsed(self.header)
        except GraphPruneError:
            self.close()
            raise

    def close(self) -> None:
        """Nothing is read any more."""
        self._file.close()

    def read(self, offset: int, count: int) -> np.ndarray:
        """``count`` bytes from ``offset`` of the file on, as uint8. Raises :class:`GraphPruneError`."""
        data = np.empty(count, dtype=np.uint8)
        view, done = memoryview(data), 0
        try:
            self._file.seek(offset)
            while done < count:
                got = self._file.readinto(view[done:])
                if not got:
                    raise GraphPruneError(f"{self.path} became shorter while it was read: leave it as it is meanwhile.")
                done += got
        except OSError as error:
            raise GraphPruneError(f"{self.path} could not be read: {error.strerror or error}.") from error
        return data

    def _read_header(self) -> bytes:
        if self.bytes < 8:
            raise GraphPruneError(f"{self.path} is no safetensors file, or truncated: it has {self.bytes} bytes.")
        length = int.from_bytes(self.read(0, 8).tobytes(), "little")
        if length > min(_LARGEST_HEADER, self.bytes - 8):
            raise GraphPruneError(
                f"{self.path} is no safetensors file, or truncated: it announces a header of {length:,} bytes, and has "
                f"{self.bytes:,}."
            )
        return self.read(8, length).tobytes()

    def _parsed(self, header: bytes) -> dict[str, OnDisk]:
        try:
            data = json.loads(header, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise GraphPruneError(f"{self.path} is damaged, its header is not JSON: {error}.") from None
        of_kind(data, dict, str(self.path)).pop("__metadata__", None)
        start, end = 8 + len(header), 0
        found: dict[str, OnDisk] = {}
        entries = [(name, *self._entry(name, item)) for name, item in data.items()]
        for name, shape, dtype, begin, finish in sorted(entries, key=lambda entry: entry[3:]):
            if begin != end:
                raise GraphPruneError(f"{self.path} is damaged: {name!r} does not begin where the one before it ends.")
            found[name], end = OnDisk(self, start + begin, shape, dtype), finish
        if start + end != self.bytes:
            raise GraphPruneError(
                f"{self.path} is truncated or damaged: it has {self.bytes:,} bytes, its header speaks of "
                f"{start + end:,}."
            )
        return found

    def _entry(self, name: str, item: Any) -> tuple[tuple[int, ...], torch.dtype, int, int]:
        where = f"{self.path}: {name!r}"
        of_kind(item, dict, where)
        kind = take(item, "dtype", str, where)
        if kind not in DTYPES:
            raise GraphPruneError(
                f"{where} is stored as {kind}: quantised or packed weights cannot be sliced. Store them in a "
                "floating-point dtype, prune, and quantise the result."
            )
        shape = tuple(of_kind(size, int, f"{where}: shape") for size in take(item, "shape", list, where))
        places = [of_kind(place, int, f"{where}: offsets") for place in take(item, "data_offsets", list, where)]
        if len(places) != 2 or min(shape, default=0) < 0 or len(shape) > _MOST_DIMENSIONS:
            raise GraphPruneError(f"{where} is damaged: shape {list(shape[:9])}, offsets {places[:9]}.")
        begin, end = places
        if begin < 0 or end - begin != math.prod(shape) * DTYPES[kind].itemsize:
            raise GraphPruneError(
                f"{where} is damaged: {kind} of shape {list(shape)} does not take {end - begin:,} bytes from {begin:,}."
            )
        return shape, DTYPES[kind], begin, end


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


class OnDisk(Stored):
    """A tensor in a safetensors file."""

    def __init__(self, file: TensorFile, offset: int, shape: tuple[int, ...], dtype: torch.dtype):
        super().__init__(shape, dtype)
        self.file, self._offset = file, offset

    def rows(self, start: int, stop: int) -> torch.Tensor:
        data = self.file.read(self._offset + start * self.row_bytes, (stop - start) * self.row_bytes)
        shape = (stop - start, *self.shape[1:])
        if not data.size:
            return torch.empty(shape, dtype=self.dtype)
        return torch.from_numpy(data).view(self.dtype).view(shape)
