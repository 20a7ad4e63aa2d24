"""Run a model, or its graph, in a higher precision than its weights have, one weight at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from graphprune.trace.operators import METADATA, writes_first

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
        if func not in METADATA:
            # What an in-place operator writes to must stay the tensor it is.
            first = 1 if writes_first(func) else 0
            args = (*args[:first], *(self._convert(a) for a in args[first:]))
            kwargs = {key: value if key == "out" else self._convert(value) for key, value in kwargs.items()}
        if func is torch._grouped_mm and args[0].dtype is torch.float64:
            return _grouped_mm(*args, **kwargs)
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


def _grouped_mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    offs: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``torch._grouped_mm`` of ``x (S, K)`` and ``weight (E, K, N)``, which has no kernel in float64."""
    ends = offs.tolist()
    pieces = [x[start:end] @ one for start, end, one in zip([0, *ends], ends, weight, strict=False)]
    rest = x.new_zeros(len(x) - ends[-1], weight.shape[-1])
    return torch.cat([*pieces, rest])
