"""Plan → the new value of every integer attribute whose axis shrinks."""

from __future__ import annotations

from graphprune.errors import GraphPruneError
from graphprune.ir.axes import Axis, find
from graphprune.ir.program import Program
from graphprune.passes.base import compiler_pass


@compiler_pass(requires=("plan", "attributes"), ensures=("new_attributes",), analysis=True)
def follow_sizes(program: Program) -> None:
    """Evaluate every attribute's polynomial at the sizes that the plan leaves."""
    selection = program.selection()

    def size(axis: Axis) -> int:
        kept = selection.get(find(axis))
        return axis.size if kept is None else kept.count

    program.new_attributes = {}
    for attribute, polynomial in program.need("attributes").items():
        value = polynomial.value(size)
        if value <= 0:
            raise GraphPruneError(f"The plan would make {attribute} {value}.")
        if value != polynomial.value(lambda axis: axis.size):
            program.new_attributes[attribute] = value
