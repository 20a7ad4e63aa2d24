"""A given plan, checked against this model."""

from __future__ import annotations

from dataclasses import replace

from graphprune.errors import GraphPruneError
from graphprune.ir.plan import Plan
from graphprune.ir.program import Program
from graphprune.passes.base import Pass, compiler_pass
from graphprune.passes.find_ragged_axes import ragged_axes


def replay_plan(plan: Plan) -> Pass:
    """A pass that uses ``plan`` instead of scores.

    Raises :class:`GraphPruneError` when the plan was made for another architecture or touches a pinned axis.
    """

    @compiler_pass(requires=("groups",), ensures=("plan",))
    def replay_plan(program: Program) -> None:
        replace(plan)  # checks it again: its lists may have been changed since it was made
        groups = {group.name: group for group in program.need("groups")}
        ragged = program.ragged or (ragged_axes(program) if plan.under else {})
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
            if plan.widths()[name][1] < group.minimum:
                raise GraphPruneError(
                    f"The plan leaves {plan.widths()[name][1]} of {name!r}, of which at least {group.minimum} must "
                    "stay: as many as a router chooses, or as forward needs to do the same."
                )
            if group.size % group.multiple == 0 and plan.widths()[name][1] % group.multiple:
                raise GraphPruneError(
                    f"The plan leaves {plan.widths()[name][1]} of {name!r}, where a kernel only takes multiples of "
                    f"{group.multiple}."
                )
            if name in plan.under:
                _check_outer(program, ragged, plan, name)
        program.plan = plan

    return replay_plan


def _check_outer(program: Program, ragged: dict[str, str], plan: Plan, name: str) -> None:
    outer, rows = plan.under[name], len(plan.keep[name])
    possible = ragged.get(name)
    if possible != outer:
        here = "one choice for all" if possible is None else f"choices under {possible!r}"
        raise GraphPruneError(
            f"The plan chooses indices of {name!r} under each index of {outer!r}; in {type(program.model).__name__} "
            f"this axis has {here}."
        )
    size = next(group.size for group in program.need("groups") if group.name == outer)
    if rows != size:
        raise GraphPruneError(f"The plan has {rows} choices of {name!r}, but {outer!r} has {size} indices.")
