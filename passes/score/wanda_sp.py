"""Wanda-sp: weights by the activations they meet."""

from __future__ import annotations

import torch

from graphprune.data.calibration import calibration_batches
from graphprune.ir.axes import find, leaves
from graphprune.ir.program import Program
from graphprune.passes.build_node_groups import weight_contractions
from graphprune.passes.score.activations import InputNorms, run_calibration
from graphprune.passes.score.registry import Scores, add_positions, criterion
from graphprune.trace.skeleton import names


@criterion("wanda-sp")
def wanda_sp(program: Program) -> Scores:
    """``Σ_j mean_i |W_ij| · √(mean X_j²)`` over the consumer columns j of a structure.

    Structured form of Wanda (arXiv 2306.11695, Eq. 1) as FLAP (arXiv 2312.11983) compares against. Needs ``data=``.
    """
    axes = program.need("axes")
    wanted = {find(group.axis) for group in program.need("prunable")}
    tensors = names(program.model)
    consumers = {
        (name, dim)
        for _, name, dim in weight_contractions(program)
        if any(leaf in wanted for leaf in leaves(axes.tensors[name][dim]))
    }
    norms = InputNorms(tensors[name] for name, _ in consumers)
    run_calibration(program.model, calibration_batches(program), norms, program.need("trace").written)
    scores: Scores = {}
    for name, dim in sorted(consumers):
        weight, dims = tensors[name], axes.tensors[name]
        squares = norms.squares.get(id(weight))
        if squares is None:
            continue
        if squares.ndim == 1 and len(squares) != dims[dim].size:  # a grouped convolution: its channels are groups
            squares = squares.view(-1, dims[dim].size).sum(0)
        stay = {*range(squares.ndim - 1), dim}  # a batch of matrices has its own statistics in each
        others = [d for d in range(weight.ndim) if d not in stay]
        mean_weight = weight.detach().abs().mean(others, keepdim=True).float()
        importance = mean_weight * (squares / norms.counts[id(weight)]).sqrt().view(mean_weight.shape)
        add_positions(scores, program, dims, dim, lambda stay, x=importance: _summed(x, stay))  # type: ignore[misc]
    return scores


def _summed(x: torch.Tensor, stay: set[int]) -> torch.Tensor:
    others = [d for d in range(x.ndim) if d not in stay]
    return x.sum(others, keepdim=True) if others else x
