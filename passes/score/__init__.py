"""Importance: each criterion is one small file over removal structures."""

from graphprune.passes.score import magnitude, random, wanda_sp
from graphprune.passes.score.registry import Criterion, Scores, add_positions, add_to, criterion, method_names, score

__all__ = [
    "Criterion",
    "Scores",
    "add_positions",
    "add_to",
    "criterion",
    "magnitude",
    "method_names",
    "random",
    "score",
    "wanda_sp",
]
