"""Optimal Brain Surgeon on the columns of consumer matrices: what a removal costs, and how the rest makes up for it.

For a matrix W that sees the vectors X, with H = 2XXᵀ, removing the columns S and letting all others adapt costs
``½ tr(W_S [(H⁻¹)_SS]⁻¹ W_Sᵀ)`` and the rest changes by ``−W_S [(H⁻¹)_SS]⁻¹ (H⁻¹)_S:`` (SlimGPT, arXiv 2412.18110, Eq. 3
and 4, for one column and for a block of them). The factor ½ is left out: costs are only compared.
"""

from __future__ import annotations

import torch

from graphprune.errors import GraphPruneError

_MOST_DAMPING = 100.0


class Surgeon:
    """Matrices that share their columns' fate, such as one expert each, and the inverse of their Hessians.

    ``weight`` is float32 or float64 of shape ``(count, out, columns)`` and changes as columns are removed; removed ones
    are zero. ``hessian`` is ``(count, columns, columns)``, of any scale; of a matrix that saw nothing it is zero, and
    taken for the identity, so that columns go by their size.
    """

    def __init__(self, weight: torch.Tensor, hessian: torch.Tensor, damping: float):
        """``damping`` times the mean of the diagonal is added to it, ten times as much until that can be inverted.

        Raises :class:`GraphPruneError` when the Hessian is not finite, or nothing helps.
        """
        self.weight = weight
        self.inverse = torch.stack([_inverse(one, damping) for one in hessian])

    def costs(self, blocks: torch.Tensor, within: bool = True) -> torch.Tensor:
        """What removing each of ``blocks``, int64 of shape ``(blocks, width)``, would cost: shape ``(blocks,)``.

        All at once, by the Cholesky factors of the diagonal blocks of H⁻¹ (the paper's grouped Cholesky). Not
        ``within`` a block, columns are taken for independent: ``Σ_p ‖W_p‖² / [H⁻¹]_pp``.
        """
        total = torch.zeros(len(blocks), dtype=self.weight.dtype, device=self.weight.device)
        for weight, inverse in zip(self.weight, self.inverse, strict=True):
            if blocks.shape[1] == 1 or not within:
                of_columns = weight.square().sum(0) / inverse.diagonal().clamp(min=torch.finfo(inverse.dtype).tiny)
                total += of_columns[blocks].sum(1)
            else:
                factor = torch.linalg.cholesky(inverse[blocks[:, :, None], blocks[:, None, :]])
                total += torch.linalg.solve_triangular(factor, weight.T[blocks], upper=False).square().sum((1, 2))
        return total

    def remove(self, columns: torch.Tensor) -> None:
        """Remove ``columns``, int64; all others adapt."""
        for weight, inverse in zip(self.weight, self.inverse, strict=True):
            rows = inverse[columns]
            share = torch.cholesky_solve(rows, torch.linalg.cholesky(rows[:, columns]))
            weight -= weight[:, columns] @ share
            inverse -= rows.T @ share
            weight[:, columns] = 0
            inverse[columns], inverse[:, columns] = 0, 0
            inverse[columns, columns] = 1  # removed for good: what is left stays positive definite


def _inverse(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise GraphPruneError("the activations hold NaN or infinite values, or overflow")
    mean = diagonal.mean()
    if mean == 0:
        return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    while damping <= _MOST_DAMPING:
        damped = hessian + torch.diag_embed(torch.full_like(diagonal, float(damping * mean)))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return torch.cholesky_inverse(factor)
        damping *= 10
    raise GraphPruneError("its Hessian cannot be inverted, however much it is damped")


def dynamic_groups(count: int, largest: int = 1024, smallest: int = 8) -> list[int]:
    """How many columns go at a time: half of those left to go, as a power of two, from ``largest`` to ``smallest``."""
    groups = []
    while count:
        size = smallest
        while size * 2 <= min(largest, count // 2):
            size *= 2
        groups.append(min(size, count))
        count -= groups[-1]
    return groups


def fixed_groups(count: int, size: int) -> list[int]:
    """``size`` columns at a time."""
    return [min(size, count - gone) for gone in range(0, count, size)]


def choose(
    surgeon: Surgeon, blocks: torch.Tensor, groups: list[int], times: torch.Tensor | None = None, *, anew: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove the cheapest blocks, ``groups`` at a time, costs computed again in between.

    Returns their numbers, int64, and what each of all would have cost at first, of shape ``(blocks,)``. Costs are
    multiplied by ``times``, of the same shape. Not ``anew``, all are chosen by their first costs, with columns taken
    for independent.
    """
    left = torch.arange(len(blocks), device=blocks.device)
    times = surgeon.weight.new_ones(len(blocks)) if times is None else times
    if not anew:
        costs = times * surgeon.costs(blocks, within=False)
        gone = costs.topk(sum(groups), largest=False).indices
        surgeon.remove(blocks[gone].flatten())
        return gone, costs
    first = costs = times * surgeon.costs(blocks)
    taken: list[torch.Tensor] = []
    for size in groups:
        if taken:
            costs = times[left] * surgeon.costs(blocks[left])
        cheapest = costs.topk(size, largest=False).indices
        taken.append(left[cheapest])
        surgeon.remove(blocks[taken[-1]].flatten())
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[cheapest] = False
        left = left[stays]
    return torch.cat(taken), first
