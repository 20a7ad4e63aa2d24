"""The plan: which indices of which axes stay. Plain data, independent of weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from graphprune.errors import GraphPruneError

FORMAT = 1

Keep = list[int] | list[list[int]]


@dataclass
class Plan:
    """What to keep and why the rest was left alone.

    Attributes:
        ratio: parameters removed / all parameters that this plan reaches, in [0, 1).
        keep: name of a pruned axis → its kept indices, sorted, never empty; for a ragged axis one such list, of equal
            lengths, per index of the axis that it is ragged under. Axes not named are kept whole.
        sizes: name of every axis in ``keep`` → its size before.
        skipped: name of every axis left alone → the reason.
        method: how the plan was made.
        width: whether it may prune what statistics are taken over; see :func:`graphprune.compile`.
        under: name of every ragged axis in ``keep`` → name of the axis that it is ragged under.
        experts: whether it may prune what a router chooses from.
    """

    ratio: float
    keep: dict[str, Keep] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    method: str = ""
    width: bool = False
    under: dict[str, str] = field(default_factory=dict)
    experts: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:  # NaN is neither
            raise GraphPruneError(f"The ratio of a plan is at least 0 and below 1, not {self.ratio}.")
        for name, kept in self.keep.items():
            size = self.sizes.get(name)
            if size is None:
                raise GraphPruneError(f"The plan keeps indices of {name!r} but does not say its size.")
            if name not in self.under:
                _check_indices(name, kept, size)
                continue
            if not kept or not all(isinstance(one, list) for one in kept):
                raise GraphPruneError(f"The plan for {name!r}, under {self.under[name]!r}, must keep a list of lists.")
            for one in kept:
                _check_indices(name, one, size)
            if len({len(one) for one in kept}) > 1:  # type: ignore[arg-type]
                raise GraphPruneError(
                    f"The plan for {name!r} must keep the same number of indices under every index of "
                    f"{self.under[name]!r}."
                )
        for name in self.under:
            if name not in self.keep or self.under[name] == name:
                raise GraphPruneError(f"The plan says what {name!r} is under, but keeps no lists of it.")

    def widths(self) -> dict[str, tuple[int, int]]:
        """Name of every pruned axis → (size before, size after)."""
        return {
            name: (self.sizes[name], len(kept[0] if name in self.under else kept))  # type: ignore[arg-type]
            for name, kept in self.keep.items()
        }

    def to_json(self) -> str:
        """The plan as JSON text with stable order, so that plans can be compared as text."""
        return json.dumps(self.to_dict(), indent=1)

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` reads."""
        return {
            "format": FORMAT,
            "method": self.method,
            "ratio": self.ratio,
            **({"width": True} if self.width else {}),
            **({"experts": True} if self.experts else {}),
            "axes": {name: self._axis(name) for name in self.keep},
            "skipped": self.skipped,
        }

    def _axis(self, name: str) -> dict[str, Any]:
        under = {"under": self.under[name]} if name in self.under else {}
        return {"size": self.sizes[name], **under, "keep": self.keep[name]}

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what :meth:`to_json` wrote. Raises :class:`GraphPruneError` for anything else."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise GraphPruneError(f"This is no plan: it is not JSON ({error}).") from None
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """A plan from parsed JSON; every field is checked."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise GraphPruneError(f"This is no plan of format {FORMAT}.")
        try:
            axes = data["axes"]
            keep = {str(name): _indices(axis["keep"]) for name, axis in axes.items()}
            sizes = {str(name): _index(axis["size"]) for name, axis in axes.items()}
            skipped = {str(name): str(reason) for name, reason in data.get("skipped", {}).items()}
            under = {str(name): _name(axis["under"]) for name, axis in axes.items() if "under" in axis}
            method = str(data.get("method", ""))
            width, experts = _flag(data, "width"), _flag(data, "experts")
            return cls(float(data["ratio"]), keep, sizes, skipped, method, width, under, experts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GraphPruneError(f"The plan is damaged: {type(error).__name__}: {error}.") from None


def as_lists(kept: Mapping[str, torch.Tensor]) -> dict[str, Keep]:
    """Tensors of indices as lists, which share their integers: the plan of a large model has millions."""
    largest = max((int(indices.max()) for indices in kept.values()), default=0)
    integers = np.arange(largest + 1).astype(object)
    return {name: integers[indices.numpy()].tolist() for name, indices in kept.items()}


def _flag(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name, False)
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}")
    return value


def _check_indices(name: str, kept: Any, size: int) -> None:
    # Without a loop in Python: a plan of a large model has millions of indices.
    flat = isinstance(kept, list) and set(map(type, kept)) == {int}
    in_order = flat and kept == sorted(set(kept))
    if not kept or not in_order or kept[0] < 0 or kept[-1] >= size:
        raise GraphPruneError(
            f"The plan for {name!r} must keep a sorted, non-empty list of indices below {size}, each once."
        )


def _indices(value: Any) -> Keep:
    if isinstance(value, list) and any(isinstance(one, list) for one in value):
        return [[_index(i) for i in one] for one in value]
    return [_index(i) for i in value]


def _name(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"{value!r} is no name")
    return value


def _index(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no index")
    return value
