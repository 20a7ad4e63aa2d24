"""Contractions with a weight or between activations: a removed index drops its term of the sum."""

from __future__ import annotations

from typing import Any

import torch

from graphprune.rules.registry import Dims, Rule, rule, rule_by_name

aten = torch.ops.aten


@rule(aten.linear)
def linear(r: Rule, x: Dims, weight: Dims, bias: Dims | None = None) -> Dims:
    """``y[..., o] = Σ_i x[..., i] · weight[o, i] + bias[o]``"""
    r.same(x[-1], weight[1])
    r.contract(0, -1, weight=(1, 1))
    if bias is not None:
        r.same(weight[0], bias[0])
    return (*x[:-1], weight[0])


@rule(aten.matmul, aten.mm, aten.bmm)
def matmul(r: Rule, x: Dims, y: Dims) -> Dims:
    """``z[..., m, n] = Σ_k x[..., m, k] · y[..., k, n]``, batch dimensions broadcast."""
    inner = -1 if len(y) == 1 else -2
    r.same(x[-1], y[inner])
    r.contract(0, -1, weight=(1, inner))
    batch = r.broadcast(x[:-2], y[:-2])
    rows = x[-2:-1]
    columns = y[-1:] if len(y) > 1 else ()
    return (*batch, *rows, *columns)


@rule(aten.dot, aten.mv)
def dot(r: Rule, x: Dims, y: Dims) -> Dims:
    r.same(x[-1], y[0])
    r.contract(0, -1)
    return x[:-1]


@rule(aten.addmm, aten.baddbmm)
def addmm(r: Rule, bias: Dims, x: Dims, y: Dims, **scales: Any) -> Dims:
    """``bias + x @ y``: the form of a linear that keeps its weight as (in, out)."""
    r.same(x[-1], y[-2])
    r.contract(1, -1, weight=(2, -2))
    batch = r.broadcast(x[:-2], y[:-2])
    return r.broadcast((*batch, x[-2], y[-1]), bias)


@rule(aten.outer)
def outer(r: Rule, x: Dims, y: Dims) -> Dims:
    return (x[0], y[0])


@rule(aten.einsum)
def einsum(r: Rule, equation: str, operands: list[Dims], **options: Any) -> Dims | None:
    """Each letter is one axis; a letter missing on the right is summed away."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    if not arrow:
        return None
    *terms, right = _spelled_out([*left.split(","), right], [len(dims) for dims in operands])
    axis_of: dict[str, Any] = {}
    place_of: dict[str, tuple[int, int]] = {}
    for item, (term, dims) in enumerate(zip(terms, operands, strict=True)):
        if len(set(term)) != len(term):
            return None  # a diagonal
        for place, (letter, axis) in enumerate(zip(term, dims, strict=True)):
            if axis.size != 1:
                place_of.setdefault(letter, (item, place))
            if axis.size == 1 and letter in axis_of:
                continue
            if letter in axis_of and axis_of[letter].size != 1:
                r.same(axis_of[letter], axis)
            else:
                axis_of[letter] = axis
    for letter, (item, place) in place_of.items():
        if letter not in right:  # zero in one operand is enough
            r.contract(1, place, item=item)
    return tuple(axis_of[letter] for letter in right)


def _spelled_out(terms: list[str], ranks: list[int]) -> list[str]:
    """``...h,ho,...o`` with the dimensions behind the dots as letters of their own: capitals that are still free."""
    used = set("".join(terms))
    spare = [chr(code) for code in range(ord("A"), ord("Z") + 1) if chr(code) not in used]
    hidden = max(
        (rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=False) if "..." in t), default=0
    )
    letters = spare[:hidden]
    out = []
    for i, term in enumerate(terms):
        width = ranks[i] - len(term.replace("...", "")) if i < len(ranks) else hidden
        out.append(term.replace("...", "".join(letters[hidden - width :])))
    return out


@rule(aten.embedding)
def embedding(r: Rule, weight: Dims, indices: Dims, *options: Any, **more: Any) -> Dims:
    r.pin(weight[0], "looked up by index")
    return (*indices, weight[1])


@rule(aten.bilinear)
def bilinear(r: Rule, x: Dims, y: Dims, weight: Dims, bias: Dims | None = None) -> Dims:
    """``z[..., o] = Σ_ij x[..., i] · weight[o, i, j] · y[..., j] + bias[o]``"""
    r.same(x[-1], weight[1])
    r.same(y[-1], weight[2])
    r.contract(0, -1)
    r.contract(1, -1)
    if bias is not None:
        r.same(weight[0], bias[0])
    return (*r.broadcast(x[:-1], y[:-1]), weight[0])


def grouped(
    r: Rule, x: Dims, weight: Dims, offsets: Dims | None = None, bias: Any = None, *options: Any
) -> Dims | None:
    """``y[i] = x[i] @ weight[e]`` where ``offsets[e-1] ≤ i < offsets[e]``: x ``(S, K)``, weight ``(E, K, N)``.

    Which rows belong to which expert is written in numbers, so rows and experts stay. The kernels want rows of whole
    16 bytes.
    """
    if len(x) != 2 or len(weight) != 3 or offsets is None or isinstance(bias, tuple):
        return None
    r.pin(x[0], "rows that belong to experts")
    r.pin(weight[0], "experts that rows belong to")
    r.pin(offsets[0], "experts that rows belong to")
    r.same(x[1], weight[1])
    r.contract(0, -1, weight=(1, 1))
    per_16_bytes = 16 // r.node.meta["val"].element_size()
    r.multiple(x[1], per_16_bytes)
    r.multiple(weight[2], per_16_bytes)
    return (x[0], weight[2])


rule(aten._grouped_mm)(grouped)
rule_by_name("transformers::grouped_mm_fallback")(grouped)
