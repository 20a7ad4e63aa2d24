"""How a consumer matrix loses columns, decided by what it has seen.

A cut is made of matrices of shape ``(count, out, columns)``, float32 or float64, is shown what they see, and then
chooses and removes columns. ``weight`` is what is left, with zeros where columns are gone, and ``offset`` what is to be
added to what the first matrix makes, of shape ``(out,)``, or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch

from graphprune.errors import GraphPruneError
from graphprune.passes.obs import Surgeon, choose, dynamic_groups, fixed_groups


class Cut(Protocol):
    weight: torch.Tensor
    offset: torch.Tensor | None

    def see(self, seen: torch.Tensor) -> None:
        """``seen`` has shape ``(count, rows, columns)``, in the dtype of the matrices."""

    def choose(
        self, blocks: torch.Tensor, count: int, times: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Remove ``count`` of ``blocks``, int64 of shape ``(blocks, columns in each)``.

        Returns their numbers, int64, and the importance of all before anything was removed, of shape ``(blocks,)``; it
        is multiplied by ``times``, of the same shape.
        """

    def remove(self, columns: torch.Tensor) -> None:
        """Remove ``columns``, int64."""


MakeCut = Callable[[torch.Tensor], Cut]


class ObsCut:
    """SlimGPT: the cheapest columns go, and the others adapt (:mod:`graphprune.passes.obs`)."""

    def __init__(self, weight: torch.Tensor, damping: float, longest: float, group: int | None, grouped_cholesky: bool):
        self.weight = weight
        self.offset = None
        self._damping, self._longest, self._group, self._anew = damping, longest, group, grouped_cholesky
        self._hessian = weight.new_zeros(len(weight), *[weight.shape[-1]] * 2)
        self._surgeon: Surgeon | None = None

    def see(self, seen: torch.Tensor) -> None:
        if self._longest < math.inf and seen.numel():
            lengths = torch.linalg.vector_norm(seen, dim=-1, keepdim=True)
            most = self._longest * lengths.median(dim=1, keepdim=True).values
            # Where most of what it sees is zero, as in a sparse mixture, there is no length to compare with.
            seen = torch.where((lengths > most) & (most > 0), seen * (most / lengths), seen)
        self._hessian.baddbmm_(seen.mT, seen)

    def choose(
        self, blocks: torch.Tensor, count: int, times: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if blocks.shape[1] > 1:
            groups = [1] * count
        else:
            groups = dynamic_groups(count) if self._group is None else fixed_groups(count, self._group)
        return choose(self._ready(), blocks, groups, times, anew=self._anew)

    def remove(self, columns: torch.Tensor) -> None:
        self._ready().remove(columns)

    def _ready(self) -> Surgeon:
        if self._surgeon is None:
            self._surgeon = Surgeon(self.weight, self._hessian, self._damping)
            del self._hessian
        return self._surgeon


# (matrices, means, mean squares of the columns) → importance of every column, all ``(count, columns)`` but the first.
Importance = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class MomentCut:
    """Columns of the least importance go, and what they add on average goes into the offset."""

    def __init__(self, weight: torch.Tensor, importance: Importance):
        self.weight = weight
        self.offset: torch.Tensor | None = weight.new_zeros(weight.shape[1]) if len(weight) == 1 else None
        self._importance = importance
        self._count = 0
        self._total, self._squares = (weight[:, 0].double() * 0 for _ in range(2))

    def see(self, seen: torch.Tensor) -> None:
        self._count += seen.shape[1]
        self._total += seen.sum(1, dtype=seen.dtype)
        self._squares += torch.linalg.vector_norm(seen, dim=1).double().square()

    def choose(
        self, blocks: torch.Tensor, count: int, times: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not bool(torch.isfinite(self._squares).all()):
            raise GraphPruneError("the activations hold NaN or infinite values, or overflow")
        squares = self._squares / self._count if self._count else torch.ones_like(self._squares)
        importance = self._importance(self.weight, self._mean(), squares.to(self.weight.dtype)).sum(0)
        of_blocks = importance[blocks].sum(1) * (1 if times is None else times)
        gone = of_blocks.topk(count, largest=False).indices
        self.remove(blocks[gone].flatten())
        return gone, of_blocks

    def remove(self, columns: torch.Tensor) -> None:
        if self.offset is not None:
            self.offset += self.weight[0][:, columns] @ self._mean()[0, columns]
        self.weight[:, :, columns] = 0

    def _mean(self) -> torch.Tensor:
        return (self._total / max(1, self._count)).to(self.weight.dtype)


def norm(weight: torch.Tensor, mean: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """``√(mean X_j²)``: what a column sees, whatever it makes of it."""
    return square.sqrt()


def wanda(weight: torch.Tensor, mean: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """``mean_i |W_ij| · √(mean X_j²)``: Wanda-sp."""
    return weight.abs().mean(1) * square.sqrt()


def weighted_variance(weight: torch.Tensor, mean: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """``Var(X_j) · ‖W_:j‖²``: FLAP's WIFV."""
    return (square - mean.square()).clamp(min=0) * weight.square().sum(1)


def weighted_norm(weight: torch.Tensor, mean: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """``mean X_j² · ‖W_:j‖²``: FLAP's WIFN."""
    return square * weight.square().sum(1)
