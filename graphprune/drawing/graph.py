"""The graph that is drawn: tensors on one side, node groups on the other, repeated blocks folded to one."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Any, TypeAlias

import networkx

from graphprune.errors import GraphPruneError
from graphprune.folding import Fold, by_key, common_name, fold_groups, starred
from graphprune.inspection import Inspection
from graphprune.ir.axes import Axis, find, inner_width
from graphprune.ir.program import AxisMap, Member, NodeGroup
from graphprune.trace.export import source_line

Graph: TypeAlias = networkx.MultiDiGraph
Widths: TypeAlias = Mapping[str, tuple[int, int]]

_BLOCK = re.compile(r"(?<![^.])(\d+)(?=\.)")  # the first number of a path is that of its block
# What takes a result apart, enters a traced block, or moves memory: which of these there are depends on the device.
_TIES_NOTHING = {"", "alias", "clone", "contiguous", "detach", "to"}


@dataclass(frozen=True)
class View:
    """What of a model is drawn.

    Attributes:
        layer: only the tensors of blocks of this number, which are then not folded, and the groups they are in.
        group: only groups whose name, as it is or with stars for block numbers, is this or matches this pattern, with
            all their tensors, and the groups that these are also in.
        operators: draw operators as well. Those of ``group`` are always drawn.
        widths: name of a group → (size before, size after) of a plan or of what was pruned already.
    """

    layer: int | None = None
    group: str | None = None
    operators: bool = False
    widths: Widths = field(default_factory=dict)


def build_graph(inspection: Inspection, view: View | None = None) -> Graph:
    """The two-sided graph of ``inspection``: tensors on one side, node groups on the other.

    Repeated blocks are folded: what differs only in the numbers of its module path is one node with a ``count``.

    Nodes, named ``t0``, ``t1``, … and ``g0``, ``g1``, …, have the attributes

    - ``side``: ``"tensor"`` or ``"group"``; ``name``; ``count``; ``path``: the modules around it, outermost first;
    - a tensor: ``shape``, ``kind`` (``"parameter"`` or ``"buffer"``), ``tied`` (its other names), ``parameters`` (its
      elements, 0 of a buffer), ``dims`` (what each dimension is made of, in names of groups);
    - a group: ``size``, ``kind`` (``"prunable"``, ``"pinned"``, ``"inner"``: an inner factor, ``"rank"`` of a composed
      group, or ``"left alone"``) and ``reason``, empty when it is prunable; ``structure``: the parameters that one
      removal structure (one index with all that goes with it) owns, every number that occurs; ``slices``: the
      parameter dimensions it is cut from; ``elsewhere``: those of them that are not drawn; ``operators``: everything
      computed along it, as dicts of ``name``, ``where`` (source line and module), ``count`` and ``groups``, the nodes
      of all groups it belongs to; ``kept``: (name, size before, size after) of each of its groups in the view's
      ``widths``; ``composed``: the composed groups that it overlaps with or is a rank of.

    Operators that are drawn are nodes ``o0``, ``o1``, … of side ``"operator"`` with an edge to every group they are in.

    ``graph.graph["composed"]`` has the paths of the modules that are composed groups, whose parts are drawn in a box;
    what leads out of that box is where it overlaps with other groups.

    Every edge goes from a tensor to a group, once per dimension ``dim``; ``consumes`` if the axis is summed away there.

    Raises :class:`GraphPruneError` when the view shows nothing, or its widths are of another model.
    """
    view = view or View()
    composed = {tuple(_starred(one.module).split(".")) for one in inspection.composed}
    if view.layer is not None:
        composed |= {tuple(one.module.split(".")) for one in inspection.composed}
    graph: Graph = networkx.MultiDiGraph(name=type(inspection.program.model).__name__, composed=composed)
    _check_widths(inspection, view.widths)
    shown, groups = _shown(inspection, view)
    folds = fold_groups(groups, lambda group: inspection.skipped.get(group.name, ""))
    tensors = _fold_tensors(inspection, folds, shown)
    for place, tensor in enumerate(tensors):
        graph.add_node(f"t{place}", side="tensor", **tensor.attributes())
    for place, fold in enumerate(folds):
        graph.add_node(f"g{place}", side="group", **_group_attributes(fold, inspection, view.widths))
    for place, tensor in enumerate(tensors):
        for group, dim, consumes in tensor.edges:
            graph.add_edge(f"t{place}", f"g{group}", dim=dim, consumes=consumes)
    for node, about in graph.nodes(data=True):
        if about["side"] == "group":
            drawn = list(graph.predecessors(node))
            about["path"] = _common([graph.nodes[tensor]["path"] for tensor in drawn])
            about["elsewhere"] = about["count"] * about["slices"] - sum(
                graph.nodes[tensor]["count"] for tensor, _ in graph.in_edges(node)
            )
    _add_operators(graph, folds, view)
    return graph


def _shown(inspection: Inspection, view: View) -> tuple[set[str], list[NodeGroup]]:
    """The tensors of a view, and the groups that they are in."""
    tensors = {member.tensor for group in inspection.groups for member in group.members}
    if view.layer is not None:
        tensors = {name for name in tensors if _block(name) == view.layer}
        if not tensors:
            raise GraphPruneError(f"There is no layer {view.layer}. {_blocks(inspection)}")
    if view.group is not None:
        matching = [group for group in inspection.groups if _is_called(group, view.group)]
        if not matching:
            names = list(dict.fromkeys(starred(group.name) for group in inspection.groups))
            raise GraphPruneError(f"No node group is called {view.group!r}. There are: {', '.join(names)}.")
        tensors &= {member.tensor for group in matching for member in group.members}
        if not tensors:
            raise GraphPruneError(f"Node group {view.group!r} has nothing in layer {view.layer}.")
    return tensors, [g for g in inspection.groups if any(member.tensor in tensors for member in g.members)]


def _block(name: str) -> int | None:
    found = _BLOCK.search(name)
    return int(found[1]) if found else None


def _blocks(inspection: Inspection) -> str:
    numbers = {_block(member.tensor) for group in inspection.groups for member in group.members} - {None}
    return f"They have the numbers {min(numbers)} to {max(numbers)}." if numbers else "None has a number."  # type: ignore[type-var]


def _is_called(group: NodeGroup, pattern: str) -> bool:
    # A name has brackets, which mean something else in a pattern: it is compared as it is first.
    as_pattern = pattern.replace("[", "[[]")
    return any(name == pattern or fnmatchcase(name, as_pattern) for name in (group.name, starred(group.name)))


def _check_widths(inspection: Inspection, widths: Widths) -> None:
    sizes = {group.name: group.size for group in inspection.groups}
    for name, (before, after) in widths.items():
        size = sizes.get(name)
        if size is not None and size not in (before, after):
            raise GraphPruneError(
                f"The plan is of another model: it keeps {after} of {before} indices of {name}, which has {size}."
            )
    if widths and not widths.keys() & sizes.keys():
        raise GraphPruneError(f"The plan is of another model, which has no node group {next(iter(widths))}.")


@dataclass
class _Tensor:
    """Tensors that are the same but for their block numbers; ``edges`` are (number of the fold, dim, consumes)."""

    names: list[str]
    shape: tuple[int, ...]
    kind: str
    edges: tuple[tuple[int, int, bool], ...]
    tied: list[str] = field(default_factory=list)
    dims: list[str] = field(default_factory=list)

    def attributes(self) -> dict[str, Any]:
        name = common_name(self.names)
        path = tuple(name.split(".")[:-2])  # without the tensor's own name and its module: q_proj is drawn by its box
        facts = {"name": name, "shape": self.shape, "kind": self.kind, "tied": self.tied, "dims": self.dims}
        parameters = math.prod(self.shape) if self.kind == "parameter" else 0
        return {**facts, "parameters": parameters, "count": len(self.names), "path": path}


def _fold_tensors(inspection: Inspection, folds: list[Fold], shown: set[str]) -> list[_Tensor]:
    axes: AxisMap = inspection.program.need("axes")
    parameters = dict(inspection.program.model.named_parameters())
    edges: dict[str, list[tuple[int, int, bool]]] = {}
    for place, fold in enumerate(folds):
        for group in fold.groups:
            for member in group.members:
                if member.tensor in shown:
                    edges.setdefault(member.tensor, []).append(_edge(place, member))
    single = [
        _Tensor(
            [name],
            tuple(axis.size for axis in axes.tensors[name]),
            "parameter" if name in parameters else "buffer",
            tuple(sorted(set(found))),
            [other for other, first in axes.canonical.items() if first == name and other != name],
        )
        for name in axes.tensors
        if (found := edges.get(name)) is not None
    ]

    classes = {path: type(module) for path, module in inspection.program.model.named_modules()}

    def key(tensor: _Tensor) -> Hashable:
        name = tensor.names[0]
        tied = tuple(starred(other) for other in tensor.tied)
        # The module's class keeps apart what a list of layers numbers alike: the biases of a conv and of its norm.
        return starred(name), classes[name.rpartition(".")[0]], tensor.shape, tensor.kind, tensor.edges, tied

    merged = [_merged(alike) for alike in by_key(single, key)]
    for tensor in merged:
        tensor.dims = [starred(dim) if len(tensor.names) > 1 else dim for dim in inspection.dims(tensor.names[0])]
    return merged


def _edge(place: int, member: Member) -> tuple[int, int, bool]:
    return place, member.dim, member.consumes


def _merged(alike: list[_Tensor]) -> _Tensor:
    first = alike[0]
    tied = [common_name(list(names)) for names in zip(*(tensor.tied for tensor in alike), strict=True)]
    return _Tensor([tensor.names[0] for tensor in alike], first.shape, first.kind, first.edges, tied)


def _group_attributes(fold: Fold, inspection: Inspection, widths: Widths) -> dict[str, Any]:
    names = {group.name for group in fold.groups}
    return {
        "name": fold.name,
        "count": len(fold.groups),
        "size": fold.size,
        "kind": _kind(fold, inspection),
        "reason": fold.reason,
        "structure": sorted({_structure(group, inspection) for group in fold.groups}),
        "slices": len(set(fold.groups[0].members)),
        "kept": [(group.name, *widths[group.name]) for group in fold.groups if group.name in widths],
        "composed": list(
            dict.fromkeys(
                _starred(one.module) if len(names) > 1 else one.module
                for one in inspection.composed
                if names & {*one.ranks, *one.overlaps}
            )
        ),
    }


def _kind(fold: Fold, inspection: Inspection) -> str:
    group: NodeGroup = fold.groups[0]
    if any(group.name in composed.ranks for composed in inspection.composed):
        return "rank"
    if group.name not in inspection.skipped:
        return "prunable"
    if group.pins:
        return "pinned"
    return "left alone" if group.outer else "inner"


def _structure(group: NodeGroup, inspection: Inspection) -> int:
    """How many parameters one index of a group owns, those in several of its dimensions once."""
    axes: AxisMap = inspection.program.need("axes")
    parameters = {name for name, _ in inspection.program.model.named_parameters()}
    leaf = find(group.axis)
    owned = {member.tensor for member in group.members} & parameters
    return sum(_owned(axes.tensors[tensor], leaf) for tensor in owned)


def _owned(dims: Any, leaf: Axis) -> int:
    left = math.prod(axis.size - inner_width(axis, leaf) for axis in dims)
    return math.prod(axis.size for axis in dims) - left


def _add_operators(graph: Graph, folds: list[Fold], view: View) -> None:
    """The operators of every group, those of one kind on one line of equal blocks as one; as nodes where drawn."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}  # operator → group's node → the line of each of them
    for place, fold in enumerate(folds):
        for node in dict.fromkeys(node for group in fold.groups for node in group.operators):
            if (name := _operator(node.target)) is not None:
                where = source_line(node)
                found.setdefault((name, _starred(where)), {}).setdefault(f"g{place}", []).append(where)
    matching = {f"g{n}" for n, fold in enumerate(folds) if view.group and _is_called(fold.groups[0], view.group)}
    for group in (node for node, side in graph.nodes(data="side") if side == "group"):
        graph.nodes[group]["operators"] = [
            {"name": name, "where": _line(wheres[group]), "count": len(wheres[group]), "groups": list(wheres)}
            for (name, _), wheres in found.items()
            if group in wheres
        ]
    drawn = [(name, wheres) for (name, _), wheres in found.items() if view.operators or matching & wheres.keys()]
    for place, (name, wheres) in enumerate(drawn):
        most = max(wheres.values(), key=len)
        graph.add_node(f"o{place}", side="operator", name=name, where=_line(most), count=len(most), path=())
        for group in wheres:
            graph.add_edge(f"o{place}", group)


def _starred(where: str) -> str:
    return starred(f"{where}.")[:-1]  # also a number that ends the path


def _line(wheres: list[str]) -> str:
    return wheres[0] if len(set(wheres)) == 1 else _starred(wheres[0])


def _operator(target: Any) -> str | None:
    """``linear`` of ``aten.linear.default``; None for what ties nothing."""
    name = str(target)
    name = name.removeprefix("aten.").partition(".")[0] if name.startswith("aten.") else ""
    return None if name in _TIES_NOTHING else name


def _common(paths: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The longest path that all ``paths`` begin with."""
    levels = takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return tuple(level[0] for level in levels)
