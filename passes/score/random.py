"""Random: the baseline that every criterion has to beat."""

from __future__ import annotations

import torch

from graphprune.ir.axes import find
from graphprune.ir.program import Program
from graphprune.passes.score.registry import Scores, criterion


@criterion("random")
def random(program: Program) -> Scores:
    """Uniform numbers in [0, 1), seeded by ``seed``."""
    generator = torch.Generator().manual_seed(program.options.seed)
    ragged = program.ragged_axes()
    scores: Scores = {}
    for group in program.need("prunable"):
        axis = find(group.axis)
        rows = (ragged[axis].size,) if axis in ragged else ()
        scores[axis] = torch.rand(*rows, group.size, generator=generator)
    return scores
