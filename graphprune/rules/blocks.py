"""The border of a repeated block that tracing left in the graph."""

from __future__ import annotations

import torch

import graphprune.trace.fold_blocks  # noqa: F401  (registers the operator)
from graphprune.rules.registry import Dims, Rule, rule


@rule(torch.ops.graphprune.enter)
def enter(r: Rule, tensors: list[Dims], block: str) -> list[Dims]:
    """Nothing happens to the inputs of a block on its border."""
    return tensors
