"""Tensors ↔ safetensors files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from graphprune.errors import GraphPruneError
from graphprune.io.manifest import Manifest, StoredFile, StoredTensor, Tie
from graphprune.io.tensors import Held

INDEX = "model.safetensors.index.json"
# What is not in the state dict, kept apart so that model.safetensors is what transformers would write.
BUFFERS = "graphprune_buffers.safetensors"
_BLOCK = 2**20

# Writes tensors, by name, as a safetensors file.
WriteShard = Callable[[dict[str, torch.Tensor], Path], StoredFile]


def write_weights(
    held: dict[str, Held], folder: Path, max_shard_size: int | str, write_shard: WriteShard | None = None
) -> tuple[dict[str, StoredTensor], dict[str, Tie], dict[str, StoredFile]]:
    """Write every tensor once, and the index when there are several shards.

    Returns:
        The table of stored tensors, the other names of those that have several, and the files.
    """
    first: dict[int, str] = {}
    for name, item in held.items():
        first.setdefault(id(item.tensor), name)
    ties = {
        name: Tie(first[id(item.tensor)], item.kind) for name, item in held.items() if first[id(item.tensor)] != name
    }
    stored = {name: item for name, item in held.items() if name not in ties}
    if write_shard is None:
        _check_stored(stored)
    plan = split_torch_state_dict_into_shards(
        {name: item.tensor for name, item in stored.items() if item.persistent}, max_shard_size=max_shard_size
    )
    shards: dict[str, list[str]] = dict(plan.filename_to_tensors)
    if others := [name for name, item in stored.items() if not item.persistent]:
        shards[BUFFERS] = others
    files = {
        file: (write_shard or _write_shard)({name: stored[name].tensor for name in names}, folder / file)
        for file, names in shards.items()
    }
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    table = {name: _entry(stored[name], file) for file, names in shards.items() for name in names}
    return table, ties, files


def _check_stored(stored: dict[str, Held]) -> None:
    for name, item in stored.items():
        if item.tensor.is_meta:
            raise GraphPruneError(f"{name} is on the meta device: there are no weights to save.")
        if item.tensor.layout is not torch.strided:
            raise GraphPruneError(f"{name} is a {item.tensor.layout} tensor; only dense tensors can be saved.")


def _entry(item: Held, file: str) -> StoredTensor:
    tensor = item.tensor
    dtype = str(tensor.dtype).removeprefix("torch.")
    return StoredTensor(tuple(tensor.shape), dtype, item.kind, item.persistent, tensor.requires_grad, file)


def _write_shard(tensors: dict[str, torch.Tensor], path: Path) -> StoredFile:
    """safetensors wants contiguous tensors, each with memory of its own."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        own[name] = tensor.detach().clone() if memory in seen else tensor.detach()
        own[name] = own[name].contiguous()
        seen.add(memory)
    save_file(own, path, metadata={"format": "pt"})
    return fingerprint(path)


def fingerprint(path: Path) -> StoredFile:
    """Size and checksum of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return StoredFile(path.stat().st_size, digest.hexdigest())


def check_files(manifest: Manifest, folder: Path) -> None:
    """Every file is there and exactly as it was written; nothing large is allocated.

    Raises:
        GraphPruneError: naming the file that is missing, truncated or changed, or does not hold the tensors it should.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            if not path.is_file():
                raise GraphPruneError(f"{folder} has no file {name}: the copy is incomplete.")
            if path.stat().st_size != expected.bytes:
                raise GraphPruneError(
                    f"{path} has {path.stat().st_size:,} bytes, not the {expected.bytes:,} that were written: "
                    "the copy is damaged."
                )
            if fingerprint(path) != expected:
                raise GraphPruneError(f"{path} does not match its checksum: the copy is damaged.")
        except OSError as error:
            raise GraphPruneError(f"{path} could not be read: {error.strerror or error}.") from error
    for name in weight_files(manifest):
        _check_table(manifest, folder / name)


def weight_files(manifest: Manifest) -> list[str]:
    """The names of the safetensors files of a folder."""
    return [name for name in manifest.files if name.endswith(".safetensors")]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise GraphPruneError(f"{path} is no readable safetensors file: {error}.") from error


def _check_table(manifest: Manifest, path: Path) -> None:
    """Names and shapes, from the header of the file alone."""
    expected = {name: stored for name, stored in manifest.tensors.items() if stored.file == path.name}
    with _open(path) as file:
        if different := set(file.keys()) ^ set(expected):
            raise GraphPruneError(f"{path} and the tensor table disagree on {min(different)!r}: the folder is damaged.")
        for name, stored in expected.items():
            shape = tuple(file.get_slice(name).get_shape())
            if shape != stored.shape:
                raise GraphPruneError(
                    f"{path} holds {name!r} with shape {list(shape)}, the tensor table says {list(stored.shape)}: "
                    "the folder is damaged."
                )


def read_weights(
    manifest: Manifest, folder: Path, device: torch.device, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Every stored tensor, in memory of its own on ``device``; call :func:`check_files` first.

    ``dtype`` is for the floating-point tensors of the state dict; the others keep theirs, as in transformers.
    """
    found = {}
    for file_name in weight_files(manifest):
        with _open(folder / file_name) as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                stored = manifest.tensors[name]
                tensor = file.get_tensor(name)
                if str(tensor.dtype) != f"torch.{stored.dtype}":
                    raise GraphPruneError(
                        f"{folder / file_name} holds {name!r} as {tensor.dtype}, the tensor table says {stored.dtype}: "
                        "the folder is damaged."
                    )
                wanted = dtype if dtype and stored.persistent and tensor.is_floating_point() else tensor.dtype
                # A copy: what safetensors gives is the mapped file, which may change or go away.
                found[name] = tensor.to(device=device, dtype=wanted, copy=True)
    return found
