"""How many structures of every axis go: an allocation orders the structures of all axes, the budget says how far.

An allocation is a function ``Program → keys``: for every group the key of the first of its structures to go, of the
second, and so on, never falling (:data:`graphprune.passes.budget.Keys`). The smallest keys of all groups go, until
``ratio`` of all parameters is gone. Which structures of a group these are is decided afterwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch

from graphprune.errors import GraphPruneError
from graphprune.ir.program import NodeGroup, Program
from graphprune.passes.base import Pass
from graphprune.passes.budget import Keys, fill_budget
from graphprune.passes.score import score_by
from graphprune.passes.select_structures import in_order

Allocation = Callable[[Program], Keys]

_ALLOCATIONS: dict[str, Allocation] = {}
_COMPARING = {"global", "standardised"}  # allocations that compare scores
_BLOCK = re.compile(r"(.*?)(?:^|\.)(\d+)(?=\.|$)")  # up to the first number of the path is a block


def allocation(name: str) -> Callable[[Allocation], Allocation]:
    """Register a function ``Program → keys`` under a ``name`` for ``allocation=``.

    Keys are name of a group → float64 of shape ``(how many may go,)``, never falling: the key of the first of its
    structures to go, of the second, and so on. The smallest of all groups go first.
    """

    def register(function: Allocation) -> Allocation:
        _ALLOCATIONS[name] = function
        return function

    return register


def allocation_names() -> list[str]:
    """Every name that ``allocation=`` takes."""
    return sorted(_ALLOCATIONS)


def allocate_budget(default: str, criterion: str | None = None) -> Pass:
    """A pass that decides how many structures of each group go, by ``allocation=`` or else by ``default``.

    An allocation that compares scores takes those of ``criterion`` where no pass before made any. ``program.counts`` is
    then name of a group → number of structures, so that ``ratio`` of all parameters goes, to within one structure.

    Running it raises :class:`GraphPruneError` for an unknown allocation, patterns that match nothing, and a ratio that
    cannot be reached.
    """

    def run(program: Program) -> None:
        wanted = program.options.allocation
        chosen = default if wanted is None else wanted
        if isinstance(chosen, str):
            if chosen not in _ALLOCATIONS:
                raise GraphPruneError(
                    f"There is no allocation {chosen!r}. Allocations: {', '.join(allocation_names())}; or a dict from "
                    "patterns of module paths to ratios."
                )
            if chosen in _COMPARING and program.scores is None and criterion is not None:
                score_by(criterion)(program)
            keys = _ALLOCATIONS[chosen](program)
        else:
            keys = explicit(program, chosen)
        program.counts = fill_budget(program, keys)

    return Pass("allocate_budget", run, requires=("prunable",), ensures=("counts",))


@allocation("uniform")
def uniform(program: Program) -> Keys:
    """Every axis shrinks by the same share."""
    return {group.name: _in_shares(group, 1.0) for group in candidates(program)}


@allocation("log-increasing")
def log_increasing(program: Program) -> Keys:
    """SlimGPT's incremental ratio: ``r_i ∝ r_0 + (r_{n-1} - r_0)·log(i+1)/log(n)`` for block i of n (Eq. 6)."""
    return _by_depth(program, lambda i, n: math.log(i + 1) / math.log(n))


@allocation("log-decreasing")
def log_decreasing(program: Program) -> Keys:
    """:func:`log_increasing` from the other end: what SlimGPT's ablation compares with."""
    return _by_depth(program, lambda i, n: math.log(n - i) / math.log(n))


@allocation("global")
def over_mean(program: Program) -> Keys:
    """Scores over the mean score of their axis, compared over all axes."""
    return {name: _over_mean(scores) for name, scores in _sorted_scores(program, "global").items()}


@allocation("standardised")
def standardised(program: Program) -> Keys:
    """Scores less the mean of their axis, over its standard deviation, compared over all axes (FLAP, Eq. 5)."""
    found = _sorted_scores(program, "standardised")
    return {name: (scores - scores.mean()) / scores.std().clamp(min=1e-12) for name, scores in found.items()}


@allocation("sparing")
def sparing(program: Program) -> Keys:
    """:func:`uniform`, but what is delicate keeps everything until the rest has lost half.

    Delicate are the first tenth and the last sixteenth of every sequence of blocks, and axes of fewer than 8
    structures, which can only lose much at once: the heads of a small model. LLM-Pruner (arXiv 2305.11627) spares the
    first 3 to 4 and the last 1 to 2 of 32 blocks. Where all blocks must shrink alike, none are spared.
    """
    places = _places(program) if program.classes is None else {}
    keys: Keys = {}
    for group in candidates(program):
        ends = [
            place < round(count / 10) or place >= count - round(count / 16)
            for place, count in places.get(group.name, [])
        ]
        late = 0.5 if any(ends) or group.size < 8 else 0.0
        keys[group.name] = _in_shares(group, 1.0) + late
    return keys


def explicit(program: Program, ratios: Mapping[str, float]) -> Keys:
    """Axes shrink in proportion to the ratio of the first pattern that one of their modules matches.

    The ratios are relative to one another: all are scaled so that ``ratio`` of all parameters goes. An axis that no
    pattern matches, or whose ratio is 0, is left alone.
    """
    if not isinstance(ratios, Mapping) or not all(isinstance(r, (int, float)) and 0 <= r <= 1 for r in ratios.values()):
        raise GraphPruneError("allocation= takes a name, or a dict from patterns of module paths to ratios in [0, 1].")
    unused = set(ratios)
    keys: Keys = {}
    for group in candidates(program):
        found = [p for p in ratios if any(fnmatchcase(m, p) or fnmatchcase(m, f"{p}.*") for m in group.modules)]
        unused -= set(found)
        if found and ratios[found[0]] > 0:
            keys[group.name] = _in_shares(group, ratios[found[0]])
        else:
            program.need("skipped")[group.name] = "its allocation is 0"
    if unused:
        raise GraphPruneError(
            f"The pattern {min(unused)!r} of allocation= matches no axis that may be pruned. Patterns are "
            "shell-like and match module paths, such as 'model.layers.3.mlp' or '*.self_attn'."
        )
    _check_alike(program, keys)
    return keys


def _check_alike(program: Program, keys: Keys) -> None:
    """Groups of one class shrink in lockstep: no allocation of a user's may want something else."""
    for one in program.classes or ():
        first, *others = one
        for name in others:
            if _share(keys, first) != _share(keys, name):
                raise GraphPruneError(
                    f"allocation= gives {first} and {name} other ratios, but with deploy='transformers' one field of "
                    "the config says both sizes: give them one ratio, such as {'*.mlp': 0.3}, or leave out deploy=."
                )


def _share(keys: Keys, name: str) -> float:
    """The share that :func:`_in_shares` made the keys of a group from; 0 where there are none."""
    return round(0.5 / (float(keys[name][0]) * len(keys[name])), 9) if name in keys else 0.0


def candidates(program: Program) -> list[NodeGroup]:
    """The groups to choose from: those that have scores, if there are any scores."""
    scores = program.scores
    return [group for group in program.need("prunable") if scores is None or group.name in scores]


def _in_shares(group: NodeGroup, share: float) -> torch.Tensor:
    """Keys by which axes shrink in proportion to their ``share``."""
    return (torch.arange(group.size, dtype=torch.float64) + 0.5) / (group.size * share)


FIRST = 0.3  # r_0 over r_{n-1}: SlimGPT leaves it open


def _by_depth(program: Program, shape: Callable[[int, int], float]) -> Keys:
    """Shares that go from ``FIRST`` to 1 with the number of a block; axes outside of blocks shrink as the last."""
    places = _places(program)
    keys: Keys = {}
    for group in candidates(program):
        depths = [shape(place, count) for place, count in places[group.name] if count > 1]
        keys[group.name] = _in_shares(group, FIRST + (1 - FIRST) * min(depths, default=1.0))
    return keys


def _places(program: Program) -> dict[str, list[tuple[int, int]]]:
    """Name of a group → (number of its block, number of blocks in that sequence), for each of its modules in one."""
    numbers: dict[str, set[int]] = {}
    found = {group.name: [m for m in map(_BLOCK.match, group.modules) if m] for group in program.need("groups")}
    for one in (one for many in found.values() for one in many):
        numbers.setdefault(one[1], set()).add(int(one[2]))
    order = {path: {number: i for i, number in enumerate(sorted(held))} for path, held in numbers.items()}
    return {name: [(order[m[1]][int(m[2])], len(order[m[1]])) for m in many] for name, many in found.items()}


def _sorted_scores(program: Program, name: str) -> Keys:
    if program.scores is None:
        raise GraphPruneError(
            f"allocation={name!r} compares scores, and the method {program.options.method!r} has none before it "
            f"prunes. Others: {', '.join(allocation_names())}."
        )
    return {group: in_order(values)[0] for group, values in program.scores.items()}


def _over_mean(scores: torch.Tensor) -> torch.Tensor:
    mean = scores.mean()
    return scores / mean if mean > 0 else torch.zeros_like(scores)
