"""Tensors that forward makes itself: a constant along an axis can follow it, a numbered one cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphprune.rules.registry import Dims, Rule, rule

aten = torch.ops.aten


@rule(aten.zeros, aten.ones, aten.empty)
def constant(r: Rule, shape: Sequence[Any], *options: Any, **more: Any) -> Dims:
    """The same value everywhere: each axis is free as long as the size that made it can follow."""
    out = tuple(r.fresh(int(size)) for size in r.output_shape())
    for axis, size in zip(out, shape, strict=True):
        r.size(size, axis)
    return out


@rule(aten.full)
def full(r: Rule, shape: Sequence[Any], value: Any, **more: Any) -> Dims:
    return constant(r, shape)


@rule(aten.new_zeros, aten.new_ones, aten.new_empty)
def new_constant(r: Rule, x: Dims, shape: Sequence[Any], *options: Any, **more: Any) -> Dims:
    return constant(r, shape)


@rule(aten.new_full)
def new_full(r: Rule, x: Dims, shape: Sequence[Any], value: Any, **more: Any) -> Dims:
    return constant(r, shape)


@rule(aten.arange, aten.linspace, aten.logspace, aten.eye, aten.rand, aten.randn, aten.randint, aten.scalar_tensor)
def numbered(r: Rule, *options: Any, **more: Any) -> Dims:
    """Each index has a value of its own that the number of indices decides."""
    return tuple(r.fresh(size, "a constant computed inside forward") for size in r.output_shape())
