"""The picture of a model's node groups: which parameter dimensions hang together, what is pinned and why."""

from __future__ import annotations

import shutil
import subprocess
import textwrap
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeAlias

import networkx
import pydot

from graphprune.errors import GraphPruneError
from graphprune.folding import Fold, by_key, common_name, fold_groups, starred
from graphprune.inspection import Inspection
from graphprune.ir.program import AxisMap, Member, NodeGroup

Graph: TypeAlias = networkx.MultiDiGraph

FORMATS = (".dot", ".svg", ".png")

_FILL = {"prunable": "#a8dba8", "pinned": "#c8c8c8", "rank": "#cfe3fa", "inner": "#f6efdc", "left alone": "#dde3ea"}
_LINE = {"prunable": "#2e7d32", "pinned": "#616161", "rank": "#1f5fa8", "inner": "#b8a678", "left alone": "#78899b"}


def build_graph(inspection: Inspection) -> Graph:
    """The two-sided graph of ``inspection``: tensors on one side, node groups on the other.

    Repeated blocks are folded: what differs only in the numbers of its module path is one node with a ``count``.

    Nodes, named ``t0``, ``t1``, … and ``g0``, ``g1``, …, have the attributes

    - ``side``: ``"tensor"`` or ``"group"``; ``name``; ``count``; ``path``: the modules around it, outermost first;
    - a tensor: ``shape``, ``kind`` (``"parameter"`` or ``"buffer"``), ``tied`` (its other names);
    - a group: ``size``, ``kind`` (``"prunable"``, ``"pinned"``, ``"inner"``: an inner factor, ``"rank"`` of a composed
      group, or ``"left alone"``)
      and ``reason``, empty when it is prunable.

    ``graph.graph["composed"]`` has the paths of the modules that are composed groups, whose parts are drawn in a box;
    what leads out of that box is where it overlaps with other groups.

    Every edge goes from a tensor to a group, once per dimension ``dim``; ``consumes`` if the axis is summed away there.
    """
    composed = {tuple(starred(f"{one.module}.")[:-1].split(".")) for one in inspection.composed}
    graph: Graph = networkx.MultiDiGraph(name=type(inspection.program.model).__name__, composed=composed)
    folds = fold_groups(inspection.groups, lambda group: inspection.skipped.get(group.name, ""))
    tensors = _fold_tensors(inspection, folds)
    for place, tensor in enumerate(tensors):
        graph.add_node(f"t{place}", side="tensor", **tensor.attributes())
    for place, fold in enumerate(folds):
        graph.add_node(f"g{place}", side="group", **_group_attributes(fold, _kind(fold, inspection)))
    for place, tensor in enumerate(tensors):
        for group, dim, consumes in tensor.edges:
            graph.add_edge(f"t{place}", f"g{group}", dim=dim, consumes=consumes)
    for node, about in graph.nodes(data=True):
        if about["side"] == "group":
            about["path"] = _common([graph.nodes[tensor]["path"] for tensor in graph.predecessors(node)])
    return graph


@dataclass
class _Tensor:
    """Tensors that are the same but for their block numbers; ``edges`` are (number of the fold, dim, consumes)."""

    names: list[str]
    shape: tuple[int, ...]
    kind: str
    edges: tuple[tuple[int, int, bool], ...]
    tied: list[str] = field(default_factory=list)

    def attributes(self) -> dict[str, Any]:
        name = common_name(self.names)
        path = tuple(name.split(".")[:-2])  # without the tensor's own name and its module: q_proj is drawn by its box
        facts = {"name": name, "shape": self.shape, "kind": self.kind, "tied": self.tied}
        return {**facts, "count": len(self.names), "path": path}


def _fold_tensors(inspection: Inspection, folds: list[Fold]) -> list[_Tensor]:
    axes: AxisMap = inspection.program.need("axes")
    parameters = dict(inspection.program.model.named_parameters())
    edges: dict[str, list[tuple[int, int, bool]]] = {}
    for place, fold in enumerate(folds):
        for group in fold.groups:
            for member in group.members:
                edges.setdefault(member.tensor, []).append(_edge(place, member))
    single = [
        _Tensor(
            [name],
            tuple(axis.size for axis in axes.tensors[name]),
            "parameter" if name in parameters else "buffer",
            tuple(sorted(set(found))),
            [other for other, first in axes.canonical.items() if first == name and other != name],
        )
        for name, found in edges.items()
    ]

    classes = {path: type(module) for path, module in inspection.program.model.named_modules()}

    def key(tensor: _Tensor) -> Hashable:
        name = tensor.names[0]
        tied = tuple(starred(other) for other in tensor.tied)
        # The module's class keeps apart what a list of layers numbers alike: the biases of a conv and of its norm.
        return starred(name), classes[name.rpartition(".")[0]], tensor.shape, tensor.kind, tensor.edges, tied

    return [_merged(alike) for alike in by_key(single, key)]


def _edge(place: int, member: Member) -> tuple[int, int, bool]:
    return place, member.dim, member.consumes


def _merged(alike: list[_Tensor]) -> _Tensor:
    first = alike[0]
    tied = [common_name(list(names)) for names in zip(*(tensor.tied for tensor in alike), strict=True)]
    return _Tensor([tensor.names[0] for tensor in alike], first.shape, first.kind, first.edges, tied)


def _kind(fold: Fold, inspection: Inspection) -> str:
    group: NodeGroup = fold.groups[0]
    if any(group.name in composed.ranks for composed in inspection.composed):
        return "rank"
    if group.name not in inspection.skipped:
        return "prunable"
    if group.pins:
        return "pinned"
    return "left alone" if group.outer else "inner"


def _group_attributes(fold: Fold, kind: str) -> dict[str, Any]:
    return {"name": fold.name, "count": len(fold.groups), "size": fold.size, "kind": kind, "reason": fold.reason}


def _common(paths: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The longest path that all ``paths`` begin with."""
    levels = takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return tuple(level[0] for level in levels)


def to_pydot(graph: Graph) -> pydot.Dot:
    """The picture of a graph that :func:`build_graph` made, with one nested box per module that holds several nodes."""
    dot = pydot.Dot("groups", graph_type="digraph", rankdir="LR", fontname="Helvetica", ranksep="1.2", nodesep="0.12")
    dot.set("label", _quoted(graph.graph["name"]))
    dot.set("labelloc", "t")
    dot.set_node_defaults(fontname="Helvetica", fontsize="10", style="filled")
    dot.set_edge_defaults(fontname="Helvetica", fontsize="9")
    numbers = iter(range(graph.number_of_nodes() + 1))
    _fill(dot, _tidy(_tree(graph)), graph, numbers)
    for tensor, group, about in graph.edges(data=True):
        dot.add_edge(_drawn_edge(tensor, group, about, _LINE[graph.nodes[group]["kind"]]))
    return dot


@dataclass
class _Box:
    """A module in the picture: the nodes directly in it, and the boxes inside."""

    label: str = ""
    nodes: list[str] = field(default_factory=list)
    inside: dict[str, _Box] = field(default_factory=dict)
    composed: bool = False

    def all_nodes(self) -> Iterator[str]:
        yield from self.nodes
        for box in self.inside.values():
            yield from box.all_nodes()


def _tree(graph: Graph) -> _Box:
    root = _Box()
    for node, about in graph.nodes(data=True):
        box = root
        for depth, part in enumerate(about["path"], 1):
            composed = about["path"][:depth] in graph.graph["composed"]
            box = box.inside.setdefault(part, _Box(part, composed=composed))
        box.nodes.append(node)
    return root


def _tidy(box: _Box, root: bool = True) -> _Box:
    """``box`` without inner boxes of a single node, and with a box that holds nothing but one box made one with it."""
    children = [_tidy(child, root=False) for child in box.inside.values()]
    nodes = box.nodes + [node for child in children if not _is_worth_a_box(child) for node in child.all_nodes()]
    worth = {child.label: child for child in children if _is_worth_a_box(child)}
    if not root and not nodes and len(worth) == 1:
        only = next(iter(worth.values()))
        return _Box(f"{box.label}.{only.label}", only.nodes, only.inside, only.composed)
    return _Box(box.label, nodes, worth, box.composed)


def _is_worth_a_box(box: _Box) -> bool:
    return len(list(box.all_nodes())) > 1


def _fill(into: Any, box: _Box, graph: Graph, numbers: Iterator[int]) -> None:
    for node in box.nodes:
        into.add_node(_drawn_node(node, graph.nodes[node]))
    for child in box.inside.values():
        label = f"{child.label}: a composed group" if child.composed else child.label
        line = _LINE["rank"] if child.composed else "#90a4ae"
        cluster = pydot.Cluster(
            str(next(numbers)), label=_quoted(label), style="rounded", color=_quoted(line), fontsize="11"
        )
        cluster.set("labeljust", "l")
        _fill(cluster, child, graph, numbers)
        into.add_subgraph(cluster)


def _drawn_node(node: str, about: dict[str, Any]) -> pydot.Node:
    times = f"  ×{about['count']}" if about["count"] > 1 else ""
    if about["side"] == "tensor":
        lines = [about["name"] + times, " × ".join(map(str, about["shape"])) or "a number"]
        lines += [f"tied: {name}" for name in about["tied"]]
        dashed = "filled,dashed" if about["kind"] == "buffer" else "filled"
        return pydot.Node(node, shape="box", style=_quoted(dashed), fillcolor="white", label=_quoted("\n".join(lines)))
    kind = about["kind"]
    lines = [f"{about['name']}{times}", f"size {about['size']}, {kind}"]
    lines += textwrap.wrap(_shown_reason(kind, about["reason"]), 44)
    fill, line = _quoted(_FILL[kind]), _quoted(_LINE[kind])
    label = _quoted("\n".join(lines))
    return pydot.Node(node, shape="ellipse", margin="0.02", label=label, fillcolor=fill, color=line)


def _shown_reason(kind: str, reason: str) -> str:
    """The reason without what the kind already says."""
    return reason.removeprefix("pinned: ") if kind == "pinned" else reason.partition(" (")[0]


def _drawn_edge(tensor: str, group: str, about: dict[str, Any], colour: str) -> pydot.Edge:
    style = "dashed" if about["consumes"] else "solid"
    return pydot.Edge(tensor, group, label=_quoted(f"dim {about['dim']}"), style=style, color=_quoted(colour))


def _quoted(text: str) -> str:
    """``text`` as a DOT string: names hold dots, brackets and signs that a bare DOT word may not."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def write(graph: Graph, path: str | Path) -> None:
    """Draw ``graph`` into the file ``path``: ``.dot`` needs nothing else, ``.svg`` and ``.png`` the Graphviz program.

    Raises :class:`GraphPruneError` for another extension, without Graphviz, or when the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise GraphPruneError(f"{path.name} must end in {', '.join(FORMATS)}: the extension says what to draw.")
    source = to_pydot(graph).to_string().encode()
    content = source if path.suffix == ".dot" else _rendered(source, path.suffix)
    try:
        path.write_bytes(content)
    except OSError as error:
        raise GraphPruneError(f"{path} could not be written: {error.strerror}.") from error


def _rendered(source: bytes, extension: str) -> bytes:
    program = shutil.which("dot")
    if program is None:
        raise GraphPruneError(
            f"Drawing {extension} needs the program dot of Graphviz: install it (apt install graphviz, "
            "brew install graphviz, or https://graphviz.org/download), or write a .dot file, which needs nothing."
        )
    done = subprocess.run([program, f"-T{extension[1:]}"], input=source, capture_output=True, check=False)
    if done.returncode:
        raise GraphPruneError(f"Graphviz could not draw the graph: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout
