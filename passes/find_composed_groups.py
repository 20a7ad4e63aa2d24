"""Node groups → composed node groups: low-rank updates of a weight, such as LoRA, that form one whole with it.

LoRAShear (arXiv 2310.18356, Section 3.1): the operators of an adapted layer are one composed group; its rank, which
ties the factors to each other, is never pruned, and its outer dimensions belong to the basic groups around it, which it
overlaps with.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from graphprune.ir.axes import Axis, find, is_pinned
from graphprune.ir.program import ComposedGroup, NodeGroup, Program
from graphprune.passes.base import compiler_pass
from graphprune.rules.registry import Dims

_aten = torch.ops.aten
# What may happen between the factors of a low-rank update: it is linear, and mixes no index of the rank with another.
_LINEAR = {
    _aten.linear.default, _aten.addmm.default, _aten.mm.default, _aten.matmul.default, _aten.bmm.default,
    _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.convolution.default,
    _aten.embedding.default, _aten.mul.Tensor, _aten.mul.Scalar, _aten.t.default, _aten.numpy_T.default,
    _aten.transpose.int, _aten.permute.default, _aten.view.default, _aten.reshape.default, _aten.clone.default,
    _aten.contiguous.default, _aten._to_copy.default, _aten.to.dtype, _aten.dropout.default, _aten.detach.default,
}  # fmt: skip


@compiler_pass(requires=("groups", "axes"), ensures=("composed",), analysis=True)
def find_composed_groups(program: Program) -> None:
    """One composed group per weight that low-rank updates are added to, in the order of the model.

    Found from the graph and the module tree: two factors ``A`` and ``B`` share an axis that nothing else lies on and
    that only linear operators pass, and inside the module around both is a weight ``W`` that one dimension of ``A`` and
    one of ``B`` lie on.
    """
    tensors = program.need("axes").tensors
    parameters = [name for name, _ in program.model.named_parameters() if name in tensors]
    found: dict[str, ComposedGroup] = {}
    for group in program.need("groups"):
        factors = _factors(group)
        if factors is None:
            continue
        module = _module_around(factors)
        inside = [name for name in parameters if name.startswith(f"{module}.")]
        both = [tensors[name] for name in factors]
        base = next((n for n in inside if n not in factors and _spans(tensors[n], both, find(group.axis))), None)
        if base is None:
            continue
        composed = found.setdefault(module, ComposedGroup(module, base, [], [], inside, []))
        composed.factors.append(factors)
        composed.ranks.append(group.name)
    for composed in found.values():
        composed.overlaps = [
            group.name
            for group in program.need("groups")
            if group.name not in composed.ranks and any(member.tensor in composed.tensors for member in group.members)
        ]
    program.composed = list(found.values())


def _factors(group: NodeGroup) -> tuple[str, str] | None:
    """The names of ``A`` and ``B`` if the axis of ``group`` could be the rank of an update: nothing else is on it."""
    if len(group.members) != 2 or all(member.consumes for member in group.members):
        return None
    first, second = sorted(group.members, key=lambda member: member.consumes)
    if first.tensor == second.tensor or not all(map(_is_linear, group.operators)):
        return None
    return first.tensor, second.tensor


def _is_linear(node: fx.Node) -> bool:
    scalar = node.target not in (_aten.mul.Tensor, _aten.mul.Scalar) or not isinstance(node.args[1], fx.Node)
    return node.target in _LINEAR and scalar


def _module_around(factors: tuple[str, str]) -> str:
    """The path of the innermost module that holds both."""
    paths = [name.split(".")[:-1] for name in factors]
    shared = 0
    while shared < min(map(len, paths)) and paths[0][shared] == paths[1][shared]:
        shared += 1
    return ".".join(paths[0][:shared])


def _spans(dims: Dims, factors: Iterable[Dims], rank: Axis) -> bool:
    """Whether a weight of these dimensions has, for each of the factors, one of its axes other than the rank.

    Of pinned axes the size is enough: the rows of two tables that one index looks up are not told to be the same.
    """
    own = {find(axis) for axis in dims}
    pinned = {axis.size for axis in own if is_pinned(axis)}
    return all(
        any(a in own or (is_pinned(a) and a.size in pinned) for a in map(find, factor) if a is not rank and a.size > 1)
        for factor in factors
    )
