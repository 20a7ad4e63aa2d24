"""The weights of a folder: one safetensors file, or several with an index. Only their headers are read here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from graphprune.errors import GraphPruneError
from graphprune.io.checked_json import of_kind, read_json, take
from graphprune.io.fingerprint import fingerprint
from graphprune.io.weight_files import INDEX
from graphprune.streaming.tensor_files import OnDisk, TensorFile

SINGLE = "model.safetensors"
# No separators, no leading dot: such a name cannot leave the folder.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")


@dataclass
class Checkpoint:
    """The files of a checkpoint, open, and every tensor in them, by name."""

    files: list[TensorFile]
    tensors: dict[str, OnDisk]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def fingerprint(self) -> str:
        """What tells it from another: the names, headers, sizes and times of its files."""
        parts = []
        for file in self.files:
            time = file.path.stat().st_mtime_ns
            parts += [file.path.name, str(file.bytes), str(time), fingerprint(file.header.decode("utf-8", "replace"))]
        return fingerprint(*parts)

    def close(self) -> None:
        """Nothing is read any more."""
        for file in self.files:
            file.close()


def open_checkpoint(folder: Path, names: list[str] | None = None) -> Checkpoint:
    """Open the weight files of ``folder``: those called ``names``, or those that transformers would load.

    Raises:
        GraphPruneError: when there are none, one is missing, damaged or truncated, or they disagree with the index. No
            file outside the folder and no pickle is ever opened.
    """
    index = {} if names is not None else _index(folder)
    if names is None:
        names = sorted(set(index.values())) or [_single(folder)]
    for name in names:
        if not (folder / name).is_file():
            raise GraphPruneError(f"{folder} has no file {name}: the checkpoint is incomplete.")
    files: list[TensorFile] = []
    found = Checkpoint(files, {})
    try:
        for name in names:
            files.append(TensorFile(folder / name))
            for key, tensor in files[-1].tensors.items():
                if key in found.tensors:
                    raise GraphPruneError(f"{folder}: {key!r} is in {found.tensors[key].file.path.name} and in {name}.")
                found.tensors[key] = tensor
        for key, name in index.items():
            if key not in found.tensors or found.tensors[key].file.path.name != name:
                raise GraphPruneError(f"{folder / INDEX} says that {key!r} is in {name}, but it is not.")
    except BaseException:
        found.close()
        raise
    return found


def _index(folder: Path) -> dict[str, str]:
    """Name of a tensor → file; nothing where there is one file."""
    path = folder / INDEX
    if (folder / SINGLE).is_file() or not path.is_file():
        return {}
    found = {}
    for key, name in take(read_json(path), "weight_map", dict, str(path)).items():
        if not _FILE_NAME.fullmatch(of_kind(name, str, f"{path}: {key!r}")):
            raise GraphPruneError(f"{path}: {name!r} is no name of a safetensors file beside it; it is not opened.")
        found[key] = name
    if not found:
        raise GraphPruneError(f"{path} lists no weights.")
    return found


def _single(folder: Path) -> str:
    if (folder / SINGLE).is_file():
        return SINGLE
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES):
        raise GraphPruneError(
            f"{folder} has no {SINGLE} but {pickles[0]}, which is not read, since loading such a file can run code: "
            "convert it to safetensors first (save_pretrained does)."
        )
    raise GraphPruneError(f"{folder} has neither {SINGLE} nor {INDEX}.")
