"""The view algebra: reshape factors and joins, slice cuts, cat joins, permute moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphprune.ir.axes import Axis, Misaligned, concat, cut, factor, product
from graphprune.rules.registry import Dims, Rule, rule

aten = torch.ops.aten
_END = 2**63 - 1


def blocks(given: Sequence[int], wanted: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into its smallest independent parts, as places of the two shapes (sizes of 1 left out).

    ``(2, 11, 576) → (2, 11, 9, 64)`` gives ``[([0], [0]), ([1], [1]), ([2], [2, 3])]``.
    """
    a = [i for i, size in enumerate(given) if size != 1]
    b = [i for i, size in enumerate(wanted) if size != 1]
    out = []
    while a and b:
        left, right = [a.pop(0)], [b.pop(0)]
        x, y = given[left[0]], wanted[right[0]]
        while x != y:
            if x < y:
                left.append(a.pop(0))
                x *= given[left[-1]]
            else:
                right.append(b.pop(0))
                y *= wanted[right[-1]]
        out.append((left, right))
    return out


@rule(aten.view.default, aten.reshape, aten._unsafe_view, aten._reshape_alias)
def reshape(r: Rule, x: Dims, shape: Sequence[Any], *options: Any, sizes_from: Dims | None = None) -> Dims:
    """Row-major: dimensions that are split become products, dimensions that are joined too."""
    wanted = r.output_shape()
    out: list[Axis] = [Axis(1) for _ in wanted]
    if 0 in wanted:
        return tuple(r.fresh(size, "empty") for size in wanted)
    for left, right in blocks([axis.size for axis in x], wanted):
        for i in left[1:]:  # behind a transposition, joining copies; but not when there is nothing to step over
            r.keep_two(x[i])
        whole = product(x[i] for i in left)
        try:
            pieces = factor(whole, [wanted[i] for i in right])
        except Misaligned as error:
            r.pin(whole, f"reshaped across its parts: {error}")
            pieces = [r.fresh(wanted[i], f"reshaped across its parts: {error}") for i in right]
        for place, axis in zip(right, pieces, strict=True):
            out[place] = axis
    for axis, size in zip(out, shape, strict=True):
        if sizes_from is None:
            r.size(size, axis)
    if sizes_from is not None:
        for axis, other in zip(out, sizes_from, strict=True):
            r.same(axis, other)
    return tuple(out)


@rule(aten.view.dtype)
def view_dtype(r: Rule, x: Dims, dtype: Any) -> Dims:
    for axis in x:
        r.pin(axis, "reinterpreted as another dtype")
    return tuple(r.fresh(size, "reinterpreted as another dtype") for size in r.output_shape())


@rule(aten.flatten)
def flatten(r: Rule, x: Dims, start: int = 0, end: int = -1) -> Dims:
    if not x:
        return (Axis(1),)
    start, end = start % len(x), end % len(x)
    for axis in x[start + 1 : end + 1]:
        r.keep_two(axis)
    return (*x[:start], product(x[start : end + 1]), *x[end + 1 :])


@rule(aten.unflatten)
def unflatten(r: Rule, x: Dims, dim: int, sizes: Sequence[Any], *names: Any) -> Dims:
    dim %= len(x)
    full = [*(-1 for _ in x[:dim]), *sizes, *(-1 for _ in x[dim + 1 :])]
    return reshape(r, x, full)


@rule(aten.permute)
def permute(r: Rule, x: Dims, order: Sequence[int]) -> Dims:
    return tuple(x[i] for i in order)


@rule(aten.transpose, aten.swapaxes, aten.transpose_)
def transpose(r: Rule, x: Dims, a: int, b: int) -> Dims:
    out = list(x)
    out[a], out[b] = out[b], out[a]
    return tuple(out)


@rule(aten.t, aten.numpy_T, aten.mT, aten.adjoint, aten.t_)
def t(r: Rule, x: Dims) -> Dims:
    return (*x[:-2], *reversed(x[-2:]))


@rule(aten.movedim)
def movedim(r: Rule, x: Dims, source: Any, destination: Any) -> Dims:
    rank = len(x)
    sources = [s % rank for s in (source if isinstance(source, (list, tuple)) else [source])]
    places = [d % rank for d in (destination if isinstance(destination, (list, tuple)) else [destination])]
    out: list[Axis | None] = [None] * rank
    for s, d in zip(sources, places, strict=True):
        out[d] = x[s]
    rest = iter(axis for i, axis in enumerate(x) if i not in sources)
    return tuple(axis if axis is not None else next(rest) for axis in out)


@rule(aten.unsqueeze, aten.unsqueeze_)
def unsqueeze(r: Rule, x: Dims, dim: int) -> Dims:
    dim %= len(x) + 1
    return (*x[:dim], Axis(1), *x[dim:])


@rule(aten.squeeze, aten.squeeze_)
def squeeze(r: Rule, x: Dims, dim: Any = None) -> Dims:
    """The traced shape says what goes; an axis that is 1 only after pruning would go too, so two stay."""
    chosen = range(len(x)) if dim is None else [d % len(x) for d in (dim if isinstance(dim, (list, tuple)) else [dim])]
    for i in chosen:
        if x[i].size != 1:
            r.at_least(x[i], 2)
    return tuple(axis for i, axis in enumerate(x) if i not in chosen or axis.size != 1)


@rule(aten.expand, aten.broadcast_to)
def expand(r: Rule, x: Dims, sizes: Sequence[Any], **options: Any) -> Dims:
    """Size 1 becomes a new axis of copies; other sizes stay."""
    shape = r.output_shape()
    padded = (*(Axis(1) for _ in range(len(shape) - len(x))), *x)
    out = tuple(Axis(size) if old.size == 1 else old for old, size in zip(padded, shape, strict=True))
    for axis, size in zip(out, sizes, strict=True):
        r.size(size, axis)
    return out


@rule(aten.repeat, aten.tile)
def repeat(r: Rule, x: Dims, repeats: Sequence[Any]) -> Dims:
    """``n`` copies one after the other: a product ``copies · axis``."""
    rank = max(len(repeats), len(x))
    padded = (*(Axis(1) for _ in range(rank - len(x))), *x)
    counts = [*([1] * (rank - len(repeats))), *repeats]
    out = []
    for axis, times in zip(padded, counts, strict=True):
        copies = Axis(int(times))
        r.size(times, copies)
        out.append(product([copies, axis]))
    return tuple(out)


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(r: Rule, x: Dims, repeats: Any, dim: int | None = None, **options: Any) -> Dims:
    """``n`` copies of each index in turn: a product ``axis · copies``."""
    if dim is None:
        x, dim = (product(x),), 0
    dim %= len(x)
    copies = Axis(int(repeats))
    r.size(repeats, copies)
    copied = product([x[dim], copies])
    r.size(options.get("output_size"), copied)
    return (*x[:dim], copied, *x[dim + 1 :])


def cut_at(r: Rule, axis: Axis, offset: int) -> tuple[Axis, Axis]:
    """The axis as two parts; pinned where it cannot be cut."""
    try:
        return cut(axis, offset)
    except Misaligned as error:
        r.pin(axis, str(error))
        return r.fresh(offset, str(error)), r.fresh(axis.size - offset, str(error))


@rule(aten.slice)
def slice_(r: Rule, x: Dims, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Dims:
    """A range of an axis is a part of a concat; every bound is the size of what lies before (or behind) it."""
    dim %= len(x)
    axis = x[dim]
    n = axis.size
    low, high, _ = slice(start if start is not None else 0, end, 1).indices(n)
    if step != 1:
        return (*x[:dim], _strided(r, axis, low, high, step), *x[dim + 1 :])
    if low == 0 and high >= n:
        r.harmless(end)
        if end is not None and n <= int(end) < _END:
            r.size(end, axis)
        return x
    if high <= low:
        return (*x[:dim], r.fresh(0), *x[dim + 1 :])
    before, rest = cut_at(r, axis, low)
    middle, behind = cut_at(r, rest, high - low)
    for bound, inside, outside in (
        (start, before, concat([middle, behind])),
        (end, concat([before, middle]), behind),
    ):
        if bound is None or (int(bound) == 0 and inside is before) or int(bound) >= n:
            continue
        if int(bound) < 0:  # counted from the end: minus the size of what lies behind
            r.size(-bound, outside)
            r.harmless(bound)
        else:
            r.size(bound, inside)
    return (*x[:dim], middle, *x[dim + 1 :])


def _strided(r: Rule, axis: Axis, low: int, high: int, step: int) -> Axis:
    """``x[..., k::step]`` takes index ``k`` of the inner factor of a product."""
    size = len(range(low, high, step))
    if axis.size % step == 0 and low < step and high == axis.size:
        try:
            outer, inner = factor(axis, (axis.size // step, step))
        except Misaligned:
            pass
        else:
            r.pin(inner, "one index in every few is taken")
            return outer
    r.pin(axis, "sliced with a step")
    return r.fresh(size, "sliced with a step")


@rule(aten.narrow)
def narrow(r: Rule, x: Dims, dim: int, start: Any, length: Any) -> Dims:
    dim %= len(x)
    first = int(start) % x[dim].size if int(start) < 0 else int(start)
    before, rest = cut_at(r, x[dim], first)
    middle, behind = cut_at(r, rest, int(length))
    if int(start) < 0:  # counted from the end: minus the size of what lies behind
        r.size(-start, concat([middle, behind]))
        r.harmless(start)
    else:
        r.size(start, before)
    r.size(length, middle)
    return (*x[:dim], middle, *x[dim + 1 :])


def _split(r: Rule, x: Dims, dim: int, sizes: Sequence[int]) -> list[Dims]:
    dim %= len(x)
    pieces, rest = [], x[dim]
    for size in sizes:
        piece, rest = cut_at(r, rest, size)
        pieces.append(piece)
    return [(*x[:dim], piece, *x[dim + 1 :]) for piece in pieces]


@rule(aten.split.Tensor)
def split(r: Rule, x: Dims, size: Any, dim: int = 0) -> list[Dims]:
    n, step = x[dim].size, int(size)
    out = _split(r, x, dim, [min(step, n - i) for i in range(0, n, step)])
    for piece in out:
        if n % step:  # how many parts there are would change
            r.pin(piece[dim], "split into parts of which the last is smaller")
        if piece[dim].size == step:
            r.size(size, piece[dim])
    return out


@rule(aten.split_with_sizes, aten.split.sizes)
def split_with_sizes(r: Rule, x: Dims, sizes: Sequence[Any], dim: int = 0) -> list[Dims]:
    if None in sizes:  # sizes that depend on values
        dim %= len(x)
        r.pin(x[dim], "split by values")
        shapes = [r.output_shape(i) for i in range(len(sizes))]
        return [(*x[:dim], r.fresh(shape[dim], "split by values"), *x[dim + 1 :]) for shape in shapes]
    out = _split(r, x, dim, [int(s) for s in sizes])
    for size, piece in zip(sizes, out, strict=True):
        r.size(size, piece[dim])
    return out


@rule(aten.chunk, aten.tensor_split.sections)
def chunk(r: Rule, x: Dims, chunks: int, dim: int = 0) -> list[Dims]:
    sizes = [r.output_shape(i)[dim] for i in range(len(r.node.meta["val"]))]
    out = _split(r, x, dim, sizes)
    r.equal_sizes([piece[dim] for piece in out])
    return out


@rule(aten.cat, aten.concat, aten.concatenate)
def cat(r: Rule, tensors: Sequence[Dims], dim: int = 0) -> Dims:
    tensors = [dims for dims in tensors if not (len(dims) == 1 and dims[0].size == 0)] or list(tensors)
    dim %= len(tensors[0])
    joined = concat(dims[dim] for dims in tensors)
    # Every tensor must agree on the other dimensions; broadcasting does not happen here.
    for dims in tensors[1:]:
        for i, axis in enumerate(dims):
            if i != dim:
                r.same(tensors[0][i], axis)
    if joined.size != r.output_shape()[dim]:  # parts whose sizes depend on values
        r.pin(joined, "its size depends on values")
        joined = r.fresh(r.output_shape()[dim], "its size depends on values")
    return (*tensors[0][:dim], joined, *tensors[0][dim + 1 :])


@rule(aten.stack)
def stack(r: Rule, tensors: Sequence[Dims], dim: int = 0) -> Dims:
    for dims in tensors[1:]:
        for a, b in zip(tensors[0], dims, strict=True):
            r.same(a, b)
    dim %= len(tensors[0]) + 1
    return (*tensors[0][:dim], r.fresh(len(tensors), "stacked"), *tensors[0][dim:])


@rule(aten.select)
def select(r: Rule, x: Dims, dim: int, index: Any) -> Dims:
    dim %= len(x)
    if x[dim].size > 1:
        r.pin(x[dim], "one index of it is taken")
    return (*x[:dim], *x[dim + 1 :])


@rule(aten.unbind)
def unbind(r: Rule, x: Dims, dim: int = 0) -> list[Dims]:
    dim %= len(x)
    r.pin(x[dim], "unbound into its indices")
    return [(*x[:dim], *x[dim + 1 :])] * x[dim].size


@rule(aten.constant_pad_nd, aten.pad)
def pad(r: Rule, x: Dims, amounts: Sequence[int], *options: Any) -> Dims:
    """Padding joins pinned axes before and behind; a negative amount cuts, and pins."""
    out = list(x)
    for i in range(len(amounts) // 2):
        before, behind = int(amounts[2 * i]), int(amounts[2 * i + 1])
        place = len(x) - 1 - i
        if (
            before < 0
            or behind < 0
            or (options and options[0] not in (None, "constant") and isinstance(options[0], str))
        ):
            r.pin(x[place], "padded")
            out[place] = r.fresh(x[place].size + before + behind, "padded")
        elif before or behind:
            out[place] = concat([r.fresh(before, "padding"), x[place], r.fresh(behind, "padding")])
    return tuple(out)


@rule(aten.roll, aten.flip)
def roll(r: Rule, x: Dims, *options: Any) -> Dims:
    dims = options[-1] if options else range(len(x))
    for d in dims or range(len(x)):
        r.pin(x[d], "its order matters")
    return x


@rule(aten.diagonal)
def diagonal(r: Rule, x: Dims, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Dims:
    kept = [axis for i, axis in enumerate(x) if i not in (dim1 % len(x), dim2 % len(x))]
    r.pin(x[dim1], "its diagonal is taken")
    r.pin(x[dim2], "its diagonal is taken")
    return (*kept, r.fresh(r.output_shape()[-1], "a diagonal"))


@rule(aten.unfold)
def unfold(r: Rule, x: Dims, dim: int, size: Any, step: Any) -> Dims:
    r.pin(x[dim], "unfolded into windows")
    shape = r.output_shape()
    dim %= len(x)
    return (*x[:dim], r.fresh(shape[dim], "windows"), *x[dim + 1 :], r.fresh(shape[-1], "a window"))
