"""Scores → one order over all removal structures: what goes first, over the whole model."""

from __future__ import annotations

import torch

from graphprune.errors import GraphPruneError
from graphprune.ir.program import Order, Program
from graphprune.passes.base import compiler_pass


def _rank_within(values: torch.Tensor) -> torch.Tensor:
    """Per layer: the share of the axis that scores lower. Every axis then shrinks by the same share."""
    rank = torch.empty_like(values)
    rank[values.argsort(stable=True)] = torch.arange(len(values), dtype=values.dtype) + 0.5
    return rank / len(values)


def _relative_to_mean(values: torch.Tensor) -> torch.Tensor:
    """Global: the score over the mean score of its axis, so that axes of different kinds can be compared."""
    mean = values.mean()
    return values / mean if mean > 0 else torch.zeros_like(values)


RANKINGS = {"per-layer": _rank_within, "global": _relative_to_mean}


@compiler_pass(requires=("scores",), ensures=("order",))
def allocate_budget(program: Program) -> None:
    """Order all structures by ``ranking``; ties keep the order of the model."""
    ranking = program.options.ranking
    if ranking not in RANKINGS:
        raise GraphPruneError(f"There is no ranking {ranking!r}. Rankings: {', '.join(sorted(RANKINGS))}.")
    scores, choices = {}, {}
    for name, values in program.need("scores").items():
        if values.ndim == 2:
            choices[name], values = _from_each_row(values)
        scores[name] = values
    names = list(scores)
    keys = torch.cat([RANKINGS[ranking](scores[name].double()) for name in names] or [torch.zeros(0)])
    group = torch.cat([torch.full((len(scores[name]),), i) for i, name in enumerate(names)] or [torch.zeros(0).long()])
    index = torch.cat([torch.arange(len(scores[name])) for name in names] or [torch.zeros(0).long()])
    first_to_go = keys.argsort(stable=True)
    program.order = Order(names, group[first_to_go], index[first_to_go], choices)


def _from_each_row(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A ragged axis: its k-th structure takes the k-th smallest of every row, and scores what these score together."""
    in_order, choices = values.sort(dim=1, stable=True)
    return choices, in_order.sum(0)
