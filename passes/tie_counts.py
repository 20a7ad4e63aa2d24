"""``deploy="transformers"``: only what the config can say may shrink, and what it says at once shrinks alike."""

from __future__ import annotations

from graphprune.deploy.classes import find_classes
from graphprune.deploy.fields import Fields, find_fields
from graphprune.deploy.stock import Stock
from graphprune.errors import GraphPruneError
from graphprune.ir.program import Program
from graphprune.passes.base import compiler_pass
from graphprune.trace.skeleton import names


@compiler_pass(requires=("prunable", "attributes"), ensures=("fields", "classes"), analysis=True)
def tie_counts(program: Program) -> None:
    """Find the classes of groups that must lose the same share of indices, and leave the other groups alone.

    Raises :class:`GraphPruneError` when the model is no class of transformers, or is not what its config describes.
    """
    stock = Stock(program.model)
    program.fields = find_fields(stock, list(program.need("attributes")))
    _check_described(program, program.fields)
    program.classes, reasons = find_classes(program, program.fields)
    program.need("skipped").update(reasons)
    program.prunable = [group for group in program.need("prunable") if group.name not in reasons]
    program.unsaid = reasons


def _check_described(program: Program, fields: Fields) -> None:
    """The class must build the model as it is, before anything is removed."""
    built = {(row.name, row.place): size for row, size in fields.base.items() if row.kind in ("tensor", "computed")}
    held = {(name, dim): size for name, tensor in names(program.model).items() for dim, size in enumerate(tensor.shape)}
    kind = fields.stock.config_kind.__name__
    for place in {**built, **held}:
        if built.get(place) != held.get(place):
            name, dim = place
            raise GraphPruneError(
                f"{kind} describes another model than this one: {name}[{dim}] is {held.get(place, 'missing')}, and "
                f"{built.get(place, 'missing')} as its class builds it. A model that was pruned layer by layer, or "
                "changed by hand, cannot be deployed with deploy='transformers': start from the unpruned one."
            )
