"""Adapters into weights: what is left is a plain model, and what was said of the adapted one is said of it."""

from __future__ import annotations

import dataclasses

from graphprune.errors import GraphPruneError
from graphprune.ir.program import Program
from graphprune.passes.base import compiler_pass
from graphprune.trace.adapters import has_adapters, plain_name
from graphprune.trace.provenance import Attribute


@compiler_pass(requires=("pruned", "new_attributes"), ensures=("pruned",))
def merge_adapters(program: Program) -> None:
    """Merge the active adapters of the pruned model into its weights and take all of them out."""
    model = program.pruned
    if not has_adapters(model):
        return
    if not hasattr(model, "merge_and_unload"):
        raise GraphPruneError(
            f"The adapters of {type(model).__name__} were not added by peft.get_peft_model, which could merge them: "
            "use merge=False."
        )

    def plain(attribute: Attribute) -> Attribute:
        path, *configs = attribute.owner.split("@")
        return dataclasses.replace(attribute, owner="@".join([plain_name(model, path), *configs]))

    program.new_attributes = {plain(key): value for key, value in program.need("new_attributes").items()}
    program.new_biases = {plain_name(model, path): bias for path, bias in program.new_biases.items()}
    program.pruned = model.merge_and_unload()
