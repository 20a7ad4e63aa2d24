"""Normalisations: the statistics of an axis change when an index is removed, so it is pinned, or with ``width`` they
are taken over what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphprune.ir.axes import Axis, Misaligned, factor
from graphprune.rules.registry import Dims, Rule, rule

aten = torch.ops.aten
_SOFTMAX = "normalised by softmax"


def _affine(r: Rule, axes: Sequence[Axis], *tensors: Dims | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            for axis, other in zip(axes, tensor, strict=True):
                r.same(axis, other)


@rule(aten.layer_norm, aten.rms_norm)
def layer_norm(
    r: Rule,
    x: Dims,
    shape: Sequence[Any],
    weight: Dims | None = None,
    bias: Any = None,
    *options: Any,
    **more: Any,
) -> Dims:
    """Statistics over the last ``len(shape)`` dimensions."""
    axes = x[-len(shape) :]
    for axis, size in zip(axes, shape, strict=True):
        r.statistic(axis, "normalised")
        r.size(size, axis)
    _affine(r, axes, weight, bias if isinstance(bias, tuple) else None)
    return x


@rule(aten.group_norm)
def group_norm(
    r: Rule, x: Dims, groups: Any, weight: Dims | None = None, bias: Dims | None = None, *options: Any
) -> Dims:
    """Statistics over the channels of a group and all positions; whole groups may go."""
    try:
        group, inner = factor(x[1], (int(groups), x[1].size // int(groups)))
    except Misaligned as error:
        r.pin(x[1], str(error))
    else:
        r.size(groups, group)
        r.statistic(inner, "normalised")
    for axis in x[2:]:
        r.pin(axis, "normalised")
    _affine(r, x[1:2], weight, bias)
    return x


@rule(aten._weight_norm)
def weight_norm(r: Rule, direction: Dims, size: Dims, dim: int = 0) -> Dims:
    """A weight as direction and length: the norm is taken over every dimension but ``dim``."""
    for i, axis in enumerate(direction):
        if i != dim % len(direction):
            r.pin(axis, "normalised")
    return r.broadcast(direction, size)


@rule(aten.batch_norm, aten.instance_norm)
def batch_norm(
    r: Rule, x: Dims, weight: Dims | None, bias: Dims | None, mean: Dims | None, variance: Dims | None, *options: Any
) -> Dims:
    """Each channel by itself, with its running statistics; the other dimensions are normalised."""
    _affine(r, x[1:2], weight, bias, mean, variance)
    for axis in (x[0], *x[2:]):
        r.pin(axis, "normalised")
    return x


@rule(aten.softmax, aten._softmax)
def softmax(r: Rule, x: Dims, dim: int, *options: Any, **more: Any) -> Dims:
    r.among_kept(x[dim], _SOFTMAX)
    return x


@rule(aten.log_softmax, aten._log_softmax)
def log_softmax(r: Rule, x: Dims, dim: int, *options: Any, **more: Any) -> Dims:
    r.pin(x[dim], _SOFTMAX)
    return x
