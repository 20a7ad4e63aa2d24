"""Multiply-accumulates, counted on the meta device: no weight is read, nothing is computed."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from graphprune.trace.export import without_hooks
from graphprune.trace.inputs import Inputs
from graphprune.trace.skeleton import copy_structure


def count_macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates of one forward of ``model`` on ``inputs`` (matrix products, convolutions, attention)."""

    def to_meta(tensor: torch.Tensor) -> torch.Tensor:
        meta = tensor.detach().to("meta")
        return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta

    skeleton = copy_structure(model, to_meta).eval()
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), inputs)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), without_hooks(skeleton), counter:
        skeleton(*args, **kwargs)
    return counter.get_total_flops() // 2


def positions(inputs: Inputs) -> int:
    """How many tokens (for token inputs) or samples ``inputs`` hold: what to divide a forward's MACs by."""
    args, kwargs = inputs
    for name, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, torch.Tensor):
            return value.numel() if name == "input_ids" else len(value)
    return 1
