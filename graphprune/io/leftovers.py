"""Partial folders: each locked by the process that fills it, so that what a killed one left behind can be told."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not POSIX: nothing can be told, so leftovers stay
    fcntl = None  # type: ignore[assignment]

# A lock is only believed by the machine that took it: some network file systems do not pass locks on.
_HOST = hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """An empty folder ``.NAME.….partial`` beside ``target``, this process's own for as long as the block runs.

    Those that processes of this machine left for the same target when they were killed are removed first. The folder
    itself is not: it is renamed by then, or removed by the caller. Raises OSError.
    """
    _remove_leftovers(target)
    lock = None
    while lock is None:
        partial = target.parent / f".{target.name}.{_HOST}{secrets.token_hex(4)}.partial"
        partial.mkdir()
        lock = _lock(partial)
    try:
        yield partial
    finally:
        if lock >= 0:
            os.close(lock)


def _remove_leftovers(target: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{_HOST}[0-9a-f]{{8}}\.partial")
    for path in target.parent.iterdir():
        if fcntl is None or not pattern.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        with suppress(OSError):  # another process removes it too, or may not be disturbed
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _lock(partial: Path) -> int | None:
    """A descriptor that holds the lock; -1 where there are none; None when another process took it for a leftover.

    That one may have come between making and locking.
    """
    if fcntl is None:
        return -1
    try:
        lock = os.open(partial, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:  # the file system has no locks, so nobody can take it for a leftover
        return lock
    if os.fstat(lock).st_nlink == 0:
        os.close(lock)
        return None
    return lock
