"""Masking without a new model: zeros in the weights that consume what is removed.

An index contributes nothing where all weights that it is contracted with are zero, whatever its value is. So a copy
of these weights with zero columns is the masked original (:mod:`graphprune.passes.verify`) for data of any shape.
"""

from __future__ import annotations

import torch
from torch import fx

from graphprune.ir.axes import find, leaves
from graphprune.ir.program import NodeGroup, Program
from graphprune.ir.selection import Kept, mask_of
from graphprune.trace.export import source_line

aten = torch.ops.aten
# What moves elements about, so that zeros along an axis stay zeros along it.
_MOVES = {
    aten.alias,
    aten.clone,
    aten.contiguous,
    aten.detach,
    aten.expand,
    aten.flatten,
    aten.index_select,
    aten.movedim,
    aten.numpy_T,
    aten.permute,
    aten.reshape,
    aten.select,
    aten.slice,
    aten.squeeze,
    aten.t,
    aten.to,
    aten._to_copy,
    aten.transpose,
    aten.unflatten,
    aten.unsqueeze,
    aten.view,
}


def consuming_weights(program: Program, group: NodeGroup) -> list[str] | str:
    """Canonical names of the parameters that contract a group; or why zeros in them would not mask it."""
    axes, leaf = program.need("axes"), find(group.axis)
    for node in axes.facts.statistics:
        if any(leaf in leaves(axis) for axis in axes.values[node.args[0]]):
            return f"a statistic is taken over it, or a router chooses from it ({source_line(node)})"
    found: dict[str, None] = {}
    for contraction in axes.facts.contractions:
        if leaf in leaves(contraction.factor or axes.values[contraction.operand][contraction.dim]):
            operands = [contraction.operand]
            if contraction.weight is not None:
                operands.append(contraction.node.args[contraction.weight[0]])
            weights = [name for name in (_parameter(program, node) for node in operands) if name is not None]
            weights = [name for name in weights if any(leaf in leaves(axis) for axis in axes.tensors[name])]
            if not weights:
                return f"it is summed away without a weight ({source_line(contraction.node)})"
            found[weights[-1]] = None
    return list(found) or "no weight consumes it"


def kept_places(program: Program, group: NodeGroup, kept: torch.Tensor, weight: str) -> torch.Tensor:
    """Where a parameter stays when of a group only the indices ``kept`` do: boolean, broadcastable to its shape.

    ``kept`` is int64, sorted, of shape ``(count,)`` or, for a ragged axis, ``(outer size, count)``.
    """
    leaf = find(group.axis)
    outer = program.ragged_axes().get(leaf) if kept.ndim == 2 else None
    dims = program.need("axes").tensors[weight]
    places = torch.ones([1] * len(dims), dtype=torch.bool)
    for dim in range(len(dims)):
        mask = mask_of(dims, dim, {leaf: Kept(group.size, kept, outer)})
        if mask is not None:
            places = places & mask
    return places


def _parameter(program: Program, node: object) -> str | None:
    """The canonical name of the parameter that a value is, or has only moved elements of."""
    while isinstance(node, fx.Node) and getattr(node.target, "overloadpacket", None) in _MOVES:
        node = node.args[0]
    name = program.need("trace").tensor_names.get(node.name) if isinstance(node, fx.Node) else None
    canonical = None if name is None else program.need("axes").canonical[name]
    return canonical if canonical in dict(program.model.named_parameters(remove_duplicate=False)) else None
