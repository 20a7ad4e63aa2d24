"""Operators that work on each element by itself: dimensions broadcast and unify."""

from __future__ import annotations

from typing import Any

import torch

from graphprune.rules.registry import Dims, Rule, rule
from graphprune.rules.views import cut_at, reshape

aten = torch.ops.aten


def _is_dims(value: Any) -> bool:
    return isinstance(value, tuple) and not hasattr(value, "expr")


# torch tags most of these `pointwise`, which finds this rule under its own name; listed are those it does not tag.
@rule(
    "pointwise",
    aten.to,
    aten._to_copy,
    aten.clone,
    aten.contiguous,
    aten.detach,
    aten.detach_,
    aten.alias,
    aten.lift_fresh_copy,
    aten.lift_fresh,
    aten.masked_fill,
    aten.masked_fill_,
    aten.where,
    aten.max.other,
    aten.min.other,
    aten.softplus,
    aten.silu,
    aten.silu_,
    aten.mish,
    aten.hardtanh,
    aten.hardtanh_,
    aten.hardswish,
    aten.hardswish_,
    aten.hardsigmoid_,
    aten.relu_,
    aten.relu6,
    aten.relu6_,
    aten.selu,
    aten.celu,
    aten.elu_,
    aten.leaky_relu_,
    aten.add_,
    aten.sub_,
    aten.mul_,
    aten.div_,
    aten.clamp_,
    aten.copy_,
    aten.zero_,
    aten.fill_,
    aten.fill,
    aten.__and__,
    aten.__or__,
    aten.__xor__,
    aten.__lshift__,
    aten.__rshift__,
    aten.logical_not_,
    aten.rsub,
    aten.square,
    aten.log_sigmoid,
    aten.float_power,
    aten.true_divide,
    aten.divide,
    aten.floor_divide,
    aten.floor_divide_,
    aten.remainder_,
    aten.pow_,
    aten.exp_,
    aten.sqrt_,
    aten.neg_,
    aten.sigmoid_,
    aten.tanh_,
    aten.multiply,
    aten.subtract,
    aten.negative,
    aten.absolute,
    aten.clip,
    aten.nan_to_num,
    aten.real,
    aten.isfinite,
    aten.isnan,
    aten.isinf,
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.empty_like,
)
def pointwise(r: Rule, *args: Any, **kwargs: Any) -> Dims:
    tensors = [a for a in (*args, *kwargs.values()) if _is_dims(a)]
    return r.broadcast(*tensors)


@rule(aten.type_as)
def type_as(r: Rule, x: Dims, other: Dims) -> Dims:
    """Only the dtype of ``other`` is looked at."""
    return x


@rule(aten.dropout, aten.dropout_, aten.feature_dropout, aten.alpha_dropout)
def dropout(r: Rule, x: Dims, p: float, train: bool) -> Dims:
    """Nothing in eval mode; a dropout that never rests draws a number for every index."""
    if train and p > 0:
        for axis in x:
            r.pin(axis, "random numbers are drawn along it")
    return x


@rule(aten.expand_as)
def expand_as(r: Rule, x: Dims, other: Dims) -> Dims:
    return r.broadcast(x, other)


@rule(aten.view_as, aten.reshape_as)
def view_as(r: Rule, x: Dims, other: Dims) -> Dims:
    return reshape(r, x, [axis.size for axis in other], sizes_from=other)


@rule(aten.prelu)
def prelu(r: Rule, x: Dims, weight: Dims) -> Dims:
    if weight[0].size > 1:
        r.same(x[1], weight[0])
    return x


@rule(aten.glu)
def glu(r: Rule, x: Dims, dim: int = -1) -> Dims:
    first, second = cut_at(r, x[dim], x[dim].size // 2)
    r.equal_sizes([first, second])
    r.same(first, second)
    dim %= len(x)
    return (*x[:dim], first, *x[dim + 1 :])
