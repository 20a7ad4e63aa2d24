"""A given plan, checked against this model."""

from __future__ import annotations

from graphprune.errors import GraphPruneError
from graphprune.ir.plan import Plan
from graphprune.ir.program import Program
from graphprune.passes.base import Pass, compiler_pass


def replay_plan(plan: Plan) -> Pass:
    """A pass that uses ``plan`` instead of scores.

    Raises :class:`GraphPruneError` when the plan was made for another architecture or touches a pinned axis.
    """

    @compiler_pass(requires=("groups",), ensures=("plan",))
    def replay_plan(program: Program) -> None:
        groups = {group.name: group for group in program.need("groups")}
        for name, size in plan.sizes.items():
            group = groups.get(name)
            if group is None or group.size != size:
                have = "does not exist" if group is None else f"has size {group.size}"
                raise GraphPruneError(
                    f"This plan is for another architecture: its axis {name!r} of size {size} {have} in "
                    f"{type(program.model).__name__}."
                )
            if group.pins:
                raise GraphPruneError(f"The plan prunes {name!r}, which is pinned here: {group.pins[0]}.")
            if len(plan.keep[name]) < group.minimum:
                raise GraphPruneError(
                    f"The plan keeps {len(plan.keep[name])} indices of {name!r}; {group.minimum} must stay, which is "
                    "how many a router chooses, or what its code needs."
                )
        program.plan = plan

    return replay_plan
