"""Every tensor a model holds, by name: parameters, buffers, and tensors that are plain attributes of a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Held:
    """A tensor and how its module holds it; ``kind`` as in :class:`graphprune.io.manifest.StoredTensor`."""

    tensor: torch.Tensor
    kind: str
    persistent: bool


def held_tensors(model: nn.Module) -> dict[str, Held]:
    """Every tensor under every name it has; what is in the state dict comes first."""
    found: dict[str, Held] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[prefix + name] = Held(parameter, "parameter", True)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                found[prefix + name] = Held(buffer, "buffer", name not in module._non_persistent_buffers_set)
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                found[prefix + name] = Held(value, "attribute", False)
    return dict(sorted(found.items(), key=lambda item: not item[1].persistent))


def replace_tensor(model: nn.Module, name: str, kind: str, tensor: torch.Tensor) -> None:
    """Put ``tensor`` in the place of the one called ``name``; nothing is copied, so ties are made by repeating it."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    # Straight into the tables of nn.Module: setters of modules may copy, convert or refuse.
    tables: dict[str, Any] = {"parameter": module._parameters, "buffer": module._buffers, "attribute": vars(module)}
    tables[kind][leaf] = tensor


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same bit by bit; one on the meta device has no values."""
    if one.is_meta or other.is_meta or one.dtype != other.dtype:
        return False
    return torch.equal(one.detach().cpu(), other.detach().cpu())
