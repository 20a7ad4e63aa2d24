"""How the scores of what was removed lie beside those of what was kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from graphprune.ir.program import Program

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


@dataclass(frozen=True)
class ScoreSpread:
    """Scores of one node group at the ``QUANTILES``: of the structures that were kept, and of those removed.

    Either is empty where there is none.
    """

    kept: tuple[float, ...]
    removed: tuple[float, ...]


def score_spreads(program: Program) -> dict[str, ScoreSpread]:
    """Name of a group → the spread of its scores, in the order of the model; only of groups that have finite scores.

    Of methods that choose again and again, such as SlimGPT, they are the first. Those of a plan that was kept are as
    they were then.
    """
    if program.spreads is not None:
        return program.spreads
    plan, found = program.need("plan"), {}
    for name, scores in ((program.scores or {}) | program.chosen_by).items():
        values = np.atleast_2d(scores.detach().double().cpu().numpy())
        stays = np.ones(values.shape, dtype=bool)
        if name in plan.keep:
            stays[:] = False
            np.put_along_axis(stays, np.atleast_2d(np.asarray(plan.keep[name])), True, axis=1)
        if np.isfinite(values).all():
            found[name] = ScoreSpread(_quantiles(values[stays]), _quantiles(values[~stays]))
    return found


def _quantiles(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in np.quantile(values, QUANTILES)) if values.size else ()
