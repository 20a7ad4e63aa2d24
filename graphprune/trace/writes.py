"""Which inputs of a graph its in-place operators write to."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import fx


def written_placeholders(graph: fx.Graph) -> set[fx.Node]:
    """Every placeholder that an operator writes to, itself or through a view of it."""
    bases: dict[fx.Node, set[fx.Node]] = {}  # node → the placeholders whose memory it may share
    written: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            bases[node] = {node}
            continue
        shared: set[fx.Node] = set()
        for source, writes in _shared_arguments(node):
            shared |= bases.get(source, set())
            if writes:
                written |= bases.get(source, set())
        bases[node] = shared
    return written


def _shared_arguments(node: fx.Node) -> list[tuple[fx.Node, bool]]:
    """The arguments whose memory the output of ``node`` may share, and whether ``node`` writes to them."""
    aliased = _aliased(node.target)
    if aliased is None:
        return [(source, False) for source in node.all_input_nodes]
    found = []
    for place, name, is_write in aliased:
        given = node.args[place] if place < len(node.args) else node.kwargs.get(name)
        found += [(source, is_write) for source in _nodes(given)]
    return found


@cache
def _aliased(operator: Any) -> list[tuple[int, str, bool]] | None:
    """Place and name of every argument that the result may share memory with, and whether it is written to.

    None if all of them may, read only.
    """
    schema = getattr(operator, "_schema", None)
    if schema is None or operator.namespace == "graphprune":
        return None
    return [(i, a.name, a.alias_info.is_write) for i, a in enumerate(schema.arguments) if a.alias_info is not None]


def _nodes(value: Any) -> list[fx.Node]:
    if isinstance(value, (list, tuple)):
        return [node for item in value for node in _nodes(item)]
    return [value] if isinstance(value, fx.Node) else []
