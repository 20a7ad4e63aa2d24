"""Importance: each criterion is one small file over removal structures."""

from graphprune.passes.score import flap, magnitude, random, wanda_sp
from graphprune.passes.score.registry import (
    Criterion,
    Scores,
    add_positions,
    add_to,
    criterion,
    criterion_names,
    score_by,
    scores_of,
)

__all__ = [
    "Criterion",
    "Scores",
    "add_positions",
    "add_to",
    "criterion",
    "criterion_names",
    "flap",
    "magnitude",
    "random",
    "score_by",
    "scores_of",
    "wanda_sp",
]
