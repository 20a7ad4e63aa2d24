"""Checkpoints of a ``Trainer`` of which it is known whether they are whole.

It writes the files of a checkpoint one after the other, in their place. A mark that is written last tells a whole one
from what a process that was killed left behind.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from graphprune.io.atomic import replace_file

_MARK = "whole.json"


class Checkpoints(TrainerCallback):
    """Has checkpoints written every so many steps, and marks each when all of it is written."""

    def __init__(self, steps: int = 0):
        """``steps``: besides those after every round; 0 for none."""
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._steps and state.global_step % self._steps == 0:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes its own random state
        if state.is_world_process_zero:
            mark(Path(args.output_dir, f"checkpoint-{state.global_step}"))


def mark(checkpoint: Path) -> None:
    """Say that all files of a checkpoint are there, with their sizes."""
    replace_file(checkpoint / _MARK, json.dumps(_sizes(checkpoint)))


def last_whole(folder: Path) -> Path | None:
    """The latest checkpoint that is whole; those that are not are removed."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if step is None:
            continue
        if _is_whole(path):
            found[int(step[1])] = path
        else:
            shutil.rmtree(path)
    return found[max(found)] if found else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        return json.loads((checkpoint / _MARK).read_text(encoding="utf-8")) == _sizes(checkpoint)
    except (OSError, ValueError):
        return False


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != _MARK)
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in sorted(files)}
