"""Refuse weights that are not finite, as they are read."""

from __future__ import annotations

import torch

from graphprune.errors import GraphPruneError
from graphprune.trace.stored import Stored


class Checked(Stored):
    """``source``, the values of a parameter: reading any that are not finite raises :class:`GraphPruneError`."""

    def __init__(self, source: Stored, name: str):
        super().__init__(source.shape, source.dtype)
        self.whole = source.whole
        self._source, self._name = source, name
        self._known = 0  # so many rows were looked at already

    def rows(self, start: int, stop: int) -> torch.Tensor:
        found = self._source.rows(start, stop)
        if stop > self._known and found.is_floating_point():
            if not all(map(_finite, found.flatten().split(_ELEMENTS))):
                what = f"The parameter {self._name} holds NaN or infinite values"
                raise GraphPruneError(f"{what}; repair the model first.")
            if start <= self._known:
                self._known = stop
        return found


_ELEMENTS = 2**18  # at a time: they stay in the cache


def _finite(values: torch.Tensor) -> bool:
    return not values.numel() or all(bool(torch.isfinite(end)) for end in values.aminmax())  # NaN is both ends
