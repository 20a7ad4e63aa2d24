"""Peak to peak: how far the weights of a structure reach."""

from __future__ import annotations

import torch

from graphprune.ir.axes import find, leaves
from graphprune.ir.program import Program
from graphprune.passes.score.registry import Scores, add_to, criterion
from graphprune.trace.skeleton import names


@criterion("peak-to-peak")
def peak_to_peak(program: Program) -> Scores:
    """``Σ (max w − min w)`` over the slices of a structure, each as a share of the largest such in its weight.

    A structure has one slice per dimension of a matrix that it owns; vectors such as biases are left out. For gated
    FFNs this is PPM (Martra, arXiv 2512.22671).
    """
    axes, tensors = program.need("axes"), names(program.model)
    wanted = {find(group.axis) for group in program.need("prunable")}
    scores: Scores = {}
    for name in sorted({axes.canonical[name] for name, _ in program.model.named_parameters()}):
        for dim, axis in enumerate(axes.tensors[name]):
            if len(axes.tensors[name]) > 1 and any(leaf in wanted for leaf in leaves(axis)):
                reach = _reach(tensors[name].detach(), dim)
                add_to(scores, axis, reach / reach.max().clamp(min=torch.finfo(reach.dtype).tiny))
    return scores


def _reach(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Largest less smallest weight at every position of a dimension, float32."""
    others = [d for d in range(weight.ndim) if d != dim]
    return (weight.amax(others) - weight.amin(others)).float()
