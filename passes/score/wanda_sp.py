"""Wanda-sp: weights by the activations they meet."""

from __future__ import annotations

import torch

from graphprune.data.calibration import calibration_batches
from graphprune.ir.program import Program
from graphprune.passes.score.activations import add_channels, consumers_of, input_moments
from graphprune.passes.score.registry import Scores, criterion


@criterion("wanda-sp")
def wanda_sp(program: Program) -> Scores:
    """``Σ_j mean_i |W_ij| · √(mean X_j²)`` over the consumer columns j of a structure.

    Structured form of Wanda (arXiv 2306.11695, Eq. 1) as FLAP (arXiv 2312.11983) compares against.
    """
    moments = input_moments(program, calibration_batches(program))
    scores: Scores = {}
    for name, dim in consumers_of(program):
        if name in moments:
            add_channels(scores, program, name, dim, _mean_size, moments[name].mean_square.sqrt())
    return scores


def _mean_size(weight: torch.Tensor, over: list[int]) -> torch.Tensor:
    return weight.abs().mean(over, keepdim=True).float()
