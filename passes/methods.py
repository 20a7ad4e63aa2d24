"""Methods: how a plan is made, as short tuples of passes under a name."""

from __future__ import annotations

from graphprune.errors import GraphPruneError
from graphprune.passes.allocate_budget import allocate_budget
from graphprune.passes.base import Pass
from graphprune.passes.score import criterion_names, score_by
from graphprune.passes.select_structures import select_structures

METHODS: dict[str, tuple[Pass, ...]] = {
    "magnitude": (score_by("l2"), allocate_budget("uniform"), select_structures),
    "llm-pruner": (score_by("taylor-first"), allocate_budget("uniform"), select_structures),
    "wanda-sp": (score_by("wanda-sp"), allocate_budget("uniform"), select_structures),
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
