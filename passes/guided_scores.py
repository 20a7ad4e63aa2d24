"""Scores of removal structures from the gradients of adapters alone: LoRAPrune's criterion (arXiv 2305.18403)."""

from __future__ import annotations

import torch

from graphprune.passes.adapted import Adapted


def guided_scores(adapted: Adapted) -> dict[str, torch.Tensor]:
    """Name of a group → ``Σ (Ĝ ⊙ (W + s·BA))²`` over what each structure owns of its adapted layers (Eq. 4, 10).

    ``Ĝ`` is the gradient that the adapters have now (:meth:`LowRank.guided_gradient`). The sums of every part are
    divided by their norm before they are added, so that no layer speaks louder than another. One merged weight is there
    at a time. Groups without a part that has gradients are absent. float32 of shape ``(size,)``.
    """
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for layer, parts in adapted.parts_by_layer():
            gradient = layer.guided_gradient()
            if gradient is None:
                continue
            values = layer.update().add_(layer.weight()).mul_(gradient).square_()
            for name, part in parts:
                sums = part.sums(values)
                sums = sums / sums.norm().clamp(min=torch.finfo(sums.dtype).tiny)
                found[name] = found[name] + sums if name in found else sums
    return found
