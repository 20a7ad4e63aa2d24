"""JSON from a file that may be damaged or foreign: every look inside is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graphprune.errors import GraphPruneError

# Plans list kept indices: those of the largest models take some tens of MB.
_LARGEST = 512 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises :class:`GraphPruneError` when it is missing, oversized, or not that."""
    try:
        if not path.is_file():
            raise GraphPruneError(f"{path.parent} has no file {path.name}.")
        if path.stat().st_size > _LARGEST:
            raise GraphPruneError(f"{path} is larger than {_LARGEST:,} bytes: graphprune did not write it.")
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise GraphPruneError(f"{path} could not be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise GraphPruneError(f"{path} is damaged, it is not JSON: {error}.") from None
    if not isinstance(data, dict):
        raise GraphPruneError(f"{path} is damaged: it holds no JSON object.")
    return data


def read_text(path: str | Path) -> str:
    """The text of a file that a person may have written. Raises :class:`GraphPruneError` when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GraphPruneError(f"{path} cannot be read: {error}") from error


def take(data: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """``data[key]``, which must be there and of that kind; ``bool`` is no ``int`` here."""
    if key not in data:
        raise GraphPruneError(f"{where} is damaged: {key!r} is missing.")
    return of_kind(data[key], kind, f"{where}: {key}")


def of_kind(value: Any, kind: type | tuple[type, ...], where: str) -> Any:
    """``value``, checked to be of a kind."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise GraphPruneError(f"{where} is damaged: expected {wanted}, found {type(value).__name__}.")
    return value
