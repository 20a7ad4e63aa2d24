"""Importance: each criterion is one small file over removal structures."""

from graphprune.passes.score import flap, magnitude, peak_to_peak, random, taylor, wanda_sp
from graphprune.passes.score.registry import (
    Criterion,
    Scores,
    add_positions,
    add_to,
    criterion,
    criterion_names,
    score_by,
    scores_of,
    slice_sums,
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
    "peak_to_peak",
    "random",
    "score_by",
    "scores_of",
    "slice_sums",
    "taylor",
    "wanda_sp",
]
