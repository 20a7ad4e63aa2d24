"""Scores and counts → plan: the structures of the smallest score go."""

from __future__ import annotations

import numpy as np
import torch

from graphprune.ir import order
from graphprune.ir.plan import Plan, as_lists
from graphprune.ir.program import Program
from graphprune.passes.base import compiler_pass
from graphprune.passes.budget import ParameterCounter


@compiler_pass(requires=("scores", "counts"), ensures=("plan",), analysis=True)
def select_structures(program: Program) -> None:
    """Remove the ``counts`` structures of the smallest score of every group of ``program``.

    Ties keep the order of the model. Scores have shape ``(size,)``, those of a ragged axis ``(outer size, size)``.
    """
    counts, scores = program.need("counts"), program.need("scores")
    make_plan(program, {name: in_order(scores[name])[1][..., :count] for name, count in counts.items()})


def in_order(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores sorted, the first to go first: float64 of shape ``(size,)``, and the indices, int64.

    The k-th structure of a ragged axis, whose scores have shape ``(outer size, size)``, takes the k-th smallest of
    every row and scores what these score together; its indices have that shape too.
    """
    values, indices = order.in_order(scores)
    return values.sum(0) if values.ndim == 2 else values, indices


def make_plan(program: Program, removed: dict[str, torch.Tensor]) -> None:
    """Give the program the plan that removes these indices.

    ``removed`` has name of a group → int64 of shape ``(count,)`` or, for a ragged axis, ``(outer size, count)``, each
    index once. Groups that are not in it are kept whole.
    """
    options = program.options
    kept: dict[str, torch.Tensor] = {}
    sizes, under = {}, {}
    for group in program.need("prunable"):
        gone = removed.get(group.name)
        if gone is not None and gone.numel():
            kept[group.name] = _kept(gone, group.size)
            sizes[group.name] = group.size
            if gone.ndim == 2:
                under[group.name] = program.need("ragged")[group.name]
    skipped = dict(program.need("skipped"))
    counter = ParameterCounter(program)
    reached = 1 - counter.count({name: gone.shape[-1] for name, gone in removed.items()}) / counter.total
    plan = Plan(reached, skipped=skipped, method=options.method, width=options.width, experts=options.experts)
    plan.keep, plan.sizes, plan.under = as_lists(kept), sizes, under  # in order as made: not checked index by index
    program.follow(plan, kept)


def _kept(removed: torch.Tensor, size: int) -> torch.Tensor:
    """What is left of ``range(size)``; of several rows of removed indices, row by row."""
    if removed.ndim == 2:
        return torch.stack([_kept(row, size) for row in removed])
    kept = np.ones(size, dtype=bool)  # NumPy does this several times sooner than torch
    kept[removed.numpy()] = False
    return torch.from_numpy(kept.nonzero()[0])
