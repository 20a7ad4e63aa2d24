"""Folders of runs that go on: what a folder is of, and files that one of several processes makes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from graphprune.errors import GraphPruneError
from graphprune.io.atomic import replace_file
from graphprune.io.checked_json import read_json, take

_NAME = "run.json"
_POLL = 1.0  # seconds between two looks for what another process makes


def once(path: Path, make: Callable[[], None]) -> None:
    """Have the first process make what is to be at ``path``, if it is not there; the others wait until it is.

    Not at a barrier: what is made may take longer than barriers wait. It must appear when it is whole.
    """
    if PartialState().is_main_process and not path.exists():
        make()
    while not path.exists():
        time.sleep(_POLL)


def belongs_to(folder: Path, of: str, settings: dict[str, Any] | None = None) -> None:
    """Note that ``folder`` is of the run with the fingerprint ``of``, to be read with its ``settings``.

    Raises :class:`GraphPruneError` when it is of another one.
    """
    path = folder / _NAME

    def note() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({"of": of, "settings": settings}, default=str, indent=1))

    once(path, note)
    if take(read_json(path), "of", str, str(path)) != of:
        raise GraphPruneError(
            f"{folder} is a run of another model, other data or other settings: give another folder, or delete it."
        )
