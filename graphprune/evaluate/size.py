"""Bytes of a model's parameters in memory, and of its checkpoint on disk."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters of ``model`` in memory, tied ones once, in the dtypes they have."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def checkpoint_bytes(path: str | os.PathLike[str]) -> int | None:
    """Bytes of the weight files of a checkpoint: the ``*.safetensors`` of a folder, or one file.

    None when ``path`` is neither (a name on the hub), or a folder without such files.
    """
    place = Path(path)
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) or None
