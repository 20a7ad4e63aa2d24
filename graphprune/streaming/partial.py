"""A folder in the making that survives its process: what is finished in it stays, and the same command goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graphprune.errors import GraphPruneError
from graphprune.io.atomic import publish, refuse_existing, replace_file
from graphprune.io.checked_json import of_kind, read_json, take
from graphprune.io.manifest import StoredFile
from graphprune.io.weight_files import fingerprint

_STATE, _PLAN, _SCRATCH = ".finished.json", ".plan.json", ".scratch"


class Partial:
    """The folder ``path`` beside its target, and what is finished in it.

    ``key`` is a fingerprint of the command and of all that it reads: it is part of the name of the folder, so that no
    other command finds it.
    """

    def __init__(self, target: Path, key: str):
        self.target, self.path = target, target.parent / f".{target.name}.{key[:16]}.partial"
        self._key = key
        self._finished: dict[str, StoredFile] = {}
        self._outcome: str | None = None

    @property
    def scratch(self) -> Path:
        """A folder, not made yet, for what is only needed until all is written."""
        return self.path / _SCRATCH

    def take_up(self) -> None:
        """Find out what is finished, and remove all else. Raises OSError."""
        if (self.path / _STATE).is_file():
            with suppress(GraphPruneError):  # the disk lost it: all is made anew
                self._outcome, self._finished = self._read()
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (_STATE, _PLAN, *self._finished):
                path.unlink()

    def _read(self) -> tuple[str | None, dict[str, StoredFile]]:
        where = str(self.path / _STATE)
        data = read_json(self.path / _STATE)
        if take(data, "key", str, where) != self._key:
            raise GraphPruneError(f"{where} is of another command.")
        found = {}
        for name, item in take(data, "files", dict, where).items():
            of_kind(item, dict, where)
            found[name] = StoredFile(take(item, "bytes", int, where), take(item, "sha256", str, where))
        return take(data, "outcome", (str, type(None)), where), found

    def agree(self, outcome: str) -> None:
        """What is to be written, as a fingerprint: what an earlier run finished of anything else does not count."""
        if outcome != self._outcome:
            self._finished.clear()
        self._outcome = outcome

    def finished(self, file: Path) -> StoredFile | None:
        """A file that an earlier run finished, exactly as it was then; None where it has to be written."""
        known = self._finished.get(file.name)
        if known is None or not file.is_file() or file.stat().st_size != known.bytes:
            return None
        return known if fingerprint(file) == known else None

    def finish(self, name: str, file: StoredFile) -> None:
        """Note that a file is complete. Raises OSError."""
        self._finished[name] = file
        files = {name: asdict(file) for name, file in self._finished.items()}
        replace_file(self.path / _STATE, json.dumps({"key": self._key, "outcome": self._outcome, "files": files}))

    def plan(self) -> dict[str, Any] | None:
        """What :meth:`keep_plan` noted in an earlier run."""
        path = self.path / _PLAN
        if not path.is_file():
            return None
        try:
            return take(read_json(path), self._key, dict, str(path))
        except GraphPruneError:  # the disk lost it
            return None

    def keep_plan(self, plan: dict[str, Any]) -> None:
        """Note what is to be done, so that it need not be found out again. Raises OSError."""
        replace_file(self.path / _PLAN, json.dumps({self._key: plan}))

    def publish(self) -> None:
        """Make it the target. Raises OSError."""
        for name in (_STATE, _PLAN):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        publish(self.path, self.target)


@contextmanager
def partial_folder(target: Path, key: str) -> Iterator[Partial]:
    """A :class:`Partial` that is the target when the block ends without an error, and else is there for the next run.

    A :class:`GraphPruneError` removes it, unless the system caused it: that goes no better the next time.

    Raises:
        GraphPruneError: when there is something at ``target`` already, or another process is at it.
    """
    refuse_existing(target)
    partial = Partial(target, key)
    partial.path.mkdir(parents=True, exist_ok=True)
    with _alone(partial.path):
        try:
            partial.take_up()
            yield partial
            partial.publish()
        except GraphPruneError as error:
            if not isinstance(error.__cause__, OSError):
                shutil.rmtree(partial.path, ignore_errors=True)
            raise


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuse to be the second process in ``folder``. The lock goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GraphPruneError(f"Another process is writing {folder}: wait until it is done.") from None
        yield
    finally:
        os.close(descriptor)
