"""A folder that graphprune wrote as a model whose weights stay on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.io.checked_json import read_json
from graphprune.io.folder import load_stored
from graphprune.io.manifest import CONFIG, Manifest, read_manifest
from graphprune.io.weight_files import check_files, weight_files
from graphprune.streaming.checked import Checked
from graphprune.streaming.checkpoint import Checkpoint, open_checkpoint
from graphprune.streaming.config_limits import check_limits
from graphprune.trace.stored import Converted, Stored


def open_manifest(folder: Path) -> tuple[Manifest, Checkpoint]:
    """What graphprune.json says and the weight files, every one exactly as it was written."""
    manifest = read_manifest(folder)
    check_files(manifest, folder)
    return manifest, open_checkpoint(folder, weight_files(manifest))


def open_pruned(folder: Path, manifest: Manifest, checkpoint: Checkpoint, dtype: torch.dtype | None) -> nn.Module:
    """The model that :func:`graphprune.load` would load, its weights on disk, in eval mode.

    ``dtype`` is for the floating-point tensors of the state dict.
    """
    if (folder / CONFIG).is_file():
        check_limits(read_json(folder / CONFIG), checkpoint, str(folder / CONFIG))
    stored: dict[str, Stored] = {}
    for name, entry in manifest.tensors.items():
        one: Stored = checkpoint.tensors[name]
        if str(one.dtype) != f"torch.{entry.dtype}":
            raise GraphPruneError(
                f"{folder / entry.file} holds {name!r} as {one.dtype}, the tensor table says {entry.dtype}: the folder "
                "is damaged."
            )
        if dtype is not None and entry.persistent and one.dtype.is_floating_point and one.dtype != dtype:
            one = Converted(one, dtype)
        stored[name] = Checked(one, name) if entry.kind == "parameter" else one
    return load_stored(folder, manifest, stored, dtype)
