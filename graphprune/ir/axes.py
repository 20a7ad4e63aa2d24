"""The axis algebra: what a tensor dimension is made of.

An *axis* is an index set ``0 … size-1`` that several tensor dimensions share. An axis is either a *leaf*, a row-major
*product* of other axes (as ``view(b, s, heads, width)`` reveals), or a *concat* of other axes (as ``split``, ``slice``
or ``cat`` reveal). A leaf becomes a product or a concat when some operator looks inside it; two axes that turn out to
be the same are unified, and their descriptions aligned boundary by boundary.

Worked example, the rows of a fused projection ``c_attn`` with 2 heads of width 3 for q, k and v::

    c_attn rows            leaf of 18
    split(6)               concat(q 6, k 6, v 6)
    q.view(b, s, 2, 3)     concat(product(heads 2, qk 3), k 6, v 6)
    q @ k.T                k = product(heads, qk)        (unified with q, batch dim heads, contracted dim qk)

Whatever cannot be aligned is *pinned*: it may not be pruned. Nothing here knows about tensors or operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch

_serial = count()


@dataclass(frozen=True)
class Pin:
    """Why an axis may not be pruned, and the source line that says so."""

    reason: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.reason} ({self.where})" if self.where else self.reason


class Axis:
    """A node of the union-find forest. Compare axes only through :func:`find`."""

    __slots__ = ("_parent", "kind", "parts", "pins", "serial", "size")

    def __init__(self, size: int, kind: Literal["leaf", "product", "concat"] = "leaf", parts: Sequence[Axis] = ()):
        self.size = size
        self.kind = kind
        self.parts = tuple(parts)
        self.pins: dict[Pin, None] = {}  # an ordered set; only leaves carry pins
        self.serial = next(_serial)
        self._parent: Axis | None = None

    def __repr__(self) -> str:
        return describe(self)


class Misaligned(Exception):
    """Two descriptions of one axis have boundaries that do not line up."""


def find(axis: Axis) -> Axis:
    """The representative of ``axis``, with path compression."""
    root = axis
    while root._parent is not None:
        root = root._parent
    while axis._parent is not None:
        axis._parent, axis = root, axis._parent
    return root


def leaves(axis: Axis) -> Iterator[Axis]:
    """Every leaf below ``axis``, left to right; a leaf that occurs twice is given twice."""
    axis = find(axis)
    if axis.kind == "leaf":
        yield axis
    for part in axis.parts:
        yield from leaves(part)


def factors(axis: Axis) -> list[Axis]:
    """``axis`` as a flat list of factors, none of them a product, outermost first."""
    axis = find(axis)
    if axis.kind != "product":
        return [axis]
    return [factor for part in axis.parts for factor in factors(part)]


def parts(axis: Axis) -> list[Axis]:
    """``axis`` as a flat list of parts, none of them a concat, first first."""
    axis = find(axis)
    if axis.kind != "concat":
        return [axis]
    return [piece for part in axis.parts for piece in parts(part)]


def product(axes: Iterable[Axis]) -> Axis:
    """The row-major product of ``axes``; axes of size 1 say nothing and are dropped."""
    kept = [find(a) for a in axes if a.size != 1]
    if len(kept) <= 1:
        return kept[0] if kept else Axis(1)
    return Axis(math.prod(a.size for a in kept), "product", kept)


def concat(axes: Iterable[Axis]) -> Axis:
    """``axes`` one after the other; axes of size 0 are dropped."""
    kept = [find(a) for a in axes if a.size != 0]
    if len(kept) <= 1:
        return kept[0] if kept else Axis(0)
    return Axis(sum(a.size for a in kept), "concat", kept)


def pin(axis: Axis, why: Pin) -> None:
    """Forbid pruning of every leaf below ``axis``."""
    for leaf in leaves(axis):
        leaf.pins[why] = None


def is_pinned(axis: Axis) -> bool:
    """True if no leaf below ``axis`` may be pruned."""
    return all(leaf.pins or leaf.size <= 1 for leaf in leaves(axis))


def _refine(leaf: Axis, kind: Literal["product", "concat"], sizes: Sequence[int]) -> None:
    """Give a leaf a description; the new leaves inherit its pins."""
    leaf.kind = kind
    leaf.parts = tuple(Axis(size) for size in sizes)
    for child in leaf.parts:
        child.pins.update(leaf.pins)
    leaf.pins.clear()


def factor(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Look at ``axis`` as a row-major product of ``sizes`` (their product is the size of the axis).

    Returns one axis per size. Raises :class:`Misaligned` when the known boundaries of the axis do not allow it.
    """
    axis = find(axis)
    if math.prod(sizes) != axis.size:
        raise Misaligned(f"{axis.size} is not the product of {tuple(sizes)}")
    real = [size for size in sizes if size != 1]
    if len(real) <= 1:
        found = iter([axis] if real else [])
    elif axis.kind == "leaf":
        _refine(axis, "product", real)
        found = iter(axis.parts)
    elif axis.kind == "product":
        found = iter(_regroup(factors(axis), real))
    else:
        found = iter(_factor_concat(axis, real))
    return [Axis(1) if size == 1 else next(found) for size in sizes]


def _regroup(given: list[Axis], sizes: Sequence[int]) -> list[Axis]:
    """Group a flat list of factors into products of the wanted sizes, splitting factors where it must."""
    queue, out = list(given), []
    for size in sizes:
        taken: list[Axis] = []
        missing = size
        while missing > 1:
            head = queue.pop(0)
            if missing % head.size == 0:
                taken.append(head)
                missing //= head.size
            elif head.size % missing == 0:
                outer, inner = factor(head, (missing, head.size // missing))
                taken.append(outer)
                queue.insert(0, inner)
                missing = 1
            else:
                raise Misaligned(f"a factor of {head.size} does not line up with {missing}")
        out.append(product(taken))
    return out


def _factor_concat(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """``concat(a·w, b·w)`` seen as ``(a+b)·w``: the parts share their inner factor."""
    inner_size = math.prod(sizes[1:])
    outers, inners = [], []
    pieces = parts(axis)
    if any(piece.size % inner_size for piece in pieces):
        raise Misaligned(f"parts of {[p.size for p in pieces]} are not multiples of {inner_size}")
    for piece in pieces:
        outer, inner = factor(piece, (piece.size // inner_size, inner_size))
        outers.append(outer)
        inners.append(inner)
    for inner in inners[1:]:
        unify(inners[0], inner)
    return [concat(outers), *factor(inners[0], sizes[1:])]


def cut(axis: Axis, offset: int) -> tuple[Axis, Axis]:
    """Look at ``axis`` as a concat of its first ``offset`` indices and the rest.

    Raises :class:`Misaligned` when the cut goes through a product off its inner boundary.
    """
    axis = find(axis)
    if offset <= 0:
        return Axis(0), axis
    if offset >= axis.size:
        return axis, Axis(0)
    if axis.kind == "leaf":
        _refine(axis, "concat", (offset, axis.size - offset))
        return axis.parts[0], axis.parts[1]
    if axis.kind == "product":
        outer, *rest = factors(axis)
        inner = axis.size // outer.size
        if offset % inner:
            raise Misaligned(f"a cut at {offset} is inside a factor of {inner}")
        left, right = cut(outer, offset // inner)
        return product([left, *rest]), product([right, *rest])
    before: list[Axis] = []
    queue = parts(axis)
    while offset >= queue[0].size:
        offset -= queue[0].size
        before.append(queue.pop(0))
    left, right = cut(queue.pop(0), offset)
    return concat([*before, left]), concat([right, *queue])


def unify(a: Axis, b: Axis, why: Pin | None = None) -> None:
    """Say that ``a`` and ``b`` are one axis. Where their descriptions do not line up, both are pinned.

    Tying too much is always safe (less can be pruned), so a half-done alignment before a pin does no harm.
    """
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise Misaligned(f"an axis of {a.size} cannot be an axis of {b.size}")
    if a.kind == "leaf":
        a._parent = b
        if a.pins:
            for leaf in leaves(b):
                leaf.pins.update(a.pins)
        return
    if b.kind == "leaf":
        unify(b, a, why)
        return
    try:
        _align(a, b, why)
    except Misaligned as error:
        conflict = Pin(f"two descriptions do not line up: {error}", why.where if why else "")
        pin(a, conflict)
        pin(b, conflict)
        return
    a, b = find(a), find(b)
    if a is not b:
        a._parent = b


def _align(a: Axis, b: Axis, why: Pin | None) -> None:
    if a.kind == "product" and b.kind == "product":
        _align_products(factors(a), factors(b), why)
    elif a.kind == "concat" and b.kind == "concat":
        _align_sequences(parts(a), parts(b), why)
    else:
        whole, pieces = (a, b) if a.kind == "product" else (b, a)
        wanted = factors(whole)
        for mine, theirs in zip(wanted, factor(pieces, [f.size for f in wanted]), strict=True):
            unify(mine, theirs, why)


def _align_products(a: list[Axis], b: list[Axis], why: Pin | None) -> None:
    while a:
        x, y = a.pop(0), b.pop(0)
        if x.size != y.size:
            longer, queue = (x, a) if x.size > y.size else (y, b)
            size = min(x.size, y.size)
            if longer.size % size:
                raise Misaligned(f"factors of {x.size} and {y.size}")
            outer, inner = factor(longer, (size, longer.size // size))
            queue[:0] = factors(inner)
            x, y = (outer, y) if longer is x else (x, outer)
        unify(x, y, why)


def _align_sequences(a: list[Axis], b: list[Axis], why: Pin | None) -> None:
    while a:
        x, y = a.pop(0), b.pop(0)
        if x.size != y.size:
            longer, queue = (x, a) if x.size > y.size else (y, b)
            left, right = cut(longer, min(x.size, y.size))
            queue[:0] = parts(right)
            x, y = (left, y) if longer is x else (x, left)
        unify(x, y, why)


def expand_mask(axis: Axis, of_leaf: Callable[[Axis], torch.Tensor | None]) -> torch.Tensor:
    """The boolean keep-mask of a dimension, shape ``(axis.size,)``, from the keep-masks of its leaves.

    ``of_leaf`` gives the mask of a leaf, or None where all of it is kept.
    """
    axis = find(axis)
    if axis.kind == "leaf":
        mask = of_leaf(axis)
        return torch.ones(axis.size, dtype=torch.bool) if mask is None else mask
    masks = [expand_mask(part, of_leaf) for part in axis.parts]
    if axis.kind == "concat":
        return torch.cat(masks)
    out = masks[0]
    for mask in masks[1:]:
        out = (out[:, None] & mask[None, :]).flatten()
    return out


def reduce_to_leaves(axis: Axis, values: torch.Tensor) -> list[tuple[Axis, torch.Tensor]]:
    """Sum a vector over a dimension, shape ``(axis.size,)``, into one vector per leaf occurrence below it.

    Entry ``i`` of a leaf's vector is the sum of everything in the dimension that index ``i`` of the leaf owns.
    """
    axis = find(axis)
    if axis.kind == "leaf":
        return [(axis, values)]
    out: list[tuple[Axis, torch.Tensor]] = []
    if axis.kind == "concat":
        for part, piece in zip(axis.parts, values.split([p.size for p in axis.parts]), strict=True):
            out += reduce_to_leaves(part, piece)
        return out
    grid = values.reshape([part.size for part in axis.parts])
    for i, part in enumerate(axis.parts):
        others = [j for j in range(grid.ndim) if j != i]
        out += reduce_to_leaves(part, grid.sum(others))
    return out


def inner_width(dim: Axis, leaf: Axis) -> int:
    """How many places of ``dim`` one index of ``leaf`` owns."""
    dim = find(dim)
    if dim is leaf:
        return 1
    if dim.kind == "leaf":
        return 0
    widths = [inner_width(part, leaf) for part in dim.parts]
    if dim.kind == "concat":
        return sum(widths)
    return sum(width * dim.size // find(part).size for width, part in zip(widths, dim.parts, strict=True))


def describe(axis: Axis, name: Callable[[Axis], str] | None = None, top: bool = True) -> str:
    """``heads4·(rot8 + rot8)``: the axis as an expression of its leaves."""
    axis = find(axis)
    if axis.kind == "leaf":
        return name(axis) if name else f"a{axis.serial}:{axis.size}"
    texts = [describe(part, name, top=False) for part in axis.parts]
    text = ("·" if axis.kind == "product" else " + ").join(texts)
    return text if top else f"({text})"
