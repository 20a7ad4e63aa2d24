"""Methods: how a plan is made, as short tuples of passes under a name."""

from __future__ import annotations

from graphprune.errors import GraphPruneError
from graphprune.passes.allocate_budget import allocate_budget
from graphprune.passes.base import Pass
from graphprune.passes.compensate_bias import compensate_bias
from graphprune.passes.prune_by_obs import keep_consumed, prune_by_obs
from graphprune.passes.score import criterion_names, score_by
from graphprune.passes.select_structures import select_structures

METHODS: dict[str, tuple[Pass, ...]] = {
    "flap": (score_by("flap-wifv"), allocate_budget("sparing"), select_structures, compensate_bias),
    "magnitude": (score_by("l2"), allocate_budget("uniform"), select_structures),
    "slimgpt": (keep_consumed, allocate_budget("sparing"), prune_by_obs()),
    "wanda-sp": (score_by("wanda-sp"), allocate_budget("sparing"), select_structures),
}


def method_names() -> list[str]:
    """Every name that ``method=`` takes: those of methods and those of criteria."""
    return sorted({*METHODS, *criterion_names()})


def passes_of(method: str) -> tuple[Pass, ...]:
    """The passes of a method; a criterion by itself is one, with every axis shrinking by the same share.

    Raises :class:`GraphPruneError` for an unknown name.
    """
    if method in METHODS:
        return METHODS[method]
    if method in criterion_names():
        return (score_by(method), allocate_budget("uniform"), select_structures)
    raise GraphPruneError(f"There is no method {method!r}. Methods: {', '.join(method_names())}.")
