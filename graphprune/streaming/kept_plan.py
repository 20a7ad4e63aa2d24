"""The passes that make a plan, of which what comes is kept: an interrupted run need not score again."""

from __future__ import annotations

from graphprune.ir.plan import Plan
from graphprune.ir.program import Program
from graphprune.passes.base import Pass, run_passes
from graphprune.streaming.partial import Partial


def kept_plan(how: tuple[Pass, ...], partial: Partial) -> Pass:
    """A pass that runs ``how``, or takes the plan that an earlier run of it left in ``partial``."""

    def run(program: Program) -> None:
        kept = partial.plan()
        if kept is not None:
            program.plan = Plan.from_dict(kept["plan"])
            program.skipped = kept["skipped"]
            program.prunable = [group for group in program.need("prunable") if group.name in kept["prunable"]]
            return
        run_passes(program, how)
        plan: Plan = program.need("plan")
        partial.keep_plan(
            {
                "plan": plan.to_dict(),
                "skipped": program.need("skipped"),
                "prunable": [group.name for group in program.need("prunable")],
            }
        )

    return Pass("plan", run, requires=("prunable",), ensures=("plan",))
