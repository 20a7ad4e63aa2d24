"""A folder or a file is complete or it is not there."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphprune.errors import GraphPruneError
from graphprune.io.leftovers import partial_folder


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that becomes ``target`` when the block ends without an error.

    Whatever goes wrong, the temporary folder is removed and ``target`` is not made. What a killed process left of an
    earlier try is removed, too.

    Raises:
        GraphPruneError: when there is something at ``target`` already.
    """
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the rename stays on one file system; not tempfile.mkdtemp, whose folders only the owner reads.
    with partial_folder(target) as partial:
        try:
            yield partial
            publish(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def publish(partial: Path, target: Path) -> None:
    """Rename a complete folder to ``target``, on the disk too. Raises OSError, GraphPruneError."""
    for folder, _, files in os.walk(partial):
        for name in files:
            _flush(Path(folder, name))
        _flush(Path(folder))
    refuse_existing(target)  # os.rename would replace an empty folder made meanwhile
    os.rename(partial, target)
    _flush(target.parent)


def refuse_existing(target: Path) -> None:
    """Raise :class:`GraphPruneError` when there is something at ``target``."""
    if os.path.lexists(target):
        raise GraphPruneError(f"{target} exists already and is left as it is: give a folder that does not exist yet.")


def _flush(path: Path) -> None:
    """Have the system write a file or folder to the disk, so that a crash after the rename loses nothing."""
    if path.is_dir() and os.name != "posix":
        return  # folders can only be opened on POSIX
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(target: Path, text: str) -> None:
    """Write a text file that has all of ``text`` or, whatever goes wrong, is as it was. Raises OSError."""
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
