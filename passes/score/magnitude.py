"""Magnitude: how large the weights of a structure are."""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphprune.ir.axes import find, leaves
from graphprune.ir.program import Program
from graphprune.passes.score.registry import Scores, add_to, criterion
from graphprune.trace.skeleton import names


def _sum_over_slices(program: Program, element: Callable[[torch.Tensor], torch.Tensor]) -> Scores:
    """Σ element(w) over every weight of every slice that a structure owns."""
    axes = program.need("axes")
    wanted = {find(group.axis) for group in program.need("prunable")}
    tensors = names(program.model)
    parameters = {name for name, _ in program.model.named_parameters()}
    scores: Scores = {}
    for name, dims in axes.tensors.items():
        if name not in parameters:
            continue
        places = [dim for dim, axis in enumerate(dims) if any(leaf in wanted for leaf in leaves(axis))]
        if not places:
            continue
        values = element(tensors[name].detach())
        for dim in places:
            others = [d for d in range(values.ndim) if d != dim]
            total = values.sum(others, dtype=torch.float32) if others else values.float()
            add_to(scores, dims[dim], total)
    return scores


@criterion("magnitude")
@criterion("l2")
def l2(program: Program) -> Scores:
    """``‖W_g‖₂``: the Euclidean norm over all weights of a structure."""
    squares = _sum_over_slices(program, lambda w: w.float().square_() if w.dtype != torch.float32 else w.square())
    return {axis: values.sqrt() for axis, values in squares.items()}


@criterion("l1")
def l1(program: Program) -> Scores:
    """``‖W_g‖₁``: the sum of absolute values over all weights of a structure."""
    return _sum_over_slices(program, torch.abs)
