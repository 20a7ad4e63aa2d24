"""Peak to peak: how far the weights of a structure reach."""

from __future__ import annotations

import torch

from graphprune.ir.program import Program
from graphprune.passes.score.registry import ScoredWeights, Scores, add_to, criterion, scored_dims


@criterion("peak-to-peak")
def peak_to_peak(program: Program) -> Scores:
    """``Σ (max w − min w)`` over the slices of a structure, each as a share of the largest such in its weight.

    A structure has one slice per dimension of a matrix that it owns; vectors such as biases are left out. For gated
    FFNs this is PPM (Martra, arXiv 2512.22671).
    """
    axes, weights = program.need("axes"), ScoredWeights(program)
    scores: Scores = {}
    for name, dims in scored_dims(program).items():
        weight = weights[name]
        for dim in dims if weight.ndim > 1 else ():
            reach = _reach(weight, dim)
            add_to(scores, axes.tensors[name][dim], reach / reach.max().clamp(min=torch.finfo(reach.dtype).tiny))
    return scores


def _reach(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Largest less smallest weight at every position of a dimension, float32."""
    others = [d for d in range(weight.ndim) if d != dim]
    return (weight.amax(others) - weight.amin(others)).float()
