"""Methods: how a plan is made, as short tuples of passes under a name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphprune.errors import GraphPruneError
from graphprune.passes import cuts
from graphprune.passes.allocate_budget import allocate_budget
from graphprune.passes.base import Pass
from graphprune.passes.prune_in_order import prune_by_moments, prune_by_obs
from graphprune.passes.score import criterion_names, score_by
from graphprune.passes.select_structures import select_structures
from graphprune.passes.train_lhspg import Lhspg, train_lhspg
from graphprune.passes.train_loraprune import LoraPrune, train_loraprune

# What a call without method= does: it keeps a model alive without any data, for one forward over what it writes itself.
DEFAULT_METHOD = "ppm"

METHODS: dict[str, tuple[Pass, ...]] = {
    "magnitude": (score_by("l2"), allocate_budget("uniform"), select_structures),
    "llm-pruner": (score_by("taylor-first"), allocate_budget("sparing"), select_structures),
    "ppm": (
        allocate_budget("sparing", criterion="wanda-sp"),
        prune_by_moments(cuts.norm, otherwise="wanda-sp", times="peak-to-peak"),
    ),
    "wanda-sp": (
        allocate_budget("sparing", criterion="wanda-sp"),
        prune_by_moments(cuts.wanda, otherwise="wanda-sp"),
    ),
    "flap": (
        allocate_budget("sparing", criterion="flap-wifv"),
        prune_by_moments(cuts.weighted_variance, otherwise="flap-wifv", bias=True),
    ),
    "slimgpt": (allocate_budget("sparing", criterion="flap-wifn"), prune_by_obs()),
    "loraprune": (allocate_budget("sparing", criterion="wanda-sp"), train_loraprune()),
}
METHODS["lorashear"] = (*METHODS["ppm"], train_lhspg())

# The last pass of methods that train, from its settings.
_TRAINED_BY: dict[str, Callable[[Any], Pass]] = {"loraprune": train_loraprune, "lorashear": train_lhspg}


def trains(method: str) -> bool:
    """Whether a method trains adapters while it prunes."""
    return any(step.prepare is not None for step in passes_of(method))


def method_names() -> list[str]:
    """Every name that ``method=`` takes: those of methods and those of criteria."""
    return sorted({*METHODS, *criterion_names()})


def passes_of(method: str, training: Lhspg | LoraPrune | None = None) -> tuple[Pass, ...]:
    """The passes of a method; a criterion by itself is one, with every axis shrinking by the same share.

    ``training`` are settings of a method that trains: :class:`Lhspg` of ``lorashear``, :class:`LoraPrune` of
    ``loraprune``.

    Raises :class:`GraphPruneError` for an unknown name, and for settings of a method that does not train.
    """
    if training is not None:
        if method not in _TRAINED_BY:
            raise GraphPruneError(f"{method!r} does not train: settings are for {', '.join(_TRAINED_BY)}.")
        return (*METHODS[method][:-1], _TRAINED_BY[method](training))
    if method in METHODS:
        return METHODS[method]
    if method in criterion_names():
        return (score_by(method), allocate_budget("uniform"), select_structures)
    raise GraphPruneError(f"There is no method {method!r}. Methods: {', '.join(method_names())}.")
