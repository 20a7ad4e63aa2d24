"""What modes that look at every operator have to know of some."""

from __future__ import annotations

from typing import Any

import torch

# Asked often, and the same for a tensor and its substitute: not worth a copy.
METADATA = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
}


def writes_first(func: Any) -> bool:
    """Whether an operator writes to its first argument."""
    name = str(getattr(func, "__name__", "")).partition(".")[0]
    return name in _ASSIGNMENTS or (name.endswith("_") and not name.endswith("__"))


# ``x[i] = y``, ``x.data = y`` and ``x += y`` with its like.
_IN_PLACE = "add sub mul div truediv floordiv mod pow and or xor lshift rshift matmul"
_ASSIGNMENTS = {"__setitem__", "__set__"} | {f"__i{name}__" for name in _IN_PLACE.split(" ")}
