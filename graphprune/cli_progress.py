"""What a command says on stderr while it works: a bar with the time left on a terminal, lines when piped."""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console

Say = Callable[[str], None]

_COUNT = re.compile(r"(\d[\d.,]*) of (\d[\d.,]*)")
_EVERY = 10.0  # seconds between two lines


class _Said(NamedTuple):
    """A text and the count in it, such as "training: step 3 of 40, loss 2.1"; ``total`` is None where there is none."""

    text: str
    stage: str
    done: float
    total: float | None


def _read(text: str) -> _Said:
    counts = list(_COUNT.finditer(text))
    if not counts:
        return _Said(text, text, 0.0, None)
    done, total = (float(number.rstrip(".,").replace(",", "")) for number in counts[-1].groups())
    return _Said(text, text[: counts[-1].start()].rstrip(": "), done, total)


@contextmanager
def progress(options: argparse.Namespace, *, keep: bool = False) -> Iterator[Say]:
    """A function to tell what is being done, as ``--log-level`` says.

    With ``keep`` there is a line for every stage, on the terminal too: for runs of hours.
    """
    if options.log_level in ("error", "warning"):
        yield lambda text: None
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if console.is_terminal and options.log_level == "info":
        with _bar(console, keep) as say:
            yield say
    else:
        yield _Lines(console, _EVERY if options.log_level == "info" else 0.0, keep)


class _Lines:
    """Prints what it is told, with the minutes so far, and not too often: with ``keep`` every stage, else some."""

    def __init__(self, console: Console, every: float, keep: bool):
        self._console, self._every, self._keep = console, every, keep
        self._start, self._stage, self._last = time.monotonic(), "", -math.inf

    def __call__(self, text: str) -> None:
        said, now = _read(text), time.monotonic()
        counts = said.total is not None and said.done < said.total and said.stage == self._stage
        if now - self._last < self._every and (counts or not self._keep):
            return
        self._stage, self._last = said.stage, now
        self._console.print(_timed(text, now - self._start), markup=False)


@contextmanager
def _bar(console: Console, keep: bool) -> Iterator[Say]:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    start, stage = time.monotonic(), ""
    what = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), what, BarColumn(20), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def say(text: str) -> None:
            nonlocal stage
            said = _read(text)
            if said.stage != stage:
                stage = said.stage
                bar.reset(task, total=said.total)
                if keep:
                    bar.console.print(_timed(text, time.monotonic() - start), markup=False)
            bar.update(task, description=text, completed=said.done)

        yield say


def _timed(text: str, seconds: float) -> str:
    return f"{seconds / 60:6.1f} min  {text}"
