"""Refuse a config of absurd sizes before anything is built from it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from graphprune.errors import GraphPruneError
from graphprune.streaming.checkpoint import Checkpoint

# No integer in a config is larger than this.
_LARGEST = 2**31
# How many there are of something with weights, or how large these are. What is below is refused by nobody.
_SIZE = re.compile(r"^(num|n|d)_|layer|head|expert|block|depth|size|dim|width|inner")
_HARMLESS = 2**20


def check_limits(settings: dict[str, Any], checkpoint: Checkpoint, where: str) -> None:
    """No integer of a config is absurd, and none that is a size or a count is larger than all in the checkpoint.

    Constructors make lists and tables of such lengths before they make any weight.

    Raises :class:`GraphPruneError` naming the setting.
    """
    largest = max((max(tensor.shape, default=1) for tensor in checkpoint.tensors.values()), default=1)
    most = max(_HARMLESS, largest, len(checkpoint.tensors))
    for name, value in _integers(settings, ""):
        if abs(value) > _LARGEST:
            raise GraphPruneError(f"{where}: {name} is {value:,}, which is no size of a model: it is not built.")
        if _SIZE.search(name.rpartition(".")[2]) and value > most:
            raise GraphPruneError(
                f"{where}: {name} is {value:,}, but the checkpoint has {len(checkpoint.tensors):,} tensors of at most "
                f"{largest:,} rows or columns: the model is not built."
            )


def _integers(value: Any, name: str) -> Iterator[tuple[str, int]]:
    if type(value) is int:
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _integers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _integers(item, name)
