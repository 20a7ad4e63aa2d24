"""The graph in DOT, the language of Graphviz."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import pydot

from graphprune.drawing import words
from graphprune.drawing.boxes import Box, boxes
from graphprune.drawing.graph import Graph

_FILL = {"prunable": "#a8dba8", "pinned": "#c8c8c8", "rank": "#cfe3fa", "inner": "#f6efdc", "left alone": "#dde3ea"}
_LINE = {"prunable": "#2e7d32", "pinned": "#616161", "rank": "#1f5fa8", "inner": "#b8a678", "left alone": "#78899b"}


def to_pydot(graph: Graph) -> pydot.Dot:
    """The picture of a graph that :func:`build_graph` made, with one nested box per module that holds several nodes."""
    dot = pydot.Dot("groups", graph_type="digraph", rankdir="LR", fontname="Helvetica", ranksep="1.2", nodesep="0.12")
    dot.set("label", _quoted(graph.graph["name"]))
    dot.set("labelloc", "t")
    dot.set_node_defaults(fontname="Helvetica", fontsize="10", style="filled")
    dot.set_edge_defaults(fontname="Helvetica", fontsize="9")
    numbers = iter(range(graph.number_of_nodes() + 1))
    _fill(dot, boxes(graph, ("tensor", "group", "operator")), graph, numbers)
    for source, group, about in graph.edges(data=True):
        dot.add_edge(_drawn_edge(source, group, about, _LINE[graph.nodes[group]["kind"]]))
    return dot


def _fill(into: Any, box: Box, graph: Graph, numbers: Iterator[int]) -> None:
    for node in box.nodes:
        into.add_node(_drawn_node(node, graph.nodes[node]))
    for child in box.inside.values():
        line = _LINE["rank"] if child.composed else "#90a4ae"
        cluster = pydot.Cluster(
            str(next(numbers)), label=_quoted(child.title), style="rounded", color=_quoted(line), fontsize="11"
        )
        cluster.set("labeljust", "l")
        _fill(cluster, child, graph, numbers)
        into.add_subgraph(cluster)


def _drawn_node(node: str, about: dict[str, Any]) -> pydot.Node:
    if about["side"] == "tensor":
        lines = [words.title(about), words.shape(about), *(f"tied: {name}" for name in about["tied"])]
        look = {"shape": "box", "style": "filled,dashed" if about["kind"] == "buffer" else "filled"}
        look |= {"fillcolor": "white", "tooltip": "\n".join(about["dims"])}
    elif about["side"] == "operator":
        lines = [words.title(about), about["where"]]
        look = {"shape": "box", "style": "filled,rounded", "fillcolor": "white", "color": "#b0a0c0"}
    else:
        lines = [words.title(about), words.size(about)]
        lines += textwrap.wrap(words.reason(about), 44) or [words.structures(about)]
        look = {"shape": "ellipse", "margin": "0.02", "fillcolor": _FILL[about["kind"]], "color": _LINE[about["kind"]]}
        look |= {"tooltip": "\n".join([words.structures(about), *(_operator(one) for one in about["operators"])])}
        if about["kept"]:
            look |= {"shape": "box", "style": "striped", "fillcolor": _stripes(words.kept_share(about))}
    drawn = pydot.Node(node, label=_quoted("\n".join(lines)))
    for key, value in look.items():
        drawn.set(key, _quoted(value))
    return drawn


def _operator(about: dict[str, Any]) -> str:
    others = f", also in {len(about['groups']) - 1} more groups" if len(about["groups"]) > 1 else ""
    return f"{words.title(about)} {about['where']}{others}"


def _stripes(kept: float) -> str:
    """The share that is kept in green, what goes in red; Graphviz takes no share of 0."""
    return f"{_FILL['prunable']};{kept:.4f}:#f2b8b5" if kept < 1 else _FILL["prunable"]


def _drawn_edge(source: str, group: str, about: dict[str, Any], colour: str) -> pydot.Edge:
    if "dim" not in about:  # of an operator
        return pydot.Edge(group, source, style=_quoted("dotted"), arrowhead=_quoted("none"), color=_quoted("#b0a0c0"))
    style = "dashed" if about["consumes"] else "solid"
    return pydot.Edge(source, group, label=_quoted(f"dim {about['dim']}"), style=style, color=_quoted(colour))


def _quoted(text: str) -> str:
    """``text`` as a DOT string: names hold dots, brackets and signs that a bare DOT word may not."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
