"""Multiply-accumulates of a forward."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from graphprune.trace.inputs import Inputs
from graphprune.trace.quiet import eval_mode, without_hooks


def count_macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates of one forward of ``model`` on ``inputs``: matrix products, convolutions, attention.

    ``inputs`` is ``(args, kwargs)``; the count is of all its rows and tokens together. Runs the forward once, in eval
    mode, and needs its weights; the model is left as it was. Errors of the forward pass through.
    """
    args, kwargs = inputs
    counter = FlopCounterMode(display=False)
    # As plain products: torch has no count for heads in groups in the fused kernels of GPUs.
    with eval_mode(model), without_hooks(model), sdpa_kernel(SDPBackend.MATH), counter:
        model(*args, **kwargs)
    return counter.get_total_flops() // 2


def positions(inputs: Inputs) -> int:
    """How many tokens (for token inputs) or samples ``inputs`` hold: what to divide a forward's MACs by."""
    args, kwargs = inputs
    for name, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, torch.Tensor):
            return value.numel() if name == "input_ids" else len(value)
    return 1
