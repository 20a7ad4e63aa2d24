"""Statistics of what the consumer matrices of a model see while calibration data runs through it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from graphprune.errors import GraphPruneError
from graphprune.trace.quiet import without_hooks
from graphprune.trace.skeleton import scratch_copy

# Which argument is the activation, which of its dimensions is contracted, and which argument is the weight.
_CONSUMERS: dict[Any, tuple[int, int, int]] = {
    torch.nn.functional.linear: (0, -1, 1),
    torch.addmm: (1, -1, 2),
    torch.mm: (0, -1, 1),
    torch.matmul: (0, -1, 1),
    torch.Tensor.matmul: (0, -1, 1),
    torch.Tensor.__matmul__: (0, -1, 1),
    torch.bmm: (0, -1, 1),
    torch.Tensor.bmm: (0, -1, 1),
    torch.baddbmm: (1, -1, 2),
    torch.nn.functional.conv1d: (0, 1, 1),
    torch.nn.functional.conv2d: (0, 1, 1),
    torch.nn.functional.conv3d: (0, 1, 1),
}

# Those whose weight may be a batch of matrices.
_BATCHED = {
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.bmm,
    torch.Tensor.bmm,
    torch.baddbmm,
}


class InputNorms(TorchFunctionMode):
    """Sums the squares of each input feature of chosen weights.

    ``squares[id(weight)]`` is float32 of shape ``(in_features,)``, for a batch of matrices ``(*batch, in_features)``;
    ``counts`` the number of rows (tokens, positions) of each.
    """

    def __init__(self, weights: Iterable[torch.Tensor]):
        super().__init__()
        self._wanted = {id(weight) for weight in weights}
        self.squares: dict[int, torch.Tensor] = {}
        self.counts: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        place = _CONSUMERS.get(func)
        if place is not None and len(args) > place[2] and id(args[place[2]]) in self._wanted:
            batch = args[place[2]].shape[:-2] if func in _BATCHED else ()
            self._see(id(args[place[2]]), args[place[0]].detach(), place[1], batch)
        return func(*args, **(kwargs or {}))

    def _see(self, weight: int, x: torch.Tensor, dim: int, batch: tuple[int, ...]) -> None:
        if batch:  # (..., *batch, rows, features) → (*batch, ..., rows, features)
            x = x.expand(*torch.broadcast_shapes(x.shape[:-2], batch), *x.shape[-2:])
            more = x.ndim - 2 - len(batch)
            x = x.movedim(tuple(range(more)), tuple(range(-2 - more, -2)))
        rows = x.movedim(dim, -1).flatten(len(batch), -2)
        squares = torch.linalg.vector_norm(rows, dim=-2, dtype=torch.promote_types(rows.dtype, torch.float32)).square()
        squares = squares.sum_to_size((*batch, rows.shape[-1]))  # one matrix may see the rows of many
        self.squares[weight] = self.squares[weight] + squares if weight in self.squares else squares
        self.counts[weight] = self.counts.get(weight, 0) + rows.numel() // squares.numel()


def run_calibration(
    model: nn.Module, batches: list[dict[str, Any]], mode: TorchFunctionMode, written: Iterable[str]
) -> None:
    """Run batches under ``mode`` through a copy of the model that shares its weights; the model stays as it is.

    ``written`` names the tensors that forward writes to.
    """
    scratch = scratch_copy(model, written)
    try:
        with torch.no_grad(), without_hooks(scratch), mode:
            for batch in batches:
                scratch(**batch)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise GraphPruneError(f"Calibration failed while data ran through the model: {error}") from error
