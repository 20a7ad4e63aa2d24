"""Wanda-sp: weights by the activations they meet."""

from __future__ import annotations

from graphprune.calibration import calibration_batches
from graphprune.ir.axes import find, leaves
from graphprune.ir.program import Program
from graphprune.passes.build_node_groups import weight_contractions
from graphprune.passes.score.activations import InputNorms, run_calibration
from graphprune.passes.score.registry import Scores, add_to, criterion
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
        weight, features = tensors[name], axes.tensors[name][dim]
        squares = norms.squares.get(id(weight))
        if squares is None:
            continue
        if squares.numel() != features.size:  # a grouped convolution: its channels are groups of columns
            squares = squares.view(-1, features.size).sum(0)
        others = [d for d in range(weight.ndim) if d != dim]
        mean_weight = weight.detach().abs().mean(others).float()
        add_to(scores, features, mean_weight * (squares / norms.counts[id(weight)]).sqrt())
    return scores
