"""Where a constant can be added to what a consumer matrix makes: into its bias, or a new one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from graphprune.ir.program import Program
from graphprune.ir.selection import index_of
from graphprune.passes.build_node_groups import weight_contractions
from graphprune.trace.skeleton import names

aten = torch.ops.aten
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)

# Where each operator takes its bias.
_PLACE = {aten.linear.default: 2, aten.addmm.default: 0, **dict.fromkeys(_CONVOLUTIONS, 2)}


@dataclass(frozen=True)
class Bias:
    """A bias that only one operator adds: the parameter ``name``, or a new one of the module ``new``."""

    name: str | None = None
    new: str | None = None


def bias_of(program: Program, node: fx.Node, weight: str) -> Bias | None:
    """The bias of the operator ``node``, which multiplies by the parameter ``weight``; None where there can be none.

    A plain :class:`torch.nn.Linear` without a bias can get one. An emitted graph cannot, nor a
    model that its class must be able to load (``deploy``).
    """
    place = _PLACE.get(node.target)
    if place is None:
        return None
    found = node.args[place] if len(node.args) > place else None
    trace = program.need("trace")
    if isinstance(found, fx.Node):
        name = trace.tensor_names.get(found.name)
        return Bias(name=program.need("axes").canonical[name]) if name is not None and len(found.users) == 1 else None
    path, _, own = weight.rpartition(".")
    module = program.model.get_submodule(path)
    used_once = len(node.args[1].users) == 1 if isinstance(node.args[1], fx.Node) else False
    tied = sum(tensor is module._parameters.get("weight") for tensor in names(program.model).values()) > 1
    may_be_new = program.options.emit == "module" and program.options.deploy is None
    plain = type(module).forward is nn.Linear.forward and "forward" not in vars(module) and own == "weight"
    if plain and used_once and not tied and module.bias is None and may_be_new:
        return Bias(new=path)
    return None


def new_biases_by_node(program: Program) -> dict[fx.Node, torch.Tensor]:
    """The new biases at full size, by the operator to whose result they are added."""
    biases = program.new_biases
    found = ((node, name.removesuffix(".weight")) for node, name, _ in weight_contractions(program)) if biases else ()
    return {node: biases[path] for node, path in found if path in biases}


def add_new_biases(program: Program, model: nn.Module) -> None:
    """Give ``model``, the pruned one, its new biases, with the indices of the output that are kept."""
    axes, selection = program.need("axes"), program.selection()
    for path, bias in program.new_biases.items():
        linear = model.get_submodule(path)
        kept = index_of(axes.tensors[axes.canonical[f"{path}.weight"]][:1], 0, selection)
        value = bias if kept is None else bias[kept.flatten().to(bias.device)]
        linear.bias = nn.Parameter(value.clone(), requires_grad=linear.weight.requires_grad)  # type: ignore[union-attr, assignment]
