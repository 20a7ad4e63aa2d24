"""Run a model, or its graph, in a higher precision than its weights have, one weight at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Substitute = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def running_in(dtype: torch.dtype | None, substitutes: dict[int, Substitute] | None = None) -> Iterator[None]:
    """Every operator inside computes in ``dtype`` (as it stands when None), its operands converted as it uses them.

    Conversions to a floating dtype that the model asks for go to ``dtype`` as well. ``substitutes`` maps ``id(tensor)``
    to a function that gives the tensor to use in its place. Nothing is kept: the memory is that of one weight.
    """
    if dtype is None and not substitutes:
        yield
        return
    default = torch.get_default_dtype()
    try:
        if dtype is not None:
            torch.set_default_dtype(dtype)
        with _Running(dtype, substitutes or {}):
            yield
    finally:
        torch.set_default_dtype(default)


class _Running(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype | None, substitutes: dict[int, Substitute]):
        super().__init__()
        self.dtype = dtype
        self.substitutes = substitutes

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.dtype is not None and func in _CASTS:
            return self._convert(args[0]).to(self.dtype)
        if func not in _METADATA:
            # What an in-place operator writes to must stay the tensor it is.
            first = 1 if _writes_first(func) else 0
            args = (*args[:first], *(self._convert(a) for a in args[first:]))
            kwargs = {key: value if key == "out" else self._convert(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def _convert(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            substitute = self.substitutes.get(id(value))
            value = value if substitute is None else substitute(value)
            if self.dtype is not None and value.is_floating_point() and value.dtype != self.dtype:
                return value.to(self.dtype)
            return value
        if self.dtype is not None and isinstance(value, torch.dtype) and value.is_floating_point:
            return self.dtype
        if isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
            return type(value)(self._convert(item) for item in value)
        return value


# Conversions that name their dtype themselves.
_CASTS = {torch.Tensor.float, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16}

# Asked often, and the same for a tensor and its substitute: not worth a conversion.
_METADATA = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
}


def _writes_first(func: Any) -> bool:
    name = str(getattr(func, "__name__", "")).partition(".")[0]
    return name in _ASSIGNMENTS or (name.endswith("_") and not name.endswith("__"))


# ``x[i] = y``, ``x.data = y`` and ``x += y`` with its like.
_IN_PLACE = "add sub mul div truediv floordiv mod pow and or xor lshift rshift matmul"
_ASSIGNMENTS = {"__setitem__", "__set__"} | {f"__i{name}__" for name in _IN_PLACE.split(" ")}
