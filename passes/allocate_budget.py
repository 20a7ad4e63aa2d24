"""Scores → one order over all removal structures: what goes first, over the whole model."""

from __future__ import annotations

import torch

from graphprune.errors import GraphPruneError
from graphprune.ir.order import in_order
from graphprune.ir.program import Order, Program
from graphprune.passes.base import compiler_pass


def _rank_within(values: torch.Tensor) -> torch.Tensor:
    """Per layer: the share of the axis that scores lower. Every axis then shrinks by the same share."""
    return (torch.arange(len(values), dtype=values.dtype) + 0.5) / len(values)


def _relative_to_mean(values: torch.Tensor) -> torch.Tensor:
    """Global: the score over the mean score of its axis, so that axes of different kinds can be compared."""
    mean = values.mean()
    return values / mean if mean > 0 else torch.zeros_like(values)


# Scores of one axis, sorted, float64 → keys that can be compared over axes, sorted too.
RANKINGS = {"per-layer": _rank_within, "global": _relative_to_mean}


@compiler_pass(requires=("scores",), ensures=("order",))
def allocate_budget(program: Program) -> None:
    """Order all structures by ``ranking``; ties keep the order of the model."""
    ranking = program.options.ranking
    if ranking not in RANKINGS:
        raise GraphPruneError(f"There is no ranking {ranking!r}. Rankings: {', '.join(sorted(RANKINGS))}.")
    order = Order({}, {})
    for name, scores in program.need("scores").items():
        values, order.indices[name] = in_order(scores)
        # The k-th structure of a ragged axis takes the k-th smallest of every row, and scores what they score together.
        order.keys[name] = RANKINGS[ranking](values.sum(0) if values.ndim == 2 else values)
    program.order = order
