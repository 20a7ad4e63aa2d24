"""Passes that train adapters: a model without any gets some, and what has faded when training is over is removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.ir.axes import find
from graphprune.ir.program import Program
from graphprune.passes.adapted import Adapted
from graphprune.passes.base import Pass
from graphprune.passes.select_structures import make_plan
from graphprune.trace.adapters import has_adapters
from graphprune.trace.quantised import floating_structure, has_quantised


@dataclass(frozen=True)
class Adapters:
    """LoRA as it is added to a model: rank, alpha (the update is scaled by alpha / rank) and dropout."""

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0


Train = Callable[[Program, Adapted, dict[str, int]], None]


def training_pass(name: str, train: Train, adapters: Adapters) -> Pass:
    """A pass that trains ``program``'s adapters by ``train(program, adapted, counts)``, which closes gates to 0.

    ``counts`` are those of the groups that gates can close; what was to go of another stays.
    """

    def run(program: Program) -> None:
        program.updates.clear()  # an earlier plan's way to make up for what goes; here the adapters do
        program.new_biases.clear()
        adapted = Adapted(program)
        counts = {name: count for name, count in program.need("counts").items() if count}
        if program.ragged_axes().keys() & {find(g.axis) for g in program.need("prunable") if g.name in counts}:
            raise GraphPruneError(
                "With inner_axes=True other indices go under each index of another axis, which cannot fade: leave that "
                "out, or use a method that does not train."
            )
        for group in counts.keys() - adapted.gates.keys():
            raise GraphPruneError(
                f"{group} cannot fade: not only linear and convolutional layers read it. Exclude it "
                f"(exclude=), or use a method that does not train."
            )
        train(program, adapted, counts)
        gone = {group: (adapted.gates[group] == 0).nonzero()[:, 0].cpu() for group in counts}
        adapted.hand_over()
        make_plan(program, gone)

    return Pass(name, run, requires=("counts",), ensures=("plan",), prepare=lambda model: add_adapters(model, adapters))


def check_adapted(adapted: Adapted, counts: dict[str, int]) -> None:
    """Raise :class:`GraphPruneError` for a group that loses structures and owns no part of an adapted layer."""
    for group in counts.keys() - adapted.parts.keys():
        raise GraphPruneError(
            f"{group} cannot be scored: no layer that it belongs to has LoRA. Give these layers some, or exclude it "
            "(exclude=)."
        )


def add_adapters(model: nn.Module, adapters: Adapters, seed: int = 0) -> nn.Module:
    """``model`` itself if it has adapters; else a copy that shares its weights, with LoRA on every linear layer.

    Quantised weights stay as they are while the adapters train, and are made floating point where they are sliced.

    Raises :class:`GraphPruneError` when it has no linear layer, or has adapters on quantised weights.
    """
    if has_adapters(model):
        if has_quantised(model):
            raise GraphPruneError(
                "The adapters are on quantised weights, which they cannot be merged into when these are sliced: give "
                "the quantised model without adapters."
            )
        return model
    from peft import LoraConfig, get_peft_model

    linear = "all-linear" if hasattr(model, "get_output_embeddings") else _linear_layers(model)
    if not linear:
        raise GraphPruneError(f"{type(model).__name__} has no linear layer, so there is nothing to put LoRA on.")
    config = LoraConfig(
        r=adapters.rank, lora_alpha=adapters.alpha, lora_dropout=adapters.dropout, target_modules=linear
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(floating_structure(model), config)  # type: ignore[arg-type]


def _linear_layers(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
