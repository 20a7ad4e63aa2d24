"""Magnitude: how large the weights of a structure are."""

from __future__ import annotations

import torch

from graphprune.ir.program import Program
from graphprune.passes.score.registry import ScoredWeights, Scores, add_positions, criterion, scored_dims
from graphprune.trace.stored import blocks


def _sums(program: Program, order: int) -> Scores:
    """``Σ |w|^order`` over every weight of every slice that a structure owns."""
    weights = ScoredWeights(program)
    scores: Scores = {}
    for name, found in scored_dims(program).items():
        weight, dims = weights.in_blocks(name), program.need("axes").tensors[name]
        for dim in found:
            add_positions(scores, program, dims, dim, lambda stay, w=weight: _power_sums(w, stay, order))  # type: ignore[misc]
    return scores


def _power_sums(weight: torch.Tensor, stay: set[int], order: int) -> torch.Tensor:
    """``Σ |w|^order`` over all dimensions but those that ``stay``, at least in float32; the others have size 1 then.

    A block at a time: that stays in the cache, and the weight may be on disk.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    others = [d for d in range(weight.ndim) if d not in stay]
    device = "cpu" if weight.is_meta else weight.device
    total = torch.zeros([size if d in stay else 1 for d, size in enumerate(weight.shape)], dtype=dtype, device=device)
    for place, block in blocks(weight):
        powers = block.to(dtype).square() if order == 2 else block.to(dtype).abs()
        where = tuple(part if d in stay else slice(None) for d, part in enumerate(place))
        total[where] += powers.sum(others, keepdim=True) if others else powers
    return total


@criterion("l2")
def l2(program: Program) -> Scores:
    """``‖W_g‖₂``: the Euclidean norm over all weights of a structure."""
    return {axis: squares.sqrt() for axis, squares in _sums(program, 2).items()}


@criterion("l1")
def l1(program: Program) -> Scores:
    """``‖W_g‖₁``: the sum of absolute values over all weights of a structure."""
    return _sums(program, 1)
