"""Loops over what ``nonzero`` finds, such as the experts that any token chose.

How often ``for i in mask.nonzero():`` runs depends on values, which no graph can hold. It is traced over every index of
the mask: what such a loop does for an index that nothing chose is, by its own logic, nothing. Whether the graph is what
the model computes is compared in any case (:mod:`graphprune.passes.verify`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class EveryIndex(TorchFunctionMode):
    """While it is entered, iterating over the indices that ``nonzero`` found in a vector goes over all it has."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, tuple[torch.Tensor, int]] = {}  # id of what nonzero made → itself, length of the vector

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.unbind and args[1:] in ((), (0,)) and not kwargs and id(args[0]) in self._found:
            return tuple([index] for index in range(self._found[id(args[0])][1]))  # numbers: they may be part of a name
        out = func(*args, **kwargs)
        if func in (torch.nonzero, torch.Tensor.nonzero) and isinstance(out, torch.Tensor) and args[0].ndim == 1:
            with torch._C.DisableTorchFunction():  # looking at the shape here is not forward's doing
                self._found[id(out)] = (out, args[0].shape[0])
        return out
