"""Taylor scores: how much the loss would change, to first or second order, if a structure were zero.

LLM-Pruner (arXiv 2305.11627), Eq. 3 to 5, with the diagonal of the Hessian taken as the Fisher information: ``w`` a
weight, ``g`` its gradient of the mean loss over the calibration data, ``h`` the mean over samples of its squared
gradient. A *slice* is what a structure owns in one dimension of one parameter; ``aggregation=`` says how the scores of
the slices of a structure become one. All of these need ``data=``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphprune.errors import GraphPruneError
from graphprune.ir.axes import Axis
from graphprune.ir.program import Program
from graphprune.passes.score.gradients import each_gradient
from graphprune.passes.score.registry import ScoredWeights, Scores, criterion, scored_dims, slice_sums
from graphprune.trace.skeleton import names

# Weight, gradient, squared gradients → importance of every weight, in the dtype of the gradient.
Importance = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
Slices = list[tuple[int, torch.Tensor]]  # place of the operator that uses the slice, scores


@criterion("taylor-vector")
def vector(program: Program) -> Scores:
    """``|Σ w·g|`` per slice: the structure as a whole, to first order (Eq. 3)."""
    return _taylor(program, lambda w, g, h: g.mul_(w), signed=True)


@criterion("taylor-first")
def first(program: Program) -> Scores:
    """``Σ |w·g|`` per slice: weight by weight, to first order (Eq. 4)."""
    return _taylor(program, lambda w, g, h: g.mul_(w).abs_())


@criterion("taylor-second")
def second(program: Program) -> Scores:
    """``Σ |w²·h|`` per slice: weight by weight, the second-order term alone."""
    return _taylor(program, lambda w, g, h: _given(h).mul_(w).mul_(w), squares=True)


@criterion("taylor-mixed")
def mixed(program: Program) -> Scores:
    """``Σ |w·g − ½·w²·h|`` per slice: weight by weight, to second order (Eq. 5)."""
    return _taylor(program, lambda w, g, h: g.sub_(_given(h).mul_(w), alpha=0.5).mul_(w).abs_(), squares=True)


def _given(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor


def _taylor(program: Program, importance: Importance, *, signed: bool = False, squares: bool = False) -> Scores:
    axes = program.need("axes")
    tensors, places = names(program.model), _places(program)
    dims_of = {name: dims for name, dims in scored_dims(program).items() if tensors[name].is_floating_point()}
    scored = ScoredWeights(program)
    slices: dict[Axis, Slices] = {}

    def use(name: str, gradient: torch.Tensor, squared: torch.Tensor | None) -> None:
        values = importance(scored[name], gradient, squared)
        for dim in dims_of[name]:
            for leaf, sums in slice_sums(program, axes.tensors[name], dim, lambda stay: _summed(values, stay)).items():
                if not bool(sums.isfinite().all()):
                    raise GraphPruneError(
                        f"The gradient of {name} is not finite: it overflows, or the data lead through an operator "
                        "whose gradient does not exist there. Nothing was changed."
                    )
                slices.setdefault(leaf, []).append((places.get(name, -1), sums.abs() if signed else sums))

    each_gradient(program, dims_of, use, squares)
    combine = AGGREGATIONS[program.options.aggregation]
    return {leaf: combine(found) for leaf, found in slices.items()}


def _summed(values: torch.Tensor, stay: set[int]) -> torch.Tensor:
    others = [d for d in range(values.ndim) if d not in stay]
    return values.sum(others, keepdim=True) if others else values


def _places(program: Program) -> dict[str, int]:
    """Canonical name of a parameter → place in the graph of the last operator that uses it."""
    trace, axes = program.need("trace"), program.need("axes")
    order = {node: place for place, node in enumerate(trace.graph.nodes)}
    places: dict[str, int] = {}
    for node in trace.graph.nodes:
        if node.name in trace.tensor_names and node.users:
            name = axes.canonical[trace.tensor_names[node.name]]
            places[name] = max(places.get(name, -1), *(order[user] for user in node.users))
    return places


def _sum(slices: Slices) -> torch.Tensor:
    return torch.stack([scores for _, scores in slices]).sum(0)


def _prod(slices: Slices) -> torch.Tensor:
    """The product as the geometric mean: it orders the structures of an axis alike, and does not underflow."""
    return torch.stack([scores for _, scores in slices]).double().log().mean(0).exp().float()


def _max(slices: Slices) -> torch.Tensor:
    return torch.stack([scores for _, scores in slices]).amax(0)


def _last(slices: Slices) -> torch.Tensor:
    """The slices of the operator that runs last: erasing it erases what the structure computes."""
    last = max(place for place, _ in slices)
    return _sum([(place, scores) for place, scores in slices if place == last])


AGGREGATIONS: dict[str, Callable[[Slices], torch.Tensor]] = {"sum": _sum, "prod": _prod, "max": _max, "last": _last}
