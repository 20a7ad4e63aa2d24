"""Several runs of one program that wait for each other at meeting points.

Layer-wise methods need what a matrix sees over *all* calibration data before the first of the data goes on through the
pruned matrix. Running every batch in a thread of its own, one thread at a time, does that for any model: each runs
until it meets a matrix, waits there until all others have, and goes on. No block has to be known, run twice, or stored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any


class Aborted(BaseException):
    """Raised in a run when another one failed. Not an Exception, so that a model's own handlers let it through."""


@dataclass
class _Run:
    go_on: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    point: int | None = None  # where it waits; None while it runs and after it has ended
    ended: bool = False
    outcome: Future[None] | None = None


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
        self._failed = False

    def run(self, items: Sequence[Any]) -> None:
        """Raises what the first run that failed raised, or what ``meet`` raised; all runs have ended then."""
        with ThreadPoolExecutor(max(1, len(items))) as threads:
            try:
                for item in items:
                    run = _Run()
                    self._runs.append(run)
                    run.outcome = threads.submit(self._body, run, item)
                    self._resume(run)
                while waiting := [run.point for run in self._runs if run.point is not None]:
                    point = min(waiting)
                    self._meet(point)
                    for run in self._runs:
                        if run.point == point:
                            self._resume(run)
            except BaseException:
                self._failed = True
                raise
            finally:
                for run in self._runs:
                    while not run.ended:  # only after a failure: it is told so where it waits
                        run.go_on.release()
                        self._back.acquire()

    def wait(self, point: int) -> None:
        """Wait until every run waits at ``point`` or a later one, or has ended. Called from inside ``work``."""
        run: _Run = self._local.run
        run.point = point
        self._back.release()
        run.go_on.acquire()
        if self._failed:
            raise Aborted

    def _resume(self, run: _Run) -> None:
        run.point = None
        run.go_on.release()
        self._back.acquire()
        if run.ended and run.outcome is not None:
            run.outcome.result()  # raises what the run raised

    def _body(self, run: _Run, item: Any) -> None:
        self._local.run = run
        run.go_on.acquire()
        try:
            if not self._failed:
                self._work(item)
        finally:
            run.ended = True
            self._back.release()
