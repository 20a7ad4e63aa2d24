"""DoRA: let the magnitudes make up for the norms, so that an adapted weight stays what it was where it is kept.

DoRA (arXiv 2402.09353, Eq. 5) scales every row of ``W + ΔW`` by ``m / ‖row‖``. A row that loses columns has another
norm; with ``m`` times the new norm over the old one, what is left of the row is as it was in the merged weight.
"""

from __future__ import annotations

import torch

from graphprune.ir.program import Program
from graphprune.ir.selection import index_of
from graphprune.passes.base import compiler_pass
from graphprune.passes.rewrite import Keep, sliced
from graphprune.trace.adapters import dora_layers
from graphprune.trace.skeleton import names


@compiler_pass(requires=("plan", "axes", "groups"))
def keep_magnitudes(program: Program) -> None:
    """Give the magnitudes of every DoRA layer whose weight loses columns their new values."""
    layers = list(dora_layers(program.model))
    if not layers:
        return
    axes, selection, consumed = program.need("axes"), program.selection(), program.consumed()
    places = {id(tensor): axes.canonical[name] for name, tensor in names(program.model).items()}
    for layer in layers:
        name = places[id(layer.weight)]
        columns: Keep = {}
        for dim in range(layer.weight.ndim):
            index = index_of(axes.tensors[name], dim, selection) if (name, dim) in consumed else None
            if index is not None:
                columns[dim] = index
        if columns:
            with torch.no_grad():
                weight, delta, magnitude = program.weight(layer.weight), layer.delta(), layer.magnitude.detach()
                before = layer.norm(layer.weight, delta)
                after = layer.norm(sliced(weight, columns), sliced(delta, columns))
                program.updates[id(layer.magnitude)] = magnitude * (after / before).view_as(magnitude)
