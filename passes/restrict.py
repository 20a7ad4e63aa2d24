"""Statistics over what is kept, for the masked original.

With ``width`` a norm or a mean is to be that of the kept indices. The oracle therefore runs the true operator on the
kept slice of its operands. Which dimensions of an operand its statistic is taken over is told here once more, from the
operator's arguments alone: the axis rules do not decide it, so a wrong one shows. What is removed has the value that
the operator gives at full size, not zero, so that whoever still reads it is found too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphprune.errors import GraphPruneError
from graphprune.ir.program import Program
from graphprune.ir.selection import mask_of

Kept = dict[int, torch.Tensor]  # dimension of the first operand → its kept indices, int64, sorted
aten = torch.ops.aten


def kept_indices(program: Program) -> dict[fx.Node, Kept]:
    """What is kept of the first operand of every operator whose statistic follows its axis."""
    axes = program.need("axes")
    selection = program.selection()
    found: dict[fx.Node, Kept] = {}
    for node in axes.facts.statistics:
        dims = axes.values[node.args[0]]
        masks = {dim: mask_of(dims, dim, selection) for dim in range(len(dims))}
        kept = {dim: mask.flatten().nonzero().flatten() for dim, mask in masks.items() if mask is not None}
        if kept:
            found[node] = kept
    return found


def run_on_kept(operator: Any, kept: Kept, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``operator(*args, **kwargs)`` with its statistics taken over the kept indices of ``args[0]``."""
    restricted = RESTRICTED.get(operator.overloadpacket)
    if restricted is None:
        raise GraphPruneError(
            f"An axis rule says that {operator} takes a statistic, which the oracle does not know how to take over a "
            "part of its operand. Nothing was changed; please report it."
        )
    here = {dim: indices.to(args[0].device) for dim, indices in kept.items()}
    return restricted(operator, here, *args, **kwargs)


def _reduce(operator: Any, kept: Kept, x: torch.Tensor, *given: Any, **named: Any) -> Any:
    """A mean, variance or norm over ``dim``, over everything when there is none."""
    names = [argument.name for argument in operator._schema.arguments][1:]
    dims = {**dict(zip(names, given, strict=False)), **named}.get("dim")
    dims = [dims] if isinstance(dims, int) else dims or range(x.ndim)
    over = {dim % x.ndim for dim in dims}
    return operator(_select(x, {dim: i for dim, i in kept.items() if dim in over}), *given, **named)


def _normalise_last(operator: Any, kept: Kept, x: torch.Tensor, shape: list[int], *given: Any, **named: Any) -> Any:
    """``layer_norm`` and ``rms_norm``: statistics over the last ``len(shape)`` dimensions, which the weights have."""
    first = x.ndim - len(shape)
    kept = {dim: i for dim, i in kept.items() if dim >= first}
    of_weights = {dim - first: i for dim, i in kept.items()}
    small = _select(x, kept)
    weights = [_select(one, of_weights) if isinstance(one, torch.Tensor) else one for one in given]
    normalised = operator(small, list(small.shape[first:]), *weights, **named)
    return _paste(operator(x, shape, *given, **named), normalised, list(kept.items()))


def _normalise_groups(operator: Any, kept: Kept, x: torch.Tensor, groups: int, *given: Any, **named: Any) -> Any:
    """``group_norm``: statistics over the channels of a group; a group of which nothing is kept is gone."""
    full = operator(x, groups, *given, **named)
    if 1 not in kept:
        return full
    left = len((kept[1] // (x.shape[1] // groups)).unique())
    weights = [one[kept[1]] if isinstance(one, torch.Tensor) else one for one in given]
    return full.index_copy(1, kept[1], operator(x.index_select(1, kept[1]), left, *weights, **named))


RESTRICTED: dict[Any, Callable[..., Any]] = {
    aten.layer_norm: _normalise_last,
    aten.rms_norm: _normalise_last,
    aten.group_norm: _normalise_groups,
    **dict.fromkeys(
        (aten.mean, aten.nanmean, aten.std, aten.var, aten.std_mean, aten.var_mean, aten.norm, aten.linalg_vector_norm),
        _reduce,
    ),
}


def _select(x: torch.Tensor, kept: Kept) -> torch.Tensor:
    for dim, indices in kept.items():
        x = x.index_select(dim, indices)
    return x


def _paste(full: torch.Tensor, small: torch.Tensor, kept: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """``full`` with ``small`` in the places where every dimension of ``kept`` is kept."""
    if not kept:
        return small
    (dim, indices), *rest = kept
    return full.index_copy(dim, indices, _paste(full.index_select(dim, indices), small, rest))
