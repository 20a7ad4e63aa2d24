"""Reading and writing by index: an axis that is looked up may not be renumbered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphprune.rules.registry import Dims, Rule, rule

aten = torch.ops.aten
_LOOKED_UP = "looked up by index"


@rule(aten.index)
def index(r: Rule, x: Dims, indices: Sequence[Dims | None]) -> Dims | None:
    """Advanced indexing: the indexed dimensions are replaced by the broadcast dimensions of the indices."""
    if len(indices) > len(x):
        return None
    used = [i for i, one in enumerate(indices) if one is not None]
    for i in used:
        r.pin(x[i], _LOOKED_UP)
    picked = r.broadcast(*(one for one in indices if one is not None))
    shape = r.output_shape()
    if len(shape) != len(picked) + len(x) - len(used):
        return None  # a boolean mask: its size is not known
    adjacent = used == list(range(used[0], used[-1] + 1))
    before = [axis for i, axis in enumerate(x) if i < used[0]] if adjacent else []
    after = [axis for i, axis in enumerate(x) if i not in used and not (adjacent and i < used[0])]
    return (*before, *picked, *after)


@rule(aten.index_select)
def index_select(r: Rule, x: Dims, dim: int, indices: Dims) -> Dims:
    r.pin(x[dim], _LOOKED_UP)
    dim %= len(x)
    return (*x[:dim], *(indices or (r.fresh(1),)), *x[dim + 1 :])


@rule(aten.gather)
def gather(r: Rule, x: Dims, dim: int, indices: Dims, **options: Any) -> Dims:
    r.pin(x[dim], _LOOKED_UP)
    for i, (axis, other) in enumerate(zip(x, indices, strict=True)):
        if i == dim % len(x):
            continue
        if axis.size == other.size:
            r.same(axis, other)
        else:
            r.pin(axis, _LOOKED_UP)
            r.pin(other, _LOOKED_UP)
    return indices


@rule(aten.one_hot)
def one_hot(r: Rule, x: Dims, classes: Any = -1) -> Dims:
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
