"""Weights that stay on disk: a stand-in on the meta device for each, with what reads it behind it.

What is traced, inferred and planned is a structure without values. A pass that wants some asks for them one tensor at a
time (:meth:`graphprune.ir.program.Program.weight`) or, where a tensor may be too large, one block at a time
(:func:`blocks`). What :mod:`graphprune.passes.rewrite` makes of a stand-in is another one, whose values are sliced as
they are read; so a pruned model is on disk too until it is written.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

_STORED = "graphprune_stored"  # the attribute of a stand-in
_ELEMENTS = 2**18  # of a block: it stays in the cache, also as float32
_BYTES = 2**22  # that are read at a time


class Stored(ABC):
    """The values of a tensor that is not in memory: its ``shape`` and ``dtype``, and a way to read them.

    With ``whole``, any row costs as much as all.
    """

    whole = False

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self.shape, self.dtype = tuple(shape), dtype

    @abstractmethod
    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Places ``start`` to ``stop`` of the first dimension, on the CPU; its memory is the caller's.

        A tensor without dimensions has one row, and that has the shape ``(1,)``.
        """

    @property
    def row_bytes(self) -> int:
        """Bytes of one place of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def length(self) -> int:
        """Places of the first dimension."""
        return self.shape[0] if self.shape else 1

    def read(self) -> torch.Tensor:
        """All of it."""
        return self.rows(0, self.length).reshape(self.shape)

    def pieces(self, most: int = _BYTES) -> Iterator[torch.Tensor]:
        """All rows in order, so many at a time that they have ``most`` bytes, one at least."""
        step = self.length if self.whole else max(1, most // max(1, self.row_bytes))
        for start in range(0, self.length, max(1, step)):
            yield self.rows(start, min(self.length, start + step))


class Converted(Stored):
    """``source`` in another dtype."""

    def __init__(self, source: Stored, dtype: torch.dtype):
        super().__init__(source.shape, dtype)
        self.whole = source.whole
        self._source = source

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self._source.rows(start, stop).to(self.dtype)


def stand_in(stored: Stored, requires_grad: bool | None = None) -> torch.Tensor:
    """A tensor on the meta device for ``stored``; a parameter unless ``requires_grad`` is None."""
    empty = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
    made = empty if requires_grad is None else nn.Parameter(empty, requires_grad=requires_grad)
    setattr(made, _STORED, stored)
    return made


def stand_in_like(stored: Stored, old: torch.Tensor) -> torch.Tensor:
    """A stand-in of the same kind as ``old``: a parameter with its requires_grad, or a buffer."""
    return stand_in(stored, old.requires_grad if isinstance(old, nn.Parameter) else None)


def stored_of(tensor: torch.Tensor) -> Stored | None:
    """What ``tensor`` stands for, None if it stands for itself."""
    return getattr(tensor, _STORED, None)


def is_stored(model: nn.Module) -> bool:
    """Whether any weight of ``model`` is on disk."""
    return any(stored_of(parameter) is not None for parameter in model.parameters())


def lacks_weights(model: nn.Module) -> bool:
    """Whether any parameter has no value, neither in memory nor on disk."""
    return any(parameter.is_meta and stored_of(parameter) is None for parameter in model.parameters())


Place = tuple[slice, ...]


def blocks(weight: torch.Tensor) -> Iterator[tuple[Place, torch.Tensor]]:
    """All of ``weight``, in memory or on disk, in small blocks: where each is, and its values.

    A place has a slice for every dimension. In memory and on disk the blocks are the same.
    """
    stored = stored_of(weight)
    if stored is None:
        yield from _split(weight.detach(), 0, ())
        return
    step, start = _rows(stored.shape, 0), 0
    most = max(_BYTES // max(1, step * stored.row_bytes), 1) * step * stored.row_bytes
    for piece in _ahead(stored.pieces(most)):
        for (first, *others), block in _split(piece, 0, ()):
            yield (slice(first.start + start, first.stop + start), *others), block
        start += len(piece)


def _ahead(pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same, with the next one being read while one is worked on."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, pieces, None)
        while (piece := coming.result()) is not None:
            coming = reader.submit(next, pieces, None)
            yield piece


def _split(tensor: torch.Tensor, dim: int, before: Place) -> Iterator[tuple[Place, torch.Tensor]]:
    """``tensor`` along ``dim``, so many places at a time that a block is small, or one and that split further."""
    start = 0
    for part in tensor.split(_rows(tensor.shape, dim), dim):
        place = (*before, slice(start, start + part.shape[dim]))
        if part.numel() > _ELEMENTS and dim + 1 < tensor.ndim:
            yield from _split(part, dim + 1, place)
        else:
            yield (*place, *(slice(0, size) for size in tensor.shape[dim + 1 :])), part
        start += part.shape[dim]


def _rows(shape: tuple[int, ...], dim: int) -> int:
    """How many places of ``dim`` make a block, when there is one place of every dimension before."""
    return max(1, _ELEMENTS // max(1, math.prod(shape[dim + 1 :])))
