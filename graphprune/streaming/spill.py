"""Weights that a pass has changed: kept on disk until the result is written, since all of them are too large."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from graphprune.streaming.checked import Checked
from graphprune.streaming.shard_writer import write_shard
from graphprune.streaming.tensor_files import TensorFile
from graphprune.trace.stored import stand_in


class Spill:
    """Writes tensors into ``folder``, one file each; ``fingerprint`` tells what is in them."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: list[TensorFile] = []
        self._digest = hashlib.sha256()

    def __call__(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Write ``value``, a parameter called ``name``; returns its stand-in. Raises OSError."""
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{len(self._files)}.safetensors"
        written = write_shard({name: value}, path, lambda count: None)
        self._digest.update(f"{name}\0{written.sha256}\0".encode())
        self._files.append(TensorFile(path))
        return stand_in(Checked(self._files[-1].tensors[name], name))

    @property
    def fingerprint(self) -> str:
        """Of all that was written, in order."""
        return self._digest.hexdigest()

    def close(self) -> None:
        """Nothing is read any more."""
        for file in self._files:
            file.close()
