"""Magnitude: how large the weights of a structure are."""

from __future__ import annotations

import torch

from graphprune.ir.axes import find, leaves
from graphprune.ir.program import Program
from graphprune.passes.score.registry import Scores, add_to, criterion
from graphprune.trace.skeleton import names

_ROWS = 128


def _sums(program: Program, order: int) -> Scores:
    """``Σ |w|^order`` over every weight of every slice that a structure owns."""
    axes = program.need("axes")
    wanted = {find(group.axis) for group in program.need("prunable")}
    tensors = names(program.model)
    scores: Scores = {}
    for name in sorted({axes.canonical[name] for name, _ in program.model.named_parameters()}):
        for dim, axis in enumerate(axes.tensors[name]):
            if any(leaf in wanted for leaf in leaves(axis)):
                add_to(scores, axis, _power_sums(tensors[name].detach(), dim, order))
    return scores


def _power_sums(weight: torch.Tensor, dim: int, order: int) -> torch.Tensor:
    """``Σ |w|^order`` over all dimensions but ``dim``, at least in float32."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    others = [d for d in range(weight.ndim) if d != dim]
    if dim == 0:
        norms = torch.linalg.vector_norm(weight, order, others, dtype=dtype) if others else weight.to(dtype).abs()
        return norms**order
    # A norm down the columns is slow; a few rows at a time stay in the cache.
    total = torch.zeros(weight.shape[dim], dtype=dtype, device=weight.device)
    for rows in weight.split(_ROWS):
        rows = rows.to(dtype)
        total += (rows.square() if order == 2 else rows.abs()).sum(others)
    return total


@criterion("magnitude")
@criterion("l2")
def l2(program: Program) -> Scores:
    """``‖W_g‖₂``: the Euclidean norm over all weights of a structure."""
    return {axis: squares.sqrt() for axis, squares in _sums(program, 2).items()}


@criterion("l1")
def l1(program: Program) -> Scores:
    """``‖W_g‖₁``: the sum of absolute values over all weights of a structure."""
    return _sums(program, 1)
