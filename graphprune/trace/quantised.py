"""Quantised weights: a stand-in of plain floating point for each, with the value behind it.

A quantised weight cannot be sliced, and a model full of plain ones may be too large. So what is traced, inferred and
planned is a structure in which every quantised weight is an uninitialised tensor, whose memory is never touched; its
value is made when it is asked for, one tensor at a time (:meth:`graphprune.ir.program.Program.weight`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from graphprune.trace.skeleton import QUANTISED, copy_structure, tensors


def is_quantised(tensor: torch.Tensor) -> bool:
    """Whether a weight is a tensor of a class of its own that can be de-quantised, as those of torchao are."""
    kind = type(tensor.data)
    return kind is not torch.Tensor and "dequantize" in vars(kind)


def quantised_value(tensor: torch.Tensor) -> torch.Tensor | None:
    """The quantised weight that ``tensor`` stands for, None if it stands for itself."""
    return getattr(tensor, QUANTISED, None)


def floating_structure(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with stand-ins for its quantised weights, which shares all others; frozen."""

    def replace(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            return tensor
        if not is_quantised(tensor):
            return nn.Parameter(tensor.detach(), requires_grad=False)
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        stand_in = nn.Parameter(empty, requires_grad=False)
        setattr(stand_in, QUANTISED, tensor.detach())
        return stand_in

    copied: Any = copy_structure(model, replace)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(copied).pop(name, None)
    config = getattr(copied, "config", None)
    if hasattr(config, "quantization_config"):
        copied.config = copy.copy(config)
        del copied.config.quantization_config
    return copied


def has_quantised(model: nn.Module) -> bool:
    """Whether any weight of ``model`` is quantised."""
    return any(is_quantised(tensor) for tensor in tensors(model))
