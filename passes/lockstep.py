"""Several runs of one program that wait for each other at meeting points.

Layer-wise methods need what a matrix sees over *all* calibration data before the first of the data goes on through the
pruned matrix. Running every batch in a thread of its own, one thread at a time, does that for any model: each runs
until it meets a matrix, waits there until all others have, and goes on. No block has to be known, run twice, or stored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


class Aborted(BaseException):
    """Raised in a run when another one failed. Not an Exception, so that a model's own handlers let it through."""


@dataclass
class _Run:
    thread: threading.Thread
    go_on: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    point: int | None = None  # where it waits; None while it runs and after it has ended
    ended: bool = False


class Lockstep:
    """Runs ``work(item)`` for every item; inside, :meth:`wait` is where the runs meet.

    Only one run, or ``meet``, is active at any time, always in the same order, so results do not depend on timing.
    """

    def __init__(self, work: Callable[[Any], None], meet: Callable[[int], None]):
        """``meet(point)`` is called once all runs wait or have ended, for the smallest point that one waits at."""
        self._work = work
        self._meet = meet
        self._runs: list[_Run] = []
        self._back = threading.Semaphore(0)
        self._local = threading.local()
        self._error: BaseException | None = None

    def run(self, items: Sequence[Any]) -> None:
        """Raises what the first run that failed raised, or what ``meet`` raised; all runs have ended then."""
        try:
            for item in items:
                self._start(item)
            while waiting := [run.point for run in self._runs if run.point is not None]:
                point = min(waiting)
                self._meet(point)
                for run in self._runs:
                    if run.point == point:
                        self._resume(run)
        except BaseException as error:
            self._error = self._error or error
            raise
        finally:
            for run in self._runs:
                while not run.ended:  # only after an error: it is told so where it waits
                    self._resume(run, fail=False)

    def wait(self, point: int) -> None:
        """Wait until every run waits at ``point`` or a later one, or has ended. Called from inside ``work``."""
        run: _Run = self._local.run
        run.point = point
        self._back.release()
        run.go_on.acquire()
        if self._error is not None:
            raise Aborted

    def _start(self, item: Any) -> None:
        run = _Run(threading.Thread(target=lambda: self._body(run, item), daemon=True))
        self._runs.append(run)
        run.thread.start()
        self._resume(run)

    def _resume(self, run: _Run, fail: bool = True) -> None:
        run.point = None
        run.go_on.release()
        self._back.acquire()
        if fail and self._error is not None:
            raise self._error

    def _body(self, run: _Run, item: Any) -> None:
        self._local.run = run
        run.go_on.acquire()
        try:
            if self._error is None:
                self._work(item)
        except Aborted:
            pass
        except BaseException as error:  # noqa: BLE001  (raised again where all runs are waited for)
            self._error = self._error or error
        finally:
            run.ended = True
            self._back.release()
