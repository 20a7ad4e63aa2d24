"""Where everything is on the page: tensors in the boxes of their modules, groups beside them, operators beyond.

Tensors are in the order of the model. A group is as near as it gets to the middle of its tensors, so that what hangs
together within a block stands beside the block, and lines are short. Everything is in CSS pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from graphprune.drawing.boxes import Box, boxes
from graphprune.drawing.graph import Graph


@dataclass(frozen=True)
class Sizes:
    """Widths of the columns and of the space between them, and heights of what stands in them."""

    tensor: int
    group: int
    operator: int
    between: int
    tensor_height: int
    group_height: int
    operator_height: int
    indent: int
    gap: int = 8
    heading: int = 24


WIDE = Sizes(
    tensor=300, group=330, operator=300, between=150, tensor_height=46, group_height=100, operator_height=46, indent=10
)
NARROW = Sizes(
    tensor=168, group=158, operator=158, between=34, tensor_height=60, group_height=128, operator_height=62, indent=4
)


@dataclass(frozen=True)
class Place:
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        return self.y + self.height / 2

    def as_list(self) -> list[float]:
        return [self.x, self.y, self.width, self.height]


@dataclass
class Layout:
    """Node → place, boxes as (place, title, whether it is a composed group), and a path for every edge in SVG terms.

    ``depth`` is how many parts of the path of a tensor the boxes around it say already.
    """

    nodes: dict[str, Place] = field(default_factory=dict)
    frames: list[tuple[Place, str, bool]] = field(default_factory=list)
    edges: list[str] = field(default_factory=list)
    depth: dict[str, int] = field(default_factory=dict)

    @property
    def width(self) -> float:
        return max(place.x + place.width for place in self.nodes.values())

    @property
    def height(self) -> float:
        everything = [*self.nodes.values(), *(place for place, _, _ in self.frames)]
        return max(place.y + place.height for place in everything)


def lay_out(graph: Graph, sizes: Sizes) -> Layout:
    """Places for all of ``graph``; edges in the order of ``graph.edges``."""
    layout = Layout()
    _stack(boxes(graph, ("tensor",)), layout, sizes, Place(0, 0, sizes.tensor, 0), 0)
    sides: dict[str, list[str]] = {"group": [], "operator": []}
    for node, side in graph.nodes(data="side"):
        if side in sides:
            sides[side].append(node)
    x = sizes.tensor + sizes.between
    tensors = {node: [t for t in graph.predecessors(node) if t in layout.nodes] for node in sides["group"]}
    _column(tensors, layout, Place(x, 0, sizes.group, sizes.group_height), sizes.gap)
    x += sizes.group + sizes.between
    groups = {node: list(graph.successors(node)) for node in sides["operator"]}
    _column(groups, layout, Place(x, 0, sizes.operator, sizes.operator_height), sizes.gap)
    layout.edges = _lines(graph, layout)
    return layout


def _stack(box: Box, layout: Layout, sizes: Sizes, inside: Place, depth: int) -> float:
    """Put a box's nodes and boxes below one another into a place of open height; returns where they end."""
    items: list[str | Box] = [*box.nodes, *box.inside.values()]
    y = inside.y
    for item in sorted(items, key=_first):
        if isinstance(item, str):
            layout.nodes[item] = Place(inside.x, y, inside.width, sizes.tensor_height)
            layout.depth[item] = depth
            y += sizes.tensor_height + sizes.gap
            continue
        within = Place(inside.x + sizes.indent, y + sizes.heading, inside.width - 2 * sizes.indent, 0)
        end = _stack(item, layout, sizes, within, depth + item.label.count(".") + 1)
        layout.frames.append((Place(inside.x, y, inside.width, end - y), item.title, item.composed))
        y = end + sizes.gap
    return y


def _first(item: str | Box) -> int:
    """The place in the model of a tensor, or of a box: that of its first tensor."""
    return int(item[1:]) if isinstance(item, str) else min(map(_first, item.all_nodes()))


def _column(beside: dict[str, list[str]], layout: Layout, of: Place, gap: float) -> None:
    """Put nodes below one another into a column, each as near as it gets to the middle of what it is beside."""
    wanted = {
        node: sum(layout.nodes[other].middle for other in others) / len(others) - of.height / 2
        for node, others in beside.items()
    }
    order = sorted(wanted, key=lambda node: wanted[node])
    for node, y in zip(order, _apart([wanted[node] for node in order], of.height + gap), strict=True):
        layout.nodes[node] = Place(of.x, y, of.width, of.height)


def _apart(wanted: list[float], step: float) -> list[float]:
    """Numbers at least ``step`` apart, none negative, that are nearest to the sorted ``wanted`` (least squares).

    With the steps taken off, that is isotonic regression: neighbours that are out of order share their mean.
    """
    runs: list[tuple[float, int]] = []  # mean, how many
    for place, value in enumerate(wanted):
        mean, count = value - place * step, 1
        while runs and runs[-1][0] > mean:
            before, many = runs.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        runs.append((mean, count))
    flat = [max(0.0, mean) for mean, count in runs for _ in range(count)]
    return [value + place * step for place, value in enumerate(flat)]


def _lines(graph: Graph, layout: Layout) -> list[str]:
    """A curve for every edge, from the right side of what is further left; lines do not end in one point."""
    edges: list[tuple[str, str, Any]] = []
    for source, target, about in graph.edges(data=True):
        left, right = sorted((source, target), key=lambda node: layout.nodes[node].x)
        edges.append((left, right, about))
    leaving = {node: [n for n, edge in enumerate(edges) if edge[0] == node] for node, _, _ in edges}
    coming = {node: [n for n, edge in enumerate(edges) if edge[1] == node] for _, node, _ in edges}
    starts: dict[int, float] = {}
    ends: dict[int, float] = {}
    for node, found in leaving.items():
        found.sort(key=lambda n: (edges[n][2].get("dim", 0), layout.nodes[edges[n][1]].y))
        starts |= dict(zip(found, _ports(layout.nodes[node], len(found)), strict=True))
    for node, found in coming.items():
        found.sort(key=lambda n: layout.nodes[edges[n][0]].y)
        ends |= dict(zip(found, _ports(layout.nodes[node], len(found)), strict=True))
    lines = []
    for n, (left, right, _) in enumerate(edges):
        x, until = layout.nodes[left].x + layout.nodes[left].width, layout.nodes[right].x
        bend = (until - x) / 2
        y, down = f"{starts[n]:.1f}", f"{ends[n]:.1f}"
        lines.append(f"M{x:g} {y}C{x + bend:g} {y} {until - bend:g} {down} {until:g} {down}")
    return lines


def _ports(place: Place, count: int) -> list[float]:
    return [place.y + place.height * (n + 1) / (count + 1) for n in range(count)]
