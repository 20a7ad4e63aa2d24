"""Statistics of what the consumer matrices of a model see while calibration data runs through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from graphprune.data.texts import Say, silent
from graphprune.errors import GraphPruneError
from graphprune.ir.axes import find, leaves
from graphprune.ir.program import Program
from graphprune.passes.build_node_groups import weight_contractions
from graphprune.passes.consumers import Consumers, Product, channels_seen_by
from graphprune.passes.score.registry import ScoredWeights, Scores, add_positions, factors_of
from graphprune.trace.placement import placed
from graphprune.trace.quiet import REFUSALS, without_hooks
from graphprune.trace.skeleton import names, scratch_copy


@dataclass
class Moments:
    """Sums over everything that a weight has seen, per input channel.

    ``total`` and ``squares`` are float64 of shape ``(matrices, channels)``: one row, or one for every expert of a
    batched weight. ``count`` is the number of vectors (tokens, positions, groups of a convolution) per row.
    """

    total: torch.Tensor
    squares: torch.Tensor
    count: int

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count

    @property
    def mean_square(self) -> torch.Tensor:
        return self.squares / self.count

    @property
    def variance(self) -> torch.Tensor:
        """Of the population; never negative."""
        return (self.mean_square - self.mean.square()).clamp(min=0)


class InputMoments(Consumers):
    """Collects the :class:`Moments` of what chosen weights see: ``found[id(weight)]``."""

    def __init__(self, weights: Iterable[torch.Tensor]):
        super().__init__(weights, self._add)
        self.found: dict[int, Moments] = {}

    def _add(self, weight: torch.Tensor, product: Product, args: tuple, kwargs: dict[str, Any]) -> None:
        seen = channels_seen_by(product, args, kwargs)
        dtype = torch.promote_types(seen.dtype, torch.float32)
        squares = torch.linalg.vector_norm(seen, dim=-2, dtype=dtype).double().square()
        total = seen.sum(-2, dtype=dtype).double()
        before = self.found.get(id(weight))
        if before is None:
            self.found[id(weight)] = Moments(total, squares, seen.shape[-2])
        else:
            before.total += total
            before.squares += squares
            before.count += seen.shape[-2]


def run_calibration(
    model: nn.Module,
    batches: list[dict[str, Any]],
    mode: TorchFunctionMode,
    written: Iterable[str],
    device: torch.device,
    say: Say = silent,
) -> None:
    """Run batches under ``mode`` through a copy of the model that shares its weights; the model stays as it is.

    ``written`` names the tensors that forward writes to; operators run on ``device``; ``say`` is told how far it is.
    """
    scratch = scratch_copy(model, written)
    try:
        with torch.no_grad(), without_hooks(scratch), placed(scratch, device), mode:
            for number, batch in enumerate(batches, 1):
                scratch(**batch)
                say(f"calibration: {number} of {len(batches)} batches")
    except REFUSALS as error:
        raise GraphPruneError(f"Calibration failed while data ran through the model: {error}") from error


def consumers_of(program: Program) -> list[tuple[str, int]]:
    """Every weight and dimension of it in which a prunable axis is consumed, by name; adapters speak through theirs."""
    axes = program.need("axes")
    wanted = {find(group.axis) for group in program.need("prunable")}
    factors = factors_of(program)
    found = {(name, dim) for _, name, dim in weight_contractions(program) if name not in factors}
    return sorted((name, dim) for name, dim in found if wanted & set(leaves(axes.tensors[name][dim])))


def input_moments(program: Program, batches: list[dict[str, Any]]) -> dict[str, Moments]:
    """The moments of what every consumer of a prunable axis sees, by the name of the weight; unseen ones are absent."""
    tensors = names(program.model)
    consumers = {name for name, _ in consumers_of(program)}
    mode = InputMoments(tensors[name] for name in consumers)
    run_calibration(program.model, batches, mode, program.need("trace").written, program.device, program.say)
    return {name: mode.found[id(tensors[name])] for name in sorted(consumers) if id(tensors[name]) in mode.found}


Reduction = Callable[[torch.Tensor, list[int]], torch.Tensor]


def add_channels(
    scores: Scores, program: Program, name: str, dim: int, of_weight: Reduction, of_inputs: torch.Tensor
) -> None:
    """Add ``of_weight · of_inputs``, channel by channel, to the scores of the axes below dimension ``dim`` of a weight.

    ``of_weight`` reduces the weight over the given dimensions, which it keeps with size 1; ``of_inputs`` has the shape
    ``(matrices, channels)`` of :class:`Moments`.
    """
    weight, dims = ScoredWeights(program)[name], program.need("axes").tensors[name]
    batch = range(weight.ndim - 2) if len(of_inputs) > 1 else ()
    stay = {*batch, dim}
    reduced = of_weight(weight, [d for d in range(weight.ndim) if d not in stay])
    importance = reduced * of_inputs.to(reduced.device).view(reduced.shape)
    add_positions(scores, program, dims, dim, lambda kept: summed(importance, kept))


def summed(x: torch.Tensor, stay: set[int]) -> torch.Tensor:
    """``x`` summed over all dimensions but those that ``stay``; the others have size 1 then."""
    others = [d for d in range(x.ndim) if d not in stay]
    return x.sum(others, keepdim=True) if others else x
