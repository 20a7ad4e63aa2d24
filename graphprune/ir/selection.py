"""What is kept of a tensor: masks at full size and indices at the new size, from what is kept of each leaf axis.

A *ragged* leaf keeps, under each index of its outer axis, indices of its own, the same number everywhere. What is kept
along a dimension can then depend on the position in another one: the weights ``(experts, width)`` of batched experts
keep other columns in every row. So everything here is computed from coordinates: at every position of a dimension, the
index of each leaf below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from graphprune.ir.axes import Axis, expand_mask, find, leaves

_ABSENT = -1


@dataclass(frozen=True)
class Kept:
    """What is kept of one leaf.

    ``indices`` is int64, sorted, of shape ``(count,)``; for a leaf that is ragged under ``outer``, of shape
    ``(outer.size, count)``.
    """

    size: int
    indices: torch.Tensor
    outer: Axis | None = None

    @property
    def count(self) -> int:
        return self.indices.shape[-1]

    @cached_property
    def mask(self) -> torch.Tensor:
        """Boolean, of shape ``(size,)`` or ``(outer.size, size)``."""
        shape = (*self.indices.shape[:-1], self.size)
        return torch.zeros(shape, dtype=torch.bool).scatter_(-1, self.indices, True)


Selection = dict[Axis, Kept]  # leaf → what is kept of it, for every leaf that loses indices


def mask_of(dims: Sequence[Axis], dim: int, selection: Selection) -> torch.Tensor | None:
    """Where dimension ``dim`` of a tensor is kept, or None when all of it is.

    Boolean, as many dimensions as ``dims``, of size 1 where it does not depend on the position.
    """
    kind = _kind(dims[dim], selection)
    if kind is None:
        return None
    if kind == "shared":
        return _along(_shared_mask(dims[dim], selection), dim, len(dims))
    places = _Places(dims, lambda leaf: leaf.size)
    mask = torch.ones([1] * len(dims), dtype=torch.bool)
    for leaf, place in places.of(dim):
        kept = selection.get(leaf)
        if kept is not None:
            above = () if kept.outer is None else (places.index(kept.outer, dim),)
            mask = mask & (kept.mask[(*above, place.clamp(min=0))] | (place == _ABSENT))
    return mask


def index_of(dims: Sequence[Axis], dim: int, selection: Selection) -> torch.Tensor | None:
    """The old position of every new position along dimension ``dim`` of a tensor, or None when all of it is kept.

    int64, as many dimensions as ``dims``, of size 1 where it does not depend on the position.
    """
    kind = _kind(dims[dim], selection)
    if kind is None:
        return None
    if kind == "shared":
        return _along(_shared_mask(dims[dim], selection).nonzero(), dim, len(dims))
    places = _Places(dims, lambda leaf: selection[leaf].count if leaf in selection else leaf.size)
    old = iter([places.old(leaf, place, dim, selection) for leaf, place in places.of(dim)])
    return _position(dims[dim], old)


def _kind(axis: Axis, selection: Selection) -> Literal["shared", "ragged"] | None:
    """Whether what is kept of ``axis`` is one choice, or depends on outer indices; None when all of it is kept."""
    below = [selection[leaf] for leaf in leaves(axis) if leaf in selection]
    if not below:
        return None
    return "shared" if all(kept.outer is None for kept in below) else "ragged"


def _shared_mask(axis: Axis, selection: Selection) -> torch.Tensor:
    return expand_mask(axis, lambda leaf: selection[leaf].mask if leaf in selection else None)


def _along(values: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    """A vector in the place of dimension ``dim`` of ``rank``."""
    return values.view([-1 if i == dim % rank else 1 for i in range(rank)])


def sum_by_pair(dims: Sequence[Axis], dim: int, leaf: Axis, outer: Axis, values: torch.Tensor) -> torch.Tensor:
    """Sum ``values`` over all positions that an index of ``outer`` and one of ``leaf`` own together.

    ``leaf`` is in dimension ``dim`` and ragged under ``outer``. ``values`` has as many dimensions as ``dims``, of size
    1 where they do not depend on the position. Returns shape ``(outer.size, leaf.size)``.
    """
    places = _Places(dims, lambda axis: axis.size)
    out = torch.zeros(outer.size, leaf.size, dtype=values.dtype)
    for other, place in places.of(dim):
        if other is find(leaf):
            above, inside, share = torch.broadcast_tensors(places.index(outer, dim), place, values)
            here = inside != _ABSENT
            out.index_put_((above[here], inside[here]), share[here], accumulate=True)
    return out


def coordinates(axis: Axis, size: Callable[[Axis], int]) -> list[tuple[Axis, torch.Tensor]]:
    """Every leaf occurrence below ``axis``, left to right, with its index at every position of the axis.

    int64 of the shape of the axis, given the ``size`` of every leaf; -1 where the leaf has no part in the position.
    """
    axis = find(axis)
    if axis.kind == "leaf":
        return [(axis, torch.arange(size(axis)))]
    found = [coordinates(part, size) for part in axis.parts]
    sizes = [len(one[0][1]) for one in found]
    out = []
    for place, one in enumerate(found):
        for leaf, inside in one:
            if axis.kind == "concat":
                pieces = [inside if i == place else torch.full((n,), _ABSENT) for i, n in enumerate(sizes)]
                out.append((leaf, torch.cat(pieces)))
            else:
                grid = inside.view([-1 if i == place else 1 for i in range(len(sizes))])
                out.append((leaf, grid.expand(sizes).flatten()))
    return out


def _position(axis: Axis, index: Iterator[torch.Tensor]) -> torch.Tensor:
    """The position in ``axis`` that has these indices of its leaves: :func:`coordinates` undone, at full size."""
    axis = find(axis)
    if axis.kind == "leaf":
        return next(index)
    inside = [_position(part, index) for part in axis.parts]
    out = inside[0]
    if axis.kind == "concat":
        offset = axis.parts[0].size
        for part, place in zip(axis.parts[1:], inside[1:], strict=True):
            out = torch.where(place == _ABSENT, out, place + offset)
            offset += part.size
        return out
    for part, place in zip(axis.parts[1:], inside[1:], strict=True):
        out = torch.where(place == _ABSENT, _ABSENT, out * part.size + place)
    return out


class _Places:
    """The coordinates of all dimensions of a tensor, each in the place of its dimension."""

    def __init__(self, dims: Sequence[Axis], size: Callable[[Axis], int]):
        self._dims = dims
        self._size = size
        self._found: dict[int, list[tuple[Axis, torch.Tensor]]] = {}

    def of(self, dim: int) -> list[tuple[Axis, torch.Tensor]]:
        dim %= len(self._dims)
        if dim not in self._found:
            found = coordinates(self._dims[dim], self._size)
            self._found[dim] = [(leaf, _along(place, dim, len(self._dims))) for leaf, place in found]
        return self._found[dim]

    def index(self, leaf: Axis, beside: int) -> torch.Tensor:
        """The coordinate of an outer axis, which is in dimension ``beside`` or else in one other."""
        for dim in (beside, *range(len(self._dims))):
            occurrences = [place for other, place in self.of(dim) if other is find(leaf)]
            if occurrences:
                return torch.stack(occurrences).amax(0).clamp(min=0)
        raise AssertionError("a ragged axis without its outer axis")

    def old(self, leaf: Axis, place: torch.Tensor, beside: int, selection: Selection) -> torch.Tensor:
        """The index before pruning of a leaf that has index ``place`` after it."""
        kept = selection.get(leaf)
        if kept is None:
            return place
        inside = place.clamp(min=0)
        if kept.outer is None:
            old = kept.indices[inside]
        else:
            outer = find(kept.outer)
            old = kept.indices[self.old(outer, self.index(outer, beside), beside, selection), inside]
        return torch.where(place == _ABSENT, _ABSENT, old)
