"""What a removed channel adds on average goes into the bias of whoever consumed it (FLAP, arXiv 2312.11983, Eq. 7)."""

from __future__ import annotations

import torch
from torch import fx

from graphprune.ir.program import Program
from graphprune.ir.selection import mask_of
from graphprune.passes.base import compiler_pass
from graphprune.passes.build_node_groups import weight_contractions
from graphprune.trace.skeleton import names

aten = torch.ops.aten
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)

# Where each operator takes its bias.
_BIAS = {aten.linear.default: 2, aten.addmm.default: 0, **dict.fromkeys(_CONVOLUTIONS, 2)}
_GROUPS = 6  # where a convolution takes the number of its groups


@compiler_pass(requires=("plan", "moments"))
def compensate_bias(program: Program) -> None:
    """``b ← b + W (μ ⊙ removed)``: the bias takes the mean of what no longer comes.

    It is added to what the bias is already. A consumer without a bias of its own stays as it is.
    """
    axes, tensors, selection = program.need("axes"), names(program.model), program.selection()
    for node, name, dim in weight_contractions(program):
        mask = mask_of(axes.tensors[name], dim, selection)
        bias = _own_bias(program, node)
        if bias is None or mask is None or name not in program.need("moments"):
            continue
        weight, mean = program.weight(tensors[name]), program.need("moments")[name].mean[0]
        by_channel = weight.movedim(dim, 1).flatten(2).sum(-1) if weight.ndim > 2 else weight.movedim(dim, 1)
        missing = by_channel.double() @ torch.where(mask.flatten(), 0, mean.cpu()).to(weight.device)
        old = program.weight(tensors[bias])
        program.updates[id(tensors[bias])] = (old.double() + missing).to(old.dtype)


def _own_bias(program: Program, node: fx.Node) -> str | None:
    """The parameter that only this operator adds to its result, if there is one."""
    place = _BIAS.get(node.target)
    grouped = node.target in _CONVOLUTIONS and len(node.args) > _GROUPS and node.args[_GROUPS] != 1
    if place is None or len(node.args) <= place or grouped:
        return None
    bias = node.args[place]
    found = program.need("trace").tensor_names.get(bias.name) if isinstance(bias, fx.Node) else None
    return found if found is not None and len(bias.users) == 1 else None
