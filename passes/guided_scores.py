"""Scores of removal structures from the gradients of adapters alone: LoRAPrune's criterion (arXiv 2305.18403)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from graphprune.passes.adapted import Adapted, Part
from graphprune.trace.adapters import LowRank

Scores = dict[str, torch.Tensor]  # name of a group → float32 of shape (size,)
Gradient = Callable[[LowRank], "torch.Tensor | None"]


def guided_scores(adapted: Adapted, gradient: Gradient = LowRank.guided_gradient) -> Scores:
    """``Σ (Ĝ ⊙ (W + s·BA))²`` over what each structure owns of its adapted layers (Eq. 4, 10).

    ``Ĝ`` is the ``gradient`` of the merged weight, shape ``(out, in)``: by default what the adapters have now says of
    it (:meth:`LowRank.guided_gradient`). The sums of every part are divided by their norm before they are added, so
    that no layer speaks louder than another. Groups without a part that has gradients are absent.
    """
    found: Scores = {}
    with torch.no_grad():
        for values, parts in weighted_gradients(adapted, gradient):
            values.square_()
            for name, part in parts:
                sums = part.sums(values)
                add(found, name, sums / sums.norm().clamp(min=torch.finfo(sums.dtype).tiny))
    return found


def weighted_gradients(
    adapted: Adapted, gradient: Gradient = LowRank.guided_gradient
) -> Iterator[tuple[torch.Tensor, list[tuple[str, Part]]]]:
    """``Ĝ ⊙ (W + s·BA)`` of every adapted layer that has gradients, to be overwritten, with its parts, in turn."""
    for layer, parts in adapted.parts_by_layer():
        found = gradient(layer)
        if found is not None:
            yield layer.update().add_(layer.weight()).mul_(found), parts


def add(into: Scores, name: str, values: torch.Tensor) -> None:
    """Add to what is there of a group, if anything is."""
    into[name] = into[name] + values if name in into else values


def average(into: Scores, name: str, values: torch.Tensor, decay: float) -> None:
    """The moving average ``λ·old + (1 − λ)·values`` of a group, in place (LoRAPrune, Eq. 11)."""
    held = into.get(name)
    into[name] = values if held is None else held.mul_(decay).add_(values, alpha=1 - decay)
