"""Reductions: a sum drops a removed index whatever its value was; every other one changes its value, and pins.

A mean, variance or norm is a statistic: with ``width`` it is taken over what is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from graphprune.ir.axes import Axis
from graphprune.rules.registry import Dims, Rule, rule

aten = torch.ops.aten


def _chosen(dims: Any, rank: int) -> list[int]:
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    return [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def _without(x: Dims, dims: Iterable[int], keep: bool) -> Dims:
    gone = set(dims)
    if keep:
        return tuple(Axis(1) if i in gone else axis for i, axis in enumerate(x))
    return tuple(axis for i, axis in enumerate(x) if i not in gone)


@rule(aten.sum)
def sum_(r: Rule, x: Dims, dims: Any = None, keepdim: bool = False, **options: Any) -> Dims:
    chosen = _chosen(dims, len(x))
    for i in chosen:
        r.contract(0, i - len(x))
    return _without(x, chosen, keepdim)


def _pinning(reason: str) -> Any:
    def reduction(r: Rule, x: Dims, dims: Any = None, *options: Any, **more: Any) -> Any:
        if isinstance(dims, (bool, tuple)) and not (isinstance(dims, tuple) and all(isinstance(d, int) for d in dims)):
            dims = None
        keep = next((o for o in options if isinstance(o, bool)), bool(more.get("keepdim", False)))
        chosen = _chosen(more.get("dim", dims), len(x))
        for i in chosen:
            r.pin(x[i], reason)
        out = _without(x, chosen, keep)
        value = r.node.meta["val"]
        return [out] * len(value) if isinstance(value, (tuple, list)) else out

    return reduction


for _reason, _names in {
    "its largest or smallest is taken": "amax amin max.dim min.dim max.default min.default argmax argmin aminmax "
    "any all median.dim mode kthvalue logsumexp",
    "multiplied up": "prod",
}.items():
    for _name in _names.split():
        _packet, _, _overload = _name.partition(".")
        _operator = getattr(aten, _packet)
        rule(getattr(_operator, _overload) if _overload else _operator)(_pinning(_reason))


def _statistic(reason: str) -> Any:
    def statistic(r: Rule, x: Dims, *given: Any, **named: Any) -> Any:
        options = r.options(given, named)
        chosen = _chosen(options.get("dim"), len(x))
        for i in chosen:
            r.statistic(x[i], reason)
        out = _without(x, chosen, bool(options.get("keepdim", False)))
        value = r.node.meta["val"]
        return [out] * len(value) if isinstance(value, (tuple, list)) else out

    return statistic


rule(aten.mean, aten.nanmean, aten.std, aten.var, aten.std_mean, aten.var_mean)(_statistic("averaged"))
rule(aten.norm, aten.linalg_vector_norm)(_statistic("a norm over it is taken"))


@rule(aten.cumsum, aten.cumprod, aten.cummax, aten.cummin, aten.logcumsumexp)
def cumulative(r: Rule, x: Dims, dim: int, **options: Any) -> Any:
    if x:
        r.pin(x[dim], "accumulated along it")
    value = r.node.meta["val"]
    return [x] * len(value) if isinstance(value, (tuple, list)) else x


@rule(aten.diff)
def diff(r: Rule, x: Dims, n: int = 1, dim: int = -1, *more: Any, **options: Any) -> Dims:
    r.pin(x[dim], "differences along it are taken")
    dim %= len(x)
    return (*x[:dim], r.fresh(r.output_shape()[dim], "differences"), *x[dim + 1 :])


@rule(aten.topk, aten.sort, aten.argsort)
def ordering(r: Rule, x: Dims, *options: Any, **more: Any) -> Any:
    """The dimension is put in order of its values, so its own order means nothing afterwards."""
    value = r.node.meta["val"]
    is_topk = r.node.target.overloadpacket is aten.topk  # type: ignore[union-attr]
    rest = options[1:] if is_topk else options
    dim = more.get("dim", next((o for o in rest if isinstance(o, int) and not isinstance(o, bool)), -1))
    if x:
        r.pin(x[dim], "sorted")
        dim %= len(x)

    def one(index: int | None) -> Dims:
        shape = r.output_shape(index)
        return tuple(r.fresh(shape[i], "sorted") if i == dim else axis for i, axis in enumerate(x))

    return [one(i) for i in range(len(value))] if isinstance(value, (tuple, list)) else one(None)
