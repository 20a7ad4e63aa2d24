"""The picture of a model's node groups: which parameter dimensions hang together, what is pinned and why."""

from __future__ import annotations

from graphprune.drawing.dot import to_pydot
from graphprune.drawing.files import FORMATS, write
from graphprune.drawing.graph import Graph, View, build_graph

__all__ = ["FORMATS", "Graph", "View", "build_graph", "to_pydot", "write"]
