"""The passes that make a plan, so that an interrupted run goes on: the plan is kept, or what came of it is known."""

from __future__ import annotations

import json
from contextlib import ExitStack, closing

from graphprune.io.fingerprint import fingerprint, of_batches
from graphprune.ir.plan import Plan
from graphprune.ir.program import Program
from graphprune.ir.score_spread import ScoreSpread, score_spreads
from graphprune.passes.base import Pass, run_passes
from graphprune.streaming.partial import Partial
from graphprune.streaming.spill import Spill
from graphprune.trace.skeleton import names
from graphprune.trace.stored import stored_of


def kept_plan(how: tuple[Pass, ...], partial: Partial, stack: ExitStack) -> Pass:
    """A pass that runs ``how``, or takes the plan that an earlier run of it left in ``partial``.

    Where weights change as well, ``how`` runs anew, and what was written before counts if the same comes of it. Changed
    weights are on disk until ``stack`` closes.
    """

    def run(program: Program) -> None:
        kept = partial.plan()
        if kept is not None:
            program.plan = Plan.from_dict(kept["plan"])
            program.skipped = kept["skipped"]
            program.spreads = {name: ScoreSpread(*map(tuple, pair)) for name, pair in kept["spreads"].items()}
            program.prunable = [group for group in program.need("prunable") if group.name in kept["prunable"]]
            return
        program.spill = spill = stack.enter_context(closing(Spill(partial.scratch)))
        run_passes(program, how)
        program.spreads = score_spreads(program)
        found = {
            "plan": program.need("plan").to_dict(),
            "skipped": program.need("skipped"),
            "prunable": [group.name for group in program.need("prunable")],
            "spreads": {name: (one.kept, one.removed) for name, one in program.spreads.items()},
        }
        partial.agree(fingerprint(json.dumps(found, sort_keys=True), spill.fingerprint, _changed(program)))
        if not program.updates and not program.new_biases:
            partial.keep_plan(found)

    return Pass("plan", run, requires=("prunable",), ensures=("plan",))


def _changed(program: Program) -> str:
    """A fingerprint of new values that are in memory."""
    held = {id(tensor): name for name, tensor in names(program.model).items()}
    updates = {held[key]: value for key, value in program.updates.items() if stored_of(value) is None}
    return of_batches([updates, program.new_biases])
