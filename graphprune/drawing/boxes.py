"""The modules of a model as boxes within boxes around what is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from graphprune.drawing.graph import Graph


@dataclass
class Box:
    """A module in the picture: the nodes directly in it, and the boxes inside."""

    label: str = ""
    nodes: list[str] = field(default_factory=list)
    inside: dict[str, Box] = field(default_factory=dict)
    composed: bool = False

    @property
    def title(self) -> str:
        return f"{self.label}: a composed group" if self.composed else self.label

    def all_nodes(self) -> Iterator[str]:
        yield from self.nodes
        for box in self.inside.values():
            yield from box.all_nodes()


def boxes(graph: Graph, sides: tuple[str, ...]) -> Box:
    """Nested boxes around the nodes of ``sides``, none of them around a single node or around nothing but a box."""
    root = Box()
    for node, about in graph.nodes(data=True):
        if about["side"] not in sides:
            continue
        box = root
        for depth, part in enumerate(about["path"], 1):
            composed = about["path"][:depth] in graph.graph["composed"]
            box = box.inside.setdefault(part, Box(part, composed=composed))
        box.nodes.append(node)
    return _tidy(root)


def _tidy(box: Box, root: bool = True) -> Box:
    """``box`` without inner boxes of a single node, and with a box that holds nothing but one box made one with it."""
    children = [_tidy(child, root=False) for child in box.inside.values()]
    nodes = box.nodes + [node for child in children if not _is_worth_a_box(child) for node in child.all_nodes()]
    worth = {child.label: child for child in children if _is_worth_a_box(child)}
    if not root and not nodes and len(worth) == 1:
        only = next(iter(worth.values()))
        return Box(f"{box.label}.{only.label}", only.nodes, only.inside, only.composed)
    return Box(box.label, nodes, worth, box.composed)


def _is_worth_a_box(box: Box) -> bool:
    return len(list(box.all_nodes())) > 1
