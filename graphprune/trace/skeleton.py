"""Copies of a model's structure that share, replace or forget its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

Replace = Callable[[torch.Tensor], torch.Tensor]


def tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every distinct parameter and buffer object, tied ones once."""
    seen: set[int] = set()
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def names(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under every name it has, tied ones several times."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def copy_structure(model: nn.Module, replace: Replace | None = None) -> nn.Module:
    """A deep copy of everything but the weights: modules, configs, hooks, attributes.

    Each parameter and buffer of the copy is ``replace(original)``, or the original itself when ``replace`` is None;
    tied tensors stay tied. No weight is copied here.
    """
    memo: dict[int, object] = {id(t): t if replace is None else replace(t) for t in tensors(model)}
    return copy.deepcopy(model, memo)
