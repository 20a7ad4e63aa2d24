"""Reading and writing by index: an axis that is looked up may not be renumbered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphprune.rules.registry import Dims, Rule, rule

aten = torch.ops.aten
_LOOKED_UP = "looked up by index"


@rule(aten.index)
def index(r: Rule, x: Dims, indices: Sequence[Dims | None], written: Dims | None = None) -> Dims | None:
    """Advanced indexing: the indexed dimensions are replaced by the broadcast dimensions of the indices.

    ``written`` are the values that are put there, if this is no reading.
    """
    if len(indices) > len(x):
        return None
    used = [i for i, one in enumerate(indices) if one is not None]
    if any(node is not None and node.meta["val"].dtype is torch.bool for node in r.node.args[1]):  # type: ignore[union-attr]
        return _index_by_mask(r, x, indices, used, written)
    for i in used:
        r.looked_up(x[i], r.node.args[1][i])  # type: ignore[index]
    picked = r.broadcast(*(one for one in indices if one is not None))
    adjacent = used == list(range(used[0], used[-1] + 1))
    before = [axis for i, axis in enumerate(x) if i < used[0]] if adjacent else []
    after = [axis for i, axis in enumerate(x) if i not in used and not (adjacent and i < used[0])]
    out = (*before, *picked, *after)
    if written is not None:
        r.broadcast(out, written)
    return out


def _index_by_mask(
    r: Rule, x: Dims, indices: Sequence[Dims | None], used: list[int], written: Dims | None
) -> Dims | None:
    """One boolean mask over some neighbouring dimensions: what it picks becomes one dimension of unknown size."""
    if len(used) != 1:
        return None
    place, mask = used[0], indices[used[0]] or ()
    for axis in (*x[place : place + len(mask)], *mask):
        r.pin(axis, "picked by a mask")
    picked = r.fresh(r.output_shape()[place] if written is None else 1, "picked by a mask")
    out = (*x[:place], picked, *x[place + len(mask) :])
    if written is not None:
        r.broadcast(out, written)
    return out


@rule(aten.masked_scatter, aten.masked_scatter_)
def masked_scatter(r: Rule, x: Dims, mask: Dims, source: Dims) -> Dims:
    """Where ``mask`` is true the elements of ``source`` are written one after the other.

    A last dimension of the same size on both sides goes index by index only if the mask does not depend on it, which
    the graph does not say; so all dimensions but those that give way to broadcasting are pinned.
    """
    for axis in (*x, *mask, *source):
        if axis.size != 1:
            r.pin(axis, "written where a mask says")
    return x


@rule(aten.index_select)
def index_select(r: Rule, x: Dims, dim: int, indices: Dims) -> Dims:
    r.looked_up(x[dim], r.node.args[2])
    dim %= len(x)
    return (*x[:dim], *(indices or (r.fresh(1),)), *x[dim + 1 :])


def _pair(r: Rule, x: Dims, other: Dims, dim: int) -> None:
    """``x`` and ``other`` go together index by index, but for ``dim``, where ``x`` is looked up."""
    r.looked_up(x[dim], r.node.args[2])
    for i, (axis, mate) in enumerate(zip(x, other, strict=True)):
        if i == dim % len(x):
            continue
        if axis.size == mate.size:
            r.same(axis, mate)
        else:
            r.pin(axis, _LOOKED_UP)
            r.pin(mate, _LOOKED_UP)


@rule(aten.gather)
def gather(r: Rule, x: Dims, dim: int, indices: Dims, **options: Any) -> Dims:
    _pair(r, x, indices, dim)
    return indices


def _pair_written(r: Rule, x: Dims, other: Dims, dim: int) -> None:
    """As :func:`_pair`, for what is written: its own ``dim`` has an order too."""
    _pair(r, x, other, dim)
    r.pin(other[dim], _LOOKED_UP)


@rule(aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_, aten.scatter_reduce, aten.scatter_reduce_)
def scatter(r: Rule, x: Dims, dim: int, indices: Dims, source: Any, *options: Any, **more: Any) -> Dims:
    """``x`` with values written (or added) where ``indices`` say; other dimensions go index by index."""
    _pair_written(r, x, indices, dim)
    if isinstance(source, tuple):
        _pair_written(r, x, source, dim)
    return x


@rule(aten.index_add, aten.index_add_, aten.index_copy, aten.index_copy_)
def index_add(r: Rule, x: Dims, dim: int, indices: Dims, source: Dims, **more: Any) -> Dims:
    """``x[indices] += source`` along ``dim``; the other dimensions go together."""
    _pair_written(r, x, source, dim)
    for axis in indices:
        r.pin(axis, _LOOKED_UP)
    return x


@rule(aten.index_fill, aten.index_fill_)
def index_fill(r: Rule, x: Dims, dim: int, indices: Dims, value: Any) -> Dims:
    r.pin(x[dim], _LOOKED_UP)
    return x


@rule(aten.index_put, aten.index_put_)
def index_put(r: Rule, x: Dims, indices: Sequence[Dims | None], values: Dims, accumulate: bool = False) -> Dims | None:
    """``x[indices] = values``: what ``index`` would read is what is written."""
    place = index(r, x, indices, written=values)
    return None if place is None else x


@rule(aten.one_hot)
def one_hot(r: Rule, x: Dims, classes: Any = -1) -> Dims:
    """A class for each index of an axis is that axis."""
    chosen_from = r.index_of(r.node.args[0])
    if chosen_from is not None and classes == chosen_from.size:
        r.looked_up(chosen_from, r.node.args[0], "one-hot classes")
        r.size(classes, chosen_from)
        return (*x, chosen_from)
    if chosen_from is not None:
        r.pin(chosen_from, "one-hot classes")
    return (*x, r.fresh(r.output_shape()[-1], "one-hot classes"))


@rule(aten.nonzero, aten.nonzero_numpy)
def nonzero(r: Rule, x: Dims) -> Dims | None:
    for axis in x:
        r.pin(axis, _LOOKED_UP)
    return None


@rule(aten.triu, aten.tril, aten.triu_, aten.tril_)
def triangle(r: Rule, x: Dims, *options: Any) -> Dims:
    for axis in x[-2:]:
        r.pin(axis, "its order matters")
    return x


@rule(aten.bucketize, aten.searchsorted)
def bucketize(r: Rule, x: Dims, boundaries: Dims, *options: Any, **more: Any) -> Dims | None:
    for axis in boundaries:
        r.pin(axis, "its order matters")
    return x if len(boundaries) == 1 else None
