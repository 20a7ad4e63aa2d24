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
_ACCUMULATED = "accumulated along it"


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
    "its largest or smallest is taken": "amax amin min.dim max.default min.default argmin aminmax "
    "any all median.dim mode kthvalue logsumexp",
    "multiplied up": "prod",
}.items():
    for _name in _names.split():
        _packet, _, _overload = _name.partition(".")
        _operator = getattr(aten, _packet)
        rule(getattr(_operator, _overload) if _overload else _operator)(_reduction(_reason))


_LARGEST = "its largest or smallest is taken"


@rule(aten.max.dim)
def largest(r: Rule, x: Dims, dim: int, keepdim: bool = False) -> list[Dims]:
    """Values and places of the largest along ``dim``."""
    r.ranked(x[dim], _LARGEST, 1, output=1)
    return [_without(x, [dim % len(x)], keepdim)] * 2


@rule(aten.argmax)
def argmax(r: Rule, x: Dims, dim: int | None = None, keepdim: bool = False) -> Dims:
    if dim is None:
        for axis in x:
            r.pin(axis, _LARGEST)
        return _without(x, range(len(x)), keepdim)
    r.ranked(x[dim], _LARGEST, 1)
    return _without(x, [dim % len(x)], keepdim)


rule(aten.mean, aten.nanmean, aten.std, aten.var, aten.std_mean, aten.var_mean)(_reduction("averaged", Rule.statistic))
rule(aten.norm, aten.linalg_vector_norm, aten.linalg_norm)(_reduction("a norm over it is taken", Rule.statistic))


@rule(aten.cumsum)
def running_sum(r: Rule, x: Dims, dim: int, **options: Any) -> Dims:
    if x:
        r.running_sum(x[dim], _ACCUMULATED)
        r.contract(0, dim)
    return x


@rule(aten.cumprod, aten.cummax, aten.cummin, aten.logcumsumexp)
def cumulative(r: Rule, x: Dims, dim: int, **options: Any) -> Any:
    if x:
        r.pin(x[dim], _ACCUMULATED)
    value = r.node.meta["val"]
    return [x] * len(value) if isinstance(value, (tuple, list)) else x


@rule(aten.diff)
def diff(r: Rule, x: Dims, n: int = 1, dim: int = -1, *more: Any, **options: Any) -> Dims:
    r.pin(x[dim], "differences along it are taken")
    dim %= len(x)
    return (*x[:dim], r.fresh(r.output_shape()[dim], "differences"), *x[dim + 1 :])


@rule(aten.topk)
def topk(r: Rule, x: Dims, k: int, dim: int = -1, *options: Any, **more: Any) -> list[Dims]:
    if x:
        r.ranked(x[dim], "sorted", int(k), output=1)
    return _in_order(r, x, dim)


@rule(aten.sort, aten.argsort)
def ordering(r: Rule, x: Dims, *options: Any, **more: Any) -> Any:
    dim = more.get("dim", next((o for o in options if isinstance(o, int) and not isinstance(o, bool)), -1))
    if x:
        r.pin(x[dim], "sorted")
    return _in_order(r, x, dim)


def _in_order(r: Rule, x: Dims, dim: int) -> Any:
    """The dimension is put in order of its values, so its own order means nothing afterwards."""
    value = r.node.meta["val"]
    dim %= max(len(x), 1)

    def one(index: int | None) -> Dims:
        shape = r.output_shape(index)
        return tuple(r.fresh(shape[i], "sorted") if i == dim else axis for i, axis in enumerate(x))

    return [one(i) for i in range(len(value))] if isinstance(value, (tuple, list)) else one(None)


def _one_bin_each(size: int, bins: Any, low: Any, high: Any) -> bool:
    return isinstance(high, int) and (int(bins), low, int(high)) == (size, 0, size - 1)


@rule(aten.histc, aten.bincount)
def histogram(r: Rule, x: Dims, bins: Any = 100, low: Any = 0, high: Any = 0, *options: Any, **more: Any) -> Dims:
    """Counts of values: which index holds which value does not matter, but each one counts.

    A bin for each index of an axis is that axis: ``histc(chosen, bins=n, min=0, max=n - 1)``.
    """
    for axis in x:
        r.pin(axis, "counted")
    chosen_from = r.index_of(r.node.args[0])
    if chosen_from is not None and _one_bin_each(chosen_from.size, bins, low, high):
        r.looked_up(chosen_from, r.node.args[0], "counted")
        r.size(bins, chosen_from)
        r.size(high + 1, chosen_from)
        r.harmless(high)
        return (chosen_from,)
    if chosen_from is not None:
        r.pin(chosen_from, "counted")
    return tuple(r.fresh(size, "counts") for size in r.output_shape())
