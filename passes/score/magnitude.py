"""Magnitude: how large the weights of a structure are."""

from __future__ import annotations

import torch

from graphprune.ir.program import Program
from graphprune.passes.score.registry import ScoredWeights, Scores, add_positions, criterion, scored_dims

_ROWS = 128


def _sums(program: Program, order: int) -> Scores:
    """``Σ |w|^order`` over every weight of every slice that a structure owns."""
    weights = ScoredWeights(program)
    scores: Scores = {}
    for name, found in scored_dims(program).items():
        weight, dims = weights[name], program.need("axes").tensors[name]
        for dim in found:
            add_positions(scores, program, dims, dim, lambda stay, w=weight: _power_sums(w, stay, order))  # type: ignore[misc]
    return scores


def _power_sums(weight: torch.Tensor, stay: set[int], order: int) -> torch.Tensor:
    """``Σ |w|^order`` over all dimensions but those that ``stay``, at least in float32; the others have size 1 then."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    others = [d for d in range(weight.ndim) if d not in stay]
    if not others:
        return weight.to(dtype).abs() ** order
    if 0 in stay:
        return torch.linalg.vector_norm(weight, order, others, keepdim=True, dtype=dtype) ** order
    # A norm down the columns is slow; a few rows at a time stay in the cache.
    shape = [size if d in stay else 1 for d, size in enumerate(weight.shape)]
    total = torch.zeros(shape, dtype=dtype, device=weight.device)
    for rows in weight.split(_ROWS):
        rows = rows.to(dtype)
        total += (rows.square() if order == 2 else rows.abs()).sum(others, keepdim=True)
    return total


@criterion("l2")
def l2(program: Program) -> Scores:
    """``‖W_g‖₂``: the Euclidean norm over all weights of a structure."""
    return {axis: squares.sqrt() for axis, squares in _sums(program, 2).items()}


@criterion("l1")
def l1(program: Program) -> Scores:
    """``‖W_g‖₁``: the sum of absolute values over all weights of a structure."""
    return _sums(program, 1)
