"""config.json: written without, and read without regard for, what does not belong to a pruned model on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graphprune.io.checked_json import read_json
from graphprune.io.manifest import CONFIG

# What config.json of a portable folder says to its modelling file.
PORTABLE_KEY = "graphprune"
# Weights on disk are plain, whatever they were loaded from.
_NOT_WRITTEN = {"quantization_config", "_name_or_path", "auto_map", PORTABLE_KEY}
# These would fetch code or weights from somewhere else while the model is built.
_NOT_READ = _NOT_WRITTEN | {
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "trust_remote_code",
    "use_pretrained_backbone",
}
_SPECIAL_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def write_config(config: Any, class_name: str, dtype: str | None, folder: Path, more: dict[str, Any]) -> None:
    """Write a Hugging Face config for weights of ``dtype`` of the class named, with ``more`` for who loads it."""
    data = {**_without(json.loads(config.to_json_string()), _NOT_WRITTEN), **more}
    data["architectures"] = [class_name]
    if dtype is not None:
        data["dtype"] = dtype
    (folder / CONFIG).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in config.json that only describe the model."""
    return read_settings(read_json(folder / CONFIG))


def read_settings(data: Any) -> dict[str, Any]:
    """:func:`read_config` for the content of a config.json."""
    return _decoded(_without(data, _NOT_READ))


def _without(data: Any, keys: set[str]) -> Any:
    """``data`` without some keys, at any depth: configs hold configs."""
    if isinstance(data, dict):
        return {key: _without(value, keys) for key, value in data.items() if key not in keys}
    if isinstance(data, list):
        return [_without(value, keys) for value in data]
    return data


def _decoded(data: Any) -> Any:
    """transformers writes infinities, which JSON does not have, as ``{"__float__": "Infinity"}``."""
    if isinstance(data, dict):
        tag = data.get("__float__")
        if len(data) == 1 and isinstance(tag, str) and tag in _SPECIAL_FLOATS:
            return _SPECIAL_FLOATS[tag]
        return {key: _decoded(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_decoded(value) for value in data]
    return data
