"""The pass interface: a named function ``Program → None`` that says what it requires and what it ensures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.ir.program import Program
from graphprune.trace.quiet import collected_later


@dataclass(frozen=True)
class Pass:
    """One compiler pass: a function ``run`` on a :class:`Program` and a ``name`` to report it by.

    ``requires`` and ``ensures`` are names of :class:`Program` fields: all required ones are set before ``run``, all
    ensured ones after it. One of ``analysis`` makes many small objects that stay, and none that is large: Python's
    garbage collector, for which every one is one more to search, rests meanwhile.
    ``prepare``, if there is one, gives the model to trace in place of the user's: one with adapters to train.
    """

    name: str
    run: Callable[[Program], None]
    requires: tuple[str, ...]
    ensures: tuple[str, ...]
    analysis: bool = False
    prepare: Callable[[nn.Module], nn.Module] | None = None

    def __call__(self, program: Program) -> None:
        self.run(program)


def compiler_pass(
    *, requires: Sequence[str] = (), ensures: Sequence[str] = (), analysis: bool = False
) -> Callable[..., Pass]:
    """Make a pass of a function; its name is the function's.

    ``requires``, ``ensures`` and ``analysis`` are those of :class:`Pass`.
    """

    def make(function: Callable[[Program], None]) -> Pass:
        return Pass(function.__name__, function, tuple(requires), tuple(ensures), analysis)

    return make


def run_passes(program: Program, passes: Sequence[Pass]) -> dict[str, float]:
    """Run ``passes`` on ``program`` in order; returns the seconds each took.

    Raises :class:`GraphPruneError` naming the pass, and those before it, when one lacks what it requires or does not
    give what it ensures. Errors of the user pass through as they are; any other error is a bug and says where.
    """
    seconds: dict[str, float] = {}
    for step in passes:
        done = ", ".join(seconds) or "none"
        for name in step.requires:
            if getattr(program, name) is None:
                raise GraphPruneError(f"Pass {step.name} requires {name}, which no pass before it made ({done}).")
        program.say(step.name)
        start = time.perf_counter()
        try:
            with collected_later() if step.analysis else nullcontext():
                step(program)
        except GraphPruneError:
            raise
        except Exception as error:
            raise GraphPruneError(
                f"Pass {step.name} failed on {type(program.model).__name__} (passes before it: {done}). "
                f"{type(error).__name__}: {error}. This is a bug in graphprune; the model is unchanged."
            ) from error
        for name in step.ensures:
            if getattr(program, name) is None:
                raise GraphPruneError(f"Pass {step.name} promised {name} and did not make it (passes before: {done}).")
        seconds[step.name] = time.perf_counter() - start
    return seconds
