"""Scores: one number per removal structure, the smaller the sooner it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from graphprune.errors import GraphPruneError
from graphprune.ir.axes import Axis, find, leaves, reduce_to_leaves
from graphprune.ir.program import NodeGroup, Program
from graphprune.ir.selection import sum_by_pair
from graphprune.passes.base import Pass
from graphprune.rules.registry import Dims
from graphprune.trace.adapters import low_rank_layers
from graphprune.trace.skeleton import names

# Leaf axis → score of each of its indices, float32 of shape (size,); of a ragged axis (outer size, size).
Scores = dict[Axis, torch.Tensor]
Criterion = Callable[[Program], Scores]

_CRITERIA: dict[str, Criterion] = {}


def criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Register a function ``Program → {leaf axis: scores}`` under a name, which ``method=`` takes too.

    Scores are float32 of shape ``(size,)``, or ``(outer size, size)`` for a ragged axis; the smallest go first. An axis
    without an entry is left alone. An earlier function of that ``name`` is replaced.
    """

    def register(function: Criterion) -> Criterion:
        _CRITERIA[name] = function
        return function

    return register


def criterion_names() -> list[str]:
    """Every name that :func:`score_by` takes."""
    return sorted(_CRITERIA)


def scored_dims(program: Program) -> dict[str, list[int]]:
    """Every parameter that prunable structures own a part of, by canonical name → the dimensions that they lie on.

    The factors of adapters are not among them: they speak through the weights that they are added to
    (:class:`ScoredWeights`).
    """
    axes = program.need("axes")
    wanted = {find(group.axis) for group in program.need("prunable")}
    factors = factors_of(program)
    found: dict[str, list[int]] = {}
    for name in sorted({axes.canonical[name] for name, _ in program.model.named_parameters()} - factors):
        dims = [dim for dim, axis in enumerate(axes.tensors[name]) if any(leaf in wanted for leaf in leaves(axis))]
        if dims:
            found[name] = dims
    return found


def factors_of(program: Program) -> set[str]:
    """The names of the low-rank factors that are added to weights."""
    return {name for composed in program.need("composed") for pair in composed.factors for name in pair}


class ScoredWeights:
    """The values that weights are scored by: canonical name → ``W``, or ``W + s·BA`` where an adapter is active."""

    def __init__(self, program: Program):
        self._program, self._tensors = program, names(program.model)
        self._adapters = {id(layer.base.weight): layer for layer in low_rank_layers(program.model)}

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        weight, layer = self._program.weight(tensor), self._adapters.get(id(tensor))
        if layer is None:
            return weight
        update = layer.update()
        return weight + (update.T if layer.across else update)

    def in_blocks(self, name: str) -> torch.Tensor:
        """The same for :func:`graphprune.trace.stored.blocks`: a weight that is on disk stays there."""
        tensor = self._tensors[name]
        return self[name] if self._program.stored(tensor) is None else self._program.current(tensor)


def add_to(scores: Scores, axis: Axis, values: torch.Tensor) -> None:
    """Add a vector over a dimension to the scores of every leaf below it: what its indices own, summed.

    ``values`` has shape ``(axis.size,)``, any dtype and device; scores are float32 on the CPU. An axis that is only
    ever scored so keeps one choice of indices for all, also where it could be ragged.
    """
    for leaf, share in reduce_to_leaves(axis, values.float().cpu()):
        scores[leaf] = scores[leaf] + share if leaf in scores else share


def add_positions(
    scores: Scores, program: Program, dims: Dims, dim: int, sums: Callable[[set[int]], torch.Tensor]
) -> None:
    """:func:`add_to` for dimension ``dim`` of a tensor, with a score per outer index for the ragged leaves below it.

    ``sums`` is that of :func:`slice_sums`.
    """
    for leaf, share in slice_sums(program, dims, dim, sums).items():
        scores[leaf] = scores[leaf] + share if leaf in scores else share


def slice_sums(program: Program, dims: Dims, dim: int, sums: Callable[[set[int]], torch.Tensor]) -> Scores:
    """What the slices of dimension ``dim`` of a tensor sum up to, for every leaf below it; float32 on the CPU.

    ``sums(dimensions)`` gives the values of all positions along some dimensions, summed over all others, which stay
    with size 1. A leaf that occurs twice below the dimension has one slice there.
    """
    ragged = program.ragged_axes()
    found: Scores = {}
    shares = reduce_to_leaves(dims[dim], sums({dim}).flatten().float().cpu())
    for leaf, share in shares:
        if leaf not in ragged:
            found[leaf] = found[leaf] + share if leaf in found else share
    for leaf in {leaf for leaf, _ in shares} & ragged.keys():
        above = next(d for d in (dim, *range(len(dims))) if ragged[leaf] in leaves(dims[d]))
        found[leaf] = sum_by_pair(dims, dim, leaf, ragged[leaf], sums({dim, above}).float().cpu())
    return found


def scores_of(program: Program, name: str, groups: Iterable[NodeGroup]) -> dict[str, torch.Tensor]:
    """Name of a group → its scores by the criterion ``name``; groups that it gives none are absent.

    Raises :class:`GraphPruneError` when a score is not finite.
    """
    found = _CRITERIA[name](program)
    scores = {group.name: found[find(group.axis)] for group in groups if find(group.axis) in found}
    for group, values in scores.items():
        if not bool(torch.isfinite(values).all()):
            raise GraphPruneError(
                f"The {name} score of {group} is not finite: the weights, or the activations they see, "
                "hold NaN or infinite values, or overflow. Nothing was changed."
            )
    return scores


def score_by(name: str, times: str | None = None) -> Pass:
    """A pass that runs the criterion ``name``; groups it gives no score are left alone, with that reason.

    ``times`` is another criterion that its scores are multiplied by, where that has some. Running it raises
    :class:`GraphPruneError` when a score is not finite.
    """

    def run(program: Program) -> None:
        program.scores = scores_of(program, name, program.need("prunable"))
        if times is not None:
            for group, scores in scores_of(program, times, program.need("prunable")).items():
                program.scores[group] = program.scores[group] * scores
        for group in list(program.need("prunable")):
            if group.name not in program.scores:
                program.need("prunable").remove(group)
                program.need("skipped")[group.name] = f"the criterion {name} has no score for it"

    return Pass("score", run, requires=("prunable",), ensures=("scores",))
