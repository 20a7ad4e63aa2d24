"""The readable result of ``graphprune.inspect``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from graphprune.folding import by_key, common_name, fold_groups, starred
from graphprune.ir.axes import find
from graphprune.ir.program import ComposedGroup, NodeGroup, Program, describe_dims

_SHOWN = 12  # members of a group that are listed


class Inspection:
    """The node groups of a traced model.

    Attributes:
        groups: every basic node group (:class:`graphprune.ir.program.NodeGroup`).
        composed: every composed node group (:class:`graphprune.ir.program.ComposedGroup`): a weight with its adapters.
        prunable: those that may lose indices, in the order of the model.
        skipped: name of every other group → why not.
        ragged: name of every group that may keep other indices under each index of another → name of that one.
        unruled: operator without a usable rule → the source lines it pinned.
    """

    def __init__(self, program: Program):
        self.program = program
        self.groups: list[NodeGroup] = program.need("groups")
        self.composed: list[ComposedGroup] = program.need("composed")
        self.prunable: list[NodeGroup] = program.need("prunable")
        self.skipped: dict[str, str] = program.need("skipped")
        self.ragged: dict[str, str] = program.need("ragged")
        self.unruled: dict[str, list[str]] = program.need("axes").unruled

    def dims(self, tensor: str) -> list[str]:
        """What each dimension of a parameter or buffer is made of, in names of groups."""
        axes = self.program.need("axes")
        return describe_dims(self.program, axes.tensors[axes.canonical[tensor]])

    def prunable_share(self) -> float:
        """Share of all parameters that lie on at least one prunable axis."""
        parameters = dict(self.program.model.named_parameters())
        on = {m.tensor for group in self.prunable for m in group.members if m.tensor in parameters}
        return sum(parameters[name].numel() for name in on) / sum(p.numel() for p in parameters.values())

    def pinned_by(self, operator: str) -> tuple[int, int]:
        """What an entry of ``unruled`` costs: parameters with a dimension that it pins, and those it alone pins.

        Each parameter counts with all its elements.
        """
        by_it: set[str] = set()
        by_it_alone: set[str] = set()
        for group in self.groups:
            mine = [pin for pin in find(group.axis).pins if pin.reason == f"operator {operator}"]
            if mine:
                tensors = {member.tensor for member in group.members}
                by_it |= tensors
                if len(mine) == len(group.pins):
                    by_it_alone |= tensors
        sizes = {name: p.numel() for name, p in self.program.model.named_parameters()}
        return sum(sizes.get(name, 0) for name in by_it), sum(sizes.get(name, 0) for name in by_it_alone)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with every group by itself."""
        prunable = {group.name for group in self.prunable}
        return {
            "class": type(self.program.model).__name__,
            "prunable_share": self.prunable_share(),
            "groups": [
                {
                    "name": group.name,
                    "size": group.size,
                    "prunable": group.name in prunable,
                    "reason": self.skipped.get(group.name),
                    "ragged_under": self.ragged.get(group.name),
                    "members": [str(member) for member in group.members],
                }
                for group in self.groups
            ],
            "composed": [asdict(one) for one in self.composed],
            "unruled": {
                name: dict(zip(("places", "pins", "pins_alone"), (places, *self.pinned_by(name)), strict=True))
                for name, places in self.unruled.items()
            },
        }

    def __str__(self) -> str:
        lines = [
            f"{type(self.program.model).__name__}: {len(self.groups)} node groups, {len(self.prunable)} prunable, "
            f"{self.prunable_share():.1%} of the parameters on prunable axes"
        ]
        lines += ["", "Prunable:", *self._folded(self.prunable, lambda group: "")]
        others = [group for group in self.groups if group.name in self.skipped]
        lines += ["", "Left alone:", *self._folded(others, lambda group: self.skipped[group.name])]
        if self.composed:
            lines += ["", "Composed, each with a rank that is never pruned:", *self._composed()]
        if self.unruled:
            lines += ["", "Operators without a rule, and what they pinned:"]
            cost = {name: self.pinned_by(name) for name in self.unruled}
            for name in sorted(cost, key=lambda name: cost[name], reverse=True):
                places = self.unruled[name]
                lines.append(
                    f"  {name}: {len(places)}×, first at {places[0]}; pins {cost[name][0]:,} parameters, "
                    f"{cost[name][1]:,} of them alone"
                )
        return "\n".join(lines)

    def _composed(self) -> list[str]:
        """A line for every kind of composed group, and one for the groups that it overlaps with."""
        sizes = {group.name: group.size for group in self.groups}
        lines = []
        for alike in by_key(self.composed, lambda one: (starred(one.module), *map(starred, one.tensors))):
            one, times = alike[0], f"  ×{len(alike)}" if len(alike) > 1 else ""
            inside = len(one.module) + 1
            parts = [
                f"{b[inside:]} · {a[inside:]} (rank {sizes[rank]})"
                for (a, b), rank in zip(one.factors, one.ranks, strict=True)
            ]
            named = {one.base, *(name for pair in one.factors for name in pair)}
            rest = [name[inside:] for name in one.tensors if name not in named]
            also = f", with {', '.join(rest)}" if rest else ""
            lines.append(
                f"  {common_name([c.module for c in alike])}{times}: {' + '.join([one.base[inside:], *parts])}{also}"
            )
            lines.append(f"      overlaps {', '.join(map(starred, one.overlaps))}")
        return lines

    def _folded(self, groups: list[NodeGroup], reason: Callable[[NodeGroup], str]) -> list[str]:
        """Groups that differ only in their block number are shown once, with a count."""
        lines = []
        ragged = self.program.ragged_axes()
        for fold in fold_groups(groups, reason):
            times = f"  ×{len(fold.groups)}" if len(fold.groups) > 1 else ""
            why = f"  [{fold.reason}]" if fold.reason else ""
            outer = ragged.get(find(fold.groups[0].axis))
            each = f" in each of {outer.size}" if outer is not None else ""
            lines.append(f"  {fold.name}  size {fold.size}{each}{times}{why}")
            lines += [f"      {member}" for member in fold.members[:_SHOWN]]
            if len(fold.members) > _SHOWN:
                lines.append(f"      … {len(fold.members) - _SHOWN} more")
        return lines
