"""Ordinary LoRA tuning: no structure is removed, the adapters train."""

from __future__ import annotations

from graphprune.ir.program import Program
from graphprune.passes.adapted import Adapted
from graphprune.passes.add_adapters import Adapters, add_adapters
from graphprune.passes.base import Pass
from graphprune.passes.select_structures import make_plan
from graphprune.passes.train_adapters import Nothing, Training, train


def tune_adapters(steps: int, adapters: Adapters | None = None, training: Training | None = None) -> Pass:
    """A pass that removes nothing and trains the adapters for so many ``steps``; a model without any gets LoRA.

    ``adapters`` are the settings of that, ``training`` those of the steps.
    """
    lora, settings = adapters or Adapters(), training or Training()

    def run(program: Program) -> None:
        adapted = Adapted(program)
        train(program, adapted, settings, steps, Nothing())
        adapted.hand_over()
        make_plan(program, {})

    return Pass(
        "tune_adapters", run, requires=("prunable",), ensures=("plan",), prepare=lambda m: add_adapters(m, lora)
    )
