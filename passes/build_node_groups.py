"""Axes → basic node groups: for every leaf axis, all parameter dimensions and operators that go together with it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import fx

from graphprune.ir.axes import Axis, factors, find, inner_width, leaves, parts
from graphprune.ir.program import AxisMap, Member, NodeGroup, Program
from graphprune.passes.base import compiler_pass
from graphprune.rules.registry import Dims
from graphprune.trace.adapters import plain_name


@compiler_pass(requires=("axes", "attributes"), ensures=("groups",), analysis=True)
def build_node_groups(program: Program) -> None:
    """One group per leaf axis that a parameter or buffer lies on, in the order of the parameters.

    A group is named by its first parameter dimension, with the place of the leaf when there are several:
    ``mlp.up_proj.weight[0]``, ``self_attn.q_proj.weight[0].1``. Adapters leave names, also those of modules, as they
    were: what is said of a model holds for it with adapters.
    """
    axes: AxisMap = program.need("axes")
    consumed = _consumed(program)
    parameters = dict(program.model.named_parameters())
    groups: dict[Axis, NodeGroup] = {}
    ordered = sorted(axes.tensors, key=lambda name: name not in parameters)  # buffers last
    for tensor in ordered:
        for dim, axis in enumerate(axes.tensors[tensor]):
            below = list(dict.fromkeys(leaves(axis)))
            outermost = set(outer_leaves(axis))
            for place, leaf in enumerate(below):
                if leaf.size == 1 and len(below) > 1:
                    continue
                group = groups.get(leaf)
                if group is None:
                    suffix = f".{place}" if len(below) > 1 else ""
                    name = f"{plain_name(program.model, tensor)}[{dim}]{suffix}"
                    group = groups[leaf] = NodeGroup(name, leaf, [], [], True, [])
                group.members.append(Member(tensor, dim, (tensor, dim) in consumed))
                if tensor in parameters and leaf not in outermost:
                    group.outer = False
    for group in groups.values():
        plain = (plain_name(program.model, member.tensor.rpartition(".")[0]) for member in group.members)
        group.modules = list(dict.fromkeys(plain))
    joined = {leaf for axis in axes.facts.careful for leaf in leaves(axis)}
    for leaf in (axes.more_than_one | joined) & groups.keys():
        groups[leaf].careful = 2
    for axis, of in axes.facts.multiples:
        for leaf in set(leaves(axis)) & groups.keys():
            group = groups[leaf]
            group.multiple = math.lcm(group.multiple, of // math.gcd(of, inner_width(axis, leaf)))
    for axis, minimum in axes.facts.minimums:
        for leaf in set(leaves(axis)) & groups.keys():
            groups[leaf].minimum = max(groups[leaf].minimum, minimum)
    below: dict[Axis, list[Axis]] = {}  # axis → the leaves below it that have a group
    for node, dims in axes.values.items():
        if node.op == "call_function":
            for leaf in _leaves_of(dims, groups, below):
                groups[leaf].operators.append(node)
    program.groups = list(groups.values())


def outer_leaves(axis: Axis) -> Iterator[Axis]:
    """The leaves of ``axis`` that are no inner factor of a product: removing one index removes one whole run."""
    first = factors(axis)[0]
    if first.kind == "leaf":
        yield first
    else:
        for part in parts(first):
            yield from outer_leaves(part)


def _leaves_of(
    dims: Dims | list[Dims] | None, groups: dict[Axis, NodeGroup], below: dict[Axis, list[Axis]]
) -> set[Axis]:
    if isinstance(dims, list):
        return {leaf for one in dims for leaf in _leaves_of(one, groups, below)}
    found: set[Axis] = set()
    for axis in map(find, dims or ()):
        if axis not in below:
            below[axis] = [leaf for leaf in leaves(axis) if leaf in groups]
        found.update(below[axis])
    return found


def _consumed(program: Program) -> set[tuple[str, int]]:
    """Parameter dimensions that a contraction sums away: columns, the secondary dimensions of rewriting."""
    return {(tensor, dim) for _, tensor, dim in weight_contractions(program)}


def weight_contractions(program: Program) -> Iterator[tuple[fx.Node, str, int]]:
    """Every contraction with a parameter, as (node, canonical parameter name, its contracted dimension ≥ 0)."""
    trace, axes = program.need("trace"), program.need("axes")
    for contraction in axes.facts.contractions:
        if contraction.weight is None:
            continue
        arg, dim = contraction.weight
        weight = contraction.node.args[arg]
        name = trace.tensor_names.get(weight.name) if isinstance(weight, fx.Node) else None
        if name is not None:
            name = axes.canonical[name]
            yield contraction.node, name, dim % len(axes.tensors[name])
