"""Which axis the values of a tensor index.

A router chooses some indices of an axis (``topk``, ``argmax``), and what it chose is looked up along the same axis of
other tensors. When indices of that axis go, the chosen numbers are renumbered without any code, as long as they are
only passed on, put in order, and looked up with. Renumbering keeps their order. Every other use, even a comparison,
reads them as numbers and pins the axis, and so does returning them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphprune.ir.axes import Axis, Pin, factors, find, leaves, pin
from graphprune.rules.registry import Facts, Selections

aten = torch.ops.aten

_CASTS = {
    aten.to,
    aten._to_copy,
    aten.clone,
    aten.contiguous,
    aten.detach,
    aten.alias,
    aten.lift_fresh,
    aten.lift_fresh_copy,
}
# The values of the first argument, each as it was, some of them or more than once, anywhere.
_MOVES = _CASTS | {
    aten.view,
    aten.reshape,
    aten._unsafe_view,
    aten.flatten,
    aten.unflatten,
    aten.permute,
    aten.transpose,
    aten.t,
    aten.movedim,
    aten.unsqueeze,
    aten.squeeze,
    aten.expand,
    aten.expand_as,
    aten.repeat,
    aten.repeat_interleave,
    aten.slice,
    aten.select,
    aten.index,
    aten.index_select,
    aten.gather,
    aten.unbind,
    aten.split,
    aten.split_with_sizes,
    aten.chunk,
}
# Arguments that are looked up with; the rule of the operator says along which axis.
_LOOKS_UP_WITH = {
    aten.index: 1,
    aten.index_select: 2,
    aten.gather: 2,
    aten.scatter: 2,
    aten.scatter_: 2,
    aten.scatter_add: 2,
    aten.scatter_add_: 2,
    aten.embedding: 1,
    aten.one_hot: 0,
    aten.histc: 0,
}
_JOINS = {aten.cat, aten.concat, aten.concatenate, aten.stack}
_SHAPE_ONLY = {aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten._assert_tensor_metadata}


def follow_indices(node: fx.Node, known: Selections) -> Iterator[Axis]:
    """Note what the output of ``node`` indexes, and give every axis whose indices it reads as numbers."""
    packet: Any = getattr(node.target, "overloadpacket", None)
    if packet in _JOINS and _join(node, known):
        return
    for place, source in _sources(node):
        axis = known.running_sums.get(source)
        if axis is not None and place == 0:
            if packet in _CASTS:
                known.running_sums[node] = axis
            elif str(packet).endswith("_"):  # changed in place
                del known.running_sums[source]
        axis = known.index_of.get(source)
        if axis is None:
            continue
        if place == 0 and packet in _MOVES:
            _note(node, axis, known)
        elif place == 0 and packet is aten.sort:
            known.index_of[node, 0] = axis
        elif not (
            _LOOKS_UP_WITH.get(packet) == place or packet in _SHAPE_ONLY or (place == 0 and packet is aten.argsort)
        ):
            yield axis


def _join(node: fx.Node, known: Selections) -> bool:
    """True when all tensors that ``node`` joins index one axis."""
    axes = [known.index_of.get(source) for source in node.args[0]]  # type: ignore[union-attr, arg-type]
    first = axes[0]
    if first is None or any(axis is None or find(axis) is not find(first) for axis in axes):
        return False
    _note(node, first, known)
    return True


def settle(facts: Facts) -> None:
    """Once all axes are known: whatever is not an axis that a router chooses from is pinned after all.

    Of experts in groups only whole groups may go: how many a group must keep depends on how many groups are chosen.
    """
    known = facts.selections
    used = {leaf for axis in known.looked_up for leaf in leaves(axis)}
    routed = set()
    for axis, chosen in known.ranked:
        outer, *inner = factors(axis)
        for factor in inner if outer.kind == "leaf" else [outer, *inner]:
            pin(factor, Pin("experts of a group that a router chooses from"))
        if outer in used:
            facts.minimums.append((outer, -(-chosen * outer.size // find(axis).size)))
            routed.add(outer)
    for axis, why in known.pins:
        for leaf in leaves(axis):
            if leaf not in routed:
                pin(leaf, why)


def _note(node: fx.Node, axis: Axis, known: Selections) -> None:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        known.index_of |= {(node, i): axis for i in range(len(value))}
    else:
        known.index_of[node] = axis


def _sources(node: fx.Node) -> Iterator[tuple[Any, fx.Node]]:
    """Every node among the arguments, with the place or the name of its argument."""
    for place, value in (*enumerate(node.args), *node.kwargs.items()):
        for item in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(item, fx.Node):
                yield place, item
