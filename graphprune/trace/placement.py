"""Run a model on a device that does not hold its weights: each comes when an operator needs it.

What calibration needs on the device is then one block, its activations and what a pass collects, however large the
model is. Weights that are on disk (:mod:`graphprune.trace.stored`) come from there.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from graphprune.trace.operators import METADATA, writes_first
from graphprune.trace.stored import stored_of


def placed(model: nn.Module, device: torch.device) -> AbstractContextManager[Any]:
    """A context in which operators run on ``device``, wherever the weights of ``model`` and what comes of them are.

    A copy of what was used last is kept, as many bytes as the largest block has (an item of an ``nn.ModuleList``, or
    the largest parameter). All that enter the same context share it, in turn: several batches, each in a thread of its
    own, that run from one operator to the same other one bring each weight once.
    Gradients go back to the weights where these are. Nothing is done when all of the model is on ``device``.
    """
    device = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
    held = (*model.parameters(), *model.buffers())
    if all(tensor.device == device for tensor in held):
        return nullcontext()
    return Placed(device, _largest_block(model))


def _largest_block(model: nn.Module) -> int:
    """Bytes of the largest item of a ``ModuleList``; without one, of the largest parameter."""
    blocks = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks]
    return max(sizes or [p.numel() * p.element_size() for p in model.parameters()], default=0)


class Placed(TorchFunctionMode):
    """See :func:`placed`; ``most`` is the number of bytes that are kept, and ``moved`` that of all that came."""

    def __init__(self, device: torch.device, most: int):
        super().__init__()
        self.moved = 0
        self._device, self._most = device, most
        self._here: OrderedDict[int, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()  # id → what it is, its copy

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:
            return self._device
        if func in METADATA or getattr(func, "__name__", "") in ("__get__", "__set__", "to", "detach"):
            return func(*args, **kwargs)
        if writes_first(func) and isinstance(args[0], torch.Tensor) and not self._is_here(args[0]):
            there = args[0].device  # what it writes to stays the tensor it is
            args = (args[0], *tree_map_only(torch.Tensor, lambda tensor: tensor.to(there), args[1:]))
            return func(*args, **tree_map_only(torch.Tensor, lambda tensor: tensor.to(there), kwargs))
        if func is nn.functional.embedding:
            args, kwargs = _only_looked_up(args, kwargs)
        args, kwargs = tree_map_only(torch.Tensor, self._bring, (args, kwargs))
        return func(*args, **kwargs)

    def _is_here(self, tensor: torch.Tensor) -> bool:
        return tensor.device == self._device

    def _bring(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._is_here(tensor):
            return tensor
        if tensor.requires_grad and torch.is_grad_enabled():
            return self._copy(tensor)  # a copy belongs to the graph that it is made in
        if id(tensor) not in self._here:
            self._here[id(tensor)] = (tensor, self._copy(tensor))
            while len(self._here) > 1 and sum(_bytes(copy) for _, copy in self._here.values()) > self._most:
                self._here.popitem(last=False)
        self._here.move_to_end(id(tensor))
        return self._here[id(tensor)][1]

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        self.moved += _bytes(tensor)
        stored = stored_of(tensor)
        return (tensor if stored is None else stored.read()).to(self._device)


def _only_looked_up(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of an embedding whose table is on disk, with only those rows of it that are looked up."""
    stored = stored_of(args[1]) if len(args) == 2 and kwargs.get("max_norm") is None else None
    if stored is None or stored.whole or not args[0].numel():
        return args, kwargs
    rows, places = torch.unique(args[0], return_inverse=True)
    table = torch.cat([stored.rows(row, row + 1) for row in rows.tolist()])
    return (places, table.to(args[0].device)), {}  # what else there is only matters to gradients


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
