"""Models that accelerate has spread over devices, host memory and disk (``device_map=``), gathered in host memory.

Its hooks move weights in and out of modules as these run, as new objects every time; the compiler knows weights by
identity. So it works on a copy without hooks, whose weights are all in host memory (those that were there are shared,
not copied), and runs it on one device with :func:`graphprune.trace.placement.placed`.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import ModelHook, remove_hook_from_module
from accelerate.utils import align_module_device
from torch import nn

from graphprune.trace.skeleton import copy_structure

_HOOK, _MAP = "_hf_hook", "hf_device_map"


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate moves weights or activations while it runs."""
    return any(hasattr(module, _HOOK) for module in model.modules())


def main_device(model: nn.Module) -> torch.device:
    """Where a dispatched model computes: the first device of its map that is not host memory or disk, if any."""
    places = [p for p in getattr(model, _MAP, {}).values() if str(p) not in ("cpu", "disk", "meta")]
    return torch.device(places[0] if places else "cpu")


def gathered(model: nn.Module) -> nn.Module:
    """A copy without hooks of accelerate and with all weights in host memory. The model is as it was."""
    hooks = {id(hook): ModelHook() for module in model.modules() if (hook := getattr(module, _HOOK, None)) is not None}
    copied: Any = copy_structure(model, memo=dict(hooks))
    remove_hook_from_module(copied, recurse=True)
    vars(copied).pop(_MAP, None)
    same: dict[Any, torch.Tensor] = {}
    for path, module in model.named_modules():
        own = copied.get_submodule(path)
        _without_own_forward(own)
        kept = {**module._parameters, **module._buffers}  # what is on meta here comes from elsewhere
        with align_module_device(module, "cpu"):
            for kind in ("_parameters", "_buffers"):
                for name, tensor in getattr(module, kind).items():
                    if tensor is not None:
                        getattr(own, kind)[name] = _once(same, kept[name], tensor)
    if hasattr(copied, "tie_weights"):  # on disk, tied weights are several files
        copied.tie_weights()
    return copied


def _once(same: dict[Any, torch.Tensor], before: torch.Tensor | None, now: torch.Tensor) -> torch.Tensor:
    """``now`` in host memory; names of a tied tensor get one object. ``before`` is what its module holds otherwise."""
    value = now.detach().cpu()
    offloaded = before is None or before.is_meta
    key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if offloaded and value.numel() else id(before)
    made = nn.Parameter(value, requires_grad=now.requires_grad) if isinstance(now, nn.Parameter) else value
    return same.setdefault(key, made)


def _without_own_forward(module: nn.Module) -> None:
    """accelerate leaves the class's forward as an attribute of the module."""
    forward = vars(module).get("forward")
    if getattr(forward, "__func__", None) is type(module).forward:
        del module.forward
