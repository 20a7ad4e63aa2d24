"""FLAP: how much what a structure adds fluctuates (arXiv 2312.11983)."""

from __future__ import annotations

import torch

from graphprune.data.calibration import calibration_batches
from graphprune.ir.program import Program
from graphprune.passes.score.activations import add_channels, consumers_of, input_moments
from graphprune.passes.score.registry import Scores, criterion


@criterion("flap-wifv")
def weighted_variance(program: Program) -> Scores:
    """``Σ_j Var(X_j) · ‖W_:j‖²`` over the consumer columns j of a structure (WIFV).

    What does not fluctuate goes cheaply, since a bias can stand in for it.
    """
    moments = input_moments(program, calibration_batches(program))
    return _weighted(program, {name: one.variance for name, one in moments.items()})


@criterion("flap-wifn")
def weighted_norm(program: Program) -> Scores:
    """``Σ_j mean X_j² · ‖W_:j‖²`` over the consumer columns j of a structure (WIFN)."""
    moments = input_moments(program, calibration_batches(program))
    return _weighted(program, {name: one.mean_square for name, one in moments.items()})


def _weighted(program: Program, of_inputs: dict[str, torch.Tensor]) -> Scores:
    scores: Scores = {}
    for name, dim in consumers_of(program):
        if name in of_inputs:
            add_channels(scores, program, name, dim, _squares, of_inputs[name])
    return scores


def _squares(weight: torch.Tensor, over: list[int]) -> torch.Tensor:
    return torch.linalg.vector_norm(weight, 2, over, keepdim=True, dtype=torch.float32).square()
