"""Losses that were measured before, one JSON file per model, data and settings."""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from graphprune.errors import GraphPruneError
from graphprune.io.atomic import replace_file
from graphprune.io.checked_json import of_kind, read_json, take

FORMAT = 1
CACHE = "~/.cache/graphprune/knowledge"


def cache_folder(cache: str | PathLike[str] | None) -> Path | None:
    """The folder that ``cache=`` names; ``~/.cache`` of the default is ``$XDG_CACHE_HOME`` where that is set."""
    if cache is None:
        return None
    home = os.environ.get("XDG_CACHE_HOME")
    if cache == CACHE and home:
        return Path(home, "graphprune", "knowledge")
    try:
        return Path(cache).expanduser()
    except RuntimeError:  # there is no home
        return None


@dataclass
class LossCache:
    """The mean loss of the dense model, and of every group with so many structures masked, as far as they are known.

    ``losses`` has group → number of masked structures → loss. Without a ``path`` nothing is kept.
    """

    path: Path | None
    measure: str | None = None
    dense: float = math.nan
    losses: dict[str, dict[int, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path | None, key: str) -> LossCache:
        """What is kept under ``key``: nothing where there is nothing, or where it is damaged."""
        empty = cls(None if folder is None else folder / f"{key}.json")
        if empty.path is None or not empty.path.exists():
            return empty
        try:
            return _read(empty.path)
        except GraphPruneError:
            return empty

    def keep(self, group: str, losses: dict[int, float]) -> None:
        """Add what was measured of a group, and write all of it; a warning says when that is not possible."""
        self.losses.setdefault(group, {}).update(losses)
        if self.path is None:
            return
        data = {
            "format": FORMAT,
            "measure": self.measure,
            "dense": self.dense,
            "losses": {
                name: {str(count): loss if math.isfinite(loss) else None for count, loss in found.items()}
                for name, found in self.losses.items()
            },
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, json.dumps(data, allow_nan=False))
        except OSError as error:
            warnings.warn(f"What was measured is not kept: {error}. cache= takes another folder.", stacklevel=2)
            self.path = None


def _read(path: Path) -> LossCache:
    data = read_json(path)
    where, number = str(path), (int, float)
    if data.get("format") != FORMAT:
        raise GraphPruneError(f"{where} is of another format.")
    losses = {
        name: {_count(count, where): _loss(loss, where) for count, loss in of_kind(found, dict, where).items()}
        for name, found in take(data, "losses", dict, where).items()
    }
    return LossCache(path, take(data, "measure", str, where), float(take(data, "dense", number, where)), losses)


def _count(text: str, where: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise GraphPruneError(f"{where} is damaged: {text!r} is no number of structures.")
    return int(text)


def _loss(value: Any, where: str) -> float:
    return math.inf if value is None else float(of_kind(value, (int, float), where))
