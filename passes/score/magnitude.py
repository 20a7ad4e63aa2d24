"""Magnitude: how large the weights of a structure are."""

from __future__ import annotations

import torch

from graphprune.ir.axes import find, leaves
from graphprune.ir.program import Program
from graphprune.passes.score.registry import Scores, add_to, criterion
from graphprune.trace.skeleton import names


def _norms(program: Program, order: int) -> Scores:
    """``Σ |w|^order`` over every weight of every slice that a structure owns."""
    axes = program.need("axes")
    wanted = {find(group.axis) for group in program.need("prunable")}
    tensors = names(program.model)
    scores: Scores = {}
    for name in sorted({axes.canonical[name] for name, _ in program.model.named_parameters()}):
        weight = tensors[name].detach()
        for dim, axis in enumerate(axes.tensors[name]):
            if any(leaf in wanted for leaf in leaves(axis)):
                others = [d for d in range(weight.ndim) if d != dim]
                # A norm is one pass over the weight without a copy of it, at least in float32.
                dtype = torch.promote_types(weight.dtype, torch.float32)
                norm = torch.linalg.vector_norm(weight, order, others, dtype=dtype) if others else weight.abs()
                add_to(scores, axis, norm.float() ** order)
    return scores


@criterion("magnitude")
@criterion("l2")
def l2(program: Program) -> Scores:
    """``‖W_g‖₂``: the Euclidean norm over all weights of a structure."""
    return {axis: squares.sqrt() for axis, squares in _norms(program, 2).items()}


@criterion("l1")
def l1(program: Program) -> Scores:
    """``‖W_g‖₁``: the sum of absolute values over all weights of a structure."""
    return _norms(program, 1)
