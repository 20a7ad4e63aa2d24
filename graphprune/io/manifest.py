"""graphprune.json: what a saved folder holds, and how the model in it was made."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from graphprune.errors import GraphPruneError
from graphprune.io.checked_json import of_kind, read_json, take
from graphprune.io.report_json import report_from_data, report_to_data
from graphprune.reporting import Report

FORMAT = 1
MANIFEST = "graphprune.json"
CONFIG = "config.json"
KINDS = ("parameter", "buffer", "attribute")

# No separators, no leading dot: such a name cannot leave the folder.
_FILE_NAME = re.compile(r"config\.json|[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", re.ASCII)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk.

    Attributes:
        shape: its sizes. dtype: as torch names it, without ``torch.``.
        kind: ``"parameter"``, ``"buffer"``, or ``"attribute"`` for a tensor that a module holds as neither.
        persistent: whether it is part of the state dict. requires_grad: of a parameter.
        file: the safetensors file that holds it.
    """

    shape: tuple[int, ...]
    dtype: str
    kind: str
    persistent: bool
    requires_grad: bool
    file: str


@dataclass(frozen=True)
class Tie:
    """Another name of a stored tensor; ``kind`` says how it is held under that name."""

    to: str
    kind: str


@dataclass(frozen=True)
class StoredFile:
    """A file that must be exactly as it was written."""

    bytes: int
    sha256: str


@dataclass
class Manifest:
    """The content of graphprune.json.

    Attributes:
        class_name: of the model. in_transformers: whether transformers has that class.
        attention: the attention implementation it used, or None.
        versions: package → version that wrote the folder.
        files: file → size and checksum. tensors: name → where and what it is. ties: name → what it shares memory with.
        reports: what was done by every pruning, oldest first, as plain data.
    """

    class_name: str
    in_transformers: bool
    attention: str | None
    versions: dict[str, str]
    files: dict[str, StoredFile]
    tensors: dict[str, StoredTensor]
    ties: dict[str, Tie]
    reports: list[dict[str, Any]]

    def report(self, base_config: Any) -> Report:
        """The report of the last pruning, with its history."""
        made: list[Report] = []
        for number, data in enumerate(self.reports):
            made.append(report_from_data(data, f"{MANIFEST}: reports[{number}]", list(made), base_config))
        return made[-1]


def reports_to_data(report: Report) -> list[dict[str, Any]]:
    """A report and its history as plain data, oldest first."""
    return [report_to_data(one) for one in (*report.history, report)]


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write graphprune.json into ``folder``."""
    data = {"format": FORMAT, **asdict(manifest)}
    data["sha256"] = seal(data)
    text = json.dumps(data, indent=1)
    # A plan has a number per kept index: one line per list, not one line per number. JSON strings hold no raw newline.
    text = re.sub(r"\[\n[\s\d,]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def seal(data: dict[str, Any]) -> str:
    """The checksum of graphprune.json's own content, against damage (not against malice)."""
    rest = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check graphprune.json.

    Raises:
        GraphPruneError: when ``folder`` was not written by graphprune, or the file is damaged.
    """
    if not folder.is_dir():
        raise GraphPruneError(f"There is no folder {folder}.")
    if not (folder / MANIFEST).is_file():
        raise GraphPruneError(f"{folder} has no {MANIFEST}: it was not written by graphprune.save.")
    data = read_json(folder / MANIFEST)
    if data.get("format") != FORMAT:
        raise GraphPruneError(
            f"{folder / MANIFEST} has format {data.get('format')!r}; this version of graphprune reads format {FORMAT}."
        )
    if take(data, "sha256", str, MANIFEST) != seal(data):
        raise GraphPruneError(f"{folder / MANIFEST} is damaged or was edited: its content does not match its checksum.")
    manifest = Manifest(
        class_name=take(data, "class_name", str, MANIFEST),
        in_transformers=take(data, "in_transformers", bool, MANIFEST),
        attention=take(data, "attention", (str, type(None)), MANIFEST),
        versions=_strings(data, "versions"),
        files={name: _stored_file(name, item) for name, item in take(data, "files", dict, MANIFEST).items()},
        tensors={name: _stored_tensor(name, item) for name, item in take(data, "tensors", dict, MANIFEST).items()},
        ties={name: _tie(name, item) for name, item in take(data, "ties", dict, MANIFEST).items()},
        reports=take(data, "reports", list, MANIFEST),
    )
    _check_references(manifest)
    manifest.report(None)  # damaged reports are found before anything is built
    return manifest


def _strings(data: dict[str, Any], key: str) -> dict[str, str]:
    return {name: of_kind(v, str, f"{MANIFEST}: {key}") for name, v in take(data, key, dict, MANIFEST).items()}


def _stored_file(name: str, item: Any) -> StoredFile:
    where = f"{MANIFEST}: files[{name!r}]"
    if not _FILE_NAME.fullmatch(name):
        raise GraphPruneError(f"{where}: this is no name of a weight file beside {MANIFEST}; it will not be opened.")
    of_kind(item, dict, where)
    return StoredFile(take(item, "bytes", int, where), take(item, "sha256", str, where))


def _stored_tensor(name: str, item: Any) -> StoredTensor:
    where = f"{MANIFEST}: tensors[{name!r}]"
    of_kind(item, dict, where)
    shape = tuple(of_kind(size, int, f"{where}: shape") for size in take(item, "shape", list, where))
    if any(size < 0 for size in shape):
        raise GraphPruneError(f"{where} is damaged: shape {list(shape)} has a negative size.")
    dtype = take(item, "dtype", str, where)
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise GraphPruneError(f"{where} is damaged: torch has no dtype {dtype!r}.")
    stored = StoredTensor(
        shape,
        dtype,
        _kind(item, where),
        take(item, "persistent", bool, where),
        take(item, "requires_grad", bool, where),
        take(item, "file", str, where),
    )
    if stored.requires_grad and not _has_gradients(getattr(torch, dtype)):
        raise GraphPruneError(f"{where} is damaged: {dtype} tensors cannot require gradients.")
    return stored


def _tie(name: str, item: Any) -> Tie:
    where = f"{MANIFEST}: ties[{name!r}]"
    of_kind(item, dict, where)
    return Tie(take(item, "to", str, where), _kind(item, where))


def _kind(item: dict[str, Any], where: str) -> str:
    kind = take(item, "kind", str, where)
    if kind not in KINDS:
        raise GraphPruneError(f"{where} is damaged: {kind!r} is none of {', '.join(KINDS)}.")
    return kind


def _has_gradients(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _check_references(manifest: Manifest) -> None:
    for name, stored in manifest.tensors.items():
        if not stored.file.endswith(".safetensors") or stored.file not in manifest.files:
            raise GraphPruneError(
                f"{MANIFEST}: tensors[{name!r}] is said to be in {stored.file!r}, which is none of its weight files."
            )
    for name, tie in manifest.ties.items():
        target = manifest.tensors.get(tie.to)
        if name in manifest.tensors or target is None or (tie.kind == "parameter" and target.kind != tie.kind):
            raise GraphPruneError(f"{MANIFEST} is damaged: {name!r} cannot share memory with {tie.to!r}.")
    if not manifest.reports:
        raise GraphPruneError(f"{MANIFEST} is damaged: it has no report of a pruning.")
