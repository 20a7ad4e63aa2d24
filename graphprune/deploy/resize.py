"""A model as its class builds it gets the sizes that pruning left.

It needs torch alone: what follows the imports also goes, as it is, into the modelling file of a portable folder
(:mod:`graphprune.deploy.portable`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# --- resize ---


def resize(model: nn.Module, sizes: dict[str, Any]) -> None:
    """Give ``model`` other sizes, in place; on the meta device too, before weights are loaded.

    Args:
        model: as its class builds it.
        sizes: ``biases``, the linear layers that have a bias now; ``shapes`` of tensors, by name; ``attributes``, the
            integers that forward uses as sizes, by their path; ``buffers``, name → dtype of tensors that its class
            computes with other values: from now on they are part of the state dict.

    Raises:
        AttributeError: naming what the model does not have.
    """
    for path in sizes["biases"]:
        linear: Any = _module(model, path)
        linear.bias = nn.Parameter(linear.weight.new_zeros(len(linear.weight)))
    done: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # tied tensors stay tied
    for name, shape in sizes["shapes"].items():
        module, leaf = _place(model, name)
        old = getattr(module, leaf)
        setattr(module, leaf, done.setdefault(id(old), (old, _cut(old, shape)))[1])
    for path, value in sizes["attributes"].items():
        _replaced(model, path.split("."), value)
    for name, dtype in sizes["buffers"].items():
        module, leaf = _place(model, name)
        buffer = getattr(module, leaf).to(getattr(torch, dtype))
        delattr(module, leaf)
        module.register_buffer(leaf, buffer)
    refresh_torch_attributes(model)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return _module(model, path), leaf


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise AttributeError(f"{type(model).__name__} has no module {path!r}") from None


def _cut(tensor: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """The first indices of every dimension."""
    if len(shape) != tensor.dim():
        raise ValueError(f"a tensor of shape {list(tensor.shape)} cannot get shape {shape}")
    new = tensor.detach().new_zeros(shape)
    common = tuple(slice(min(sizes)) for sizes in zip(shape, tensor.shape, strict=True))
    new[common] = tensor.detach()[common]
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _replaced(holder: Any, path: list[str], value: int) -> Any:
    """``holder`` with another value at the end of ``path``; configs and lists, which modules may share, are copied."""
    if not path:
        return value
    name, *rest = path
    if isinstance(holder, (tuple, list)):
        items = list(holder)
        items[int(name)] = _replaced(items[int(name)], rest, value)
        return type(holder)(items)
    if isinstance(holder, nn.Module) and name in holder._modules:
        _replaced(holder._modules[name], rest, value)
        return holder
    if name not in vars(holder):
        raise AttributeError(f"{type(holder).__name__} has no attribute {name!r}")
    if not isinstance(holder, nn.Module):
        holder = copy.copy(holder)
    vars(holder)[name] = _replaced(vars(holder)[name], rest, value)
    return holder


# What the classes of torch.nn themselves call the sizes of their weight: attribute → value from the module.
_TORCH_ATTRIBUTES: tuple[tuple[type, dict[str, Callable[[Any], int]]], ...] = (
    (nn.Linear, {"in_features": lambda m: m.weight.shape[1], "out_features": lambda m: m.weight.shape[0]}),
    (nn.Embedding, {"num_embeddings": lambda m: m.weight.shape[0], "embedding_dim": lambda m: m.weight.shape[1]}),
    (
        nn.modules.conv._ConvTransposeNd,
        {"in_channels": lambda m: m.weight.shape[0], "out_channels": lambda m: m.weight.shape[1] * m.groups},
    ),
    (
        nn.modules.conv._ConvNd,
        {"in_channels": lambda m: m.weight.shape[1] * m.groups, "out_channels": lambda m: m.weight.shape[0]},
    ),
    (
        nn.modules.batchnorm._NormBase,
        {"num_features": lambda m: (m.weight if m.weight is not None else m.running_mean).shape[0]},
    ),
    (nn.GroupNorm, {"num_channels": lambda m: m.weight.shape[0]}),
)


def refresh_torch_attributes(model: nn.Module) -> None:
    """``in_features`` and the like: attributes of torch.nn's own classes that forward never reads."""
    for module in model.modules():
        for kind, attributes in _TORCH_ATTRIBUTES:
            if isinstance(module, kind):
                if _has_tensor(module):
                    for name, value in attributes.items():
                        setattr(module, name, value(module))
                break


def _has_tensor(module: nn.Module) -> bool:
    return getattr(module, "weight", None) is not None or getattr(module, "running_mean", None) is not None
