"""Scores → one order over all removal structures: what goes first, over the whole model."""

from __future__ import annotations

import numpy as np
import torch

from graphprune.errors import GraphPruneError
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
    names, keys, indices, choices = [], [], [], {}
    for name, values in program.need("scores").items():
        if values.ndim == 2:
            choices[name], values = _from_each_row(values)
        found = values.double().sort(stable=True)
        names.append(name)
        keys.append(RANKINGS[ranking](found.values))
        indices.append(found.indices)
    nothing = torch.zeros(0)
    # Sorted runs behind each other: NumPy's stable sort only merges them.
    first_to_go = torch.from_numpy(np.argsort(torch.cat(keys or [nothing]).numpy(), kind="stable"))
    group = torch.cat([torch.full((len(one),), i) for i, one in enumerate(indices)] or [nothing.long()])
    program.order = Order(names, group[first_to_go], torch.cat(indices or [nothing.long()])[first_to_go], choices)


def _from_each_row(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A ragged axis: its k-th structure takes the k-th smallest of every row, and scores what these score together."""
    in_order, choices = values.sort(dim=1, stable=True)
    return choices, in_order.sum(0)
