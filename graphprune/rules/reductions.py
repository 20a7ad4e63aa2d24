"""Reductions: a sum drops a removed index whatever its value was; every other one changes its value, and pins.

A mean, variance or norm is a statistic: with ``width`` it is taken over what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def _reduction(reason: str, say: Callable[[Rule, Axis, str], None] = Rule.pin) -> Any:
    def reduction(r: Rule, x: Dims, *given: Any, **named: Any) -> Any:
        options = r.options(given, named)
        chosen = _chosen(options.get("dim"), len(x))
        for i in chosen:
            say(r, x[i], reason)
        out = _without(x, chosen, bool(options.get("keepdim", False)))
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
        rule(getattr(_operator, _overload) if _overload else _operator)(_reduction(_reason))


rule(aten.mean, aten.nanmean, aten.std, aten.var, aten.std_mean, aten.var_mean)(_reduction("averaged", Rule.statistic))
rule(aten.norm, aten.linalg_vector_norm, aten.linalg_norm)(_reduction("a norm over it is taken", Rule.statistic))


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


@rule(aten.histc, aten.bincount)
def histogram(r: Rule, x: Dims, bins: Any = 100, *options: Any, **more: Any) -> Dims:
    """Counts of values: which index holds which value does not matter, but each one counts."""
    for axis in x:
        r.pin(axis, "counted")
    return tuple(r.fresh(size, "counts") for size in r.output_shape())
