"""Write a safetensors file piece by piece, byte for byte what ``save_file`` of safetensors writes of the same tensors.

A file is the length of its header (8 bytes, little-endian), the header (JSON, padded with spaces to a multiple of 8),
and the tensors one behind another, those of the widest dtypes first, then by name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch

from graphprune.errors import GraphPruneError
from graphprune.io.manifest import StoredFile
from graphprune.streaming.tensor_files import DTYPES
from graphprune.trace.stored import stored_of

# In the order in which safetensors sorts them; the last comes first in a file.
_ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_AT_ONCE = 2**26
_WAITING = 4  # pieces that may wait to be written

Count = Callable[[int], None]


def write_shard(tensors: dict[str, torch.Tensor], path: Path, count: Count) -> StoredFile:
    """Write ``tensors``, in memory or on disk; ``count`` is told how many bytes more are on their way. Raises OSError.

    One thread reads and slices, another one writes, and a third one sums up.
    """
    names = _sorted(tensors)
    digest, size = hashlib.sha256(), 0
    waiting: deque[tuple[Future[None], ...]] = deque()
    with open(path, "wb") as file, ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as summer:

        def put(data: memoryview) -> None:
            file.write(data)
            _start_writing(file, data.nbytes)

        def finish_first() -> None:
            for job in waiting.popleft():
                job.result()

        for data in _contents(tensors, names):
            waiting.append((writer.submit(put, data), summer.submit(digest.update, data)))
            if len(waiting) > _WAITING:
                finish_first()
            size += data.nbytes
            count(data.nbytes)
        while waiting:
            finish_first()
    return StoredFile(size, digest.hexdigest())


def _start_writing(file: BinaryIO, more: int) -> None:
    """Every so many bytes have the system write what it holds to the disk, where it has to be anyway, and forget it."""
    end = file.tell()
    if hasattr(os, "posix_fadvise") and end // _AT_ONCE > (end - more) // _AT_ONCE:
        file.flush()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sorted(tensors: dict[str, torch.Tensor]) -> list[str]:
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or tensor.layout is not torch.strided:
            raise GraphPruneError(f"{name} is a {tensor.layout} tensor of {tensor.dtype}, which cannot be streamed.")
    return sorted(tensors, key=lambda name: (-_ORDER.index(_NAMES[tensors[name].dtype]), name.encode()))


def _contents(tensors: dict[str, torch.Tensor], names: list[str]) -> Iterator[memoryview]:
    """All bytes of the file in order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    yield memoryview(len(header).to_bytes(8, "little") + header)
    for name in names:
        stored = stored_of(tensors[name])
        for piece in (tensors[name].detach(),) if stored is None else stored.pieces():
            if piece.numel():
                yield memoryview(piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
