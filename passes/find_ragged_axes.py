"""Which axes may keep different indices per index of another: *ragged* axes.

The channels of a head need not be the same channels in every head. In general an axis ``L`` may choose its indices per
index ``h`` of an axis ``H`` when every computation with ``L`` is one by itself for every ``h``, that is

1. every tensor with ``L`` has ``H`` too, each once at every position: no value of ``L`` speaks for several ``h``. What
   is shared by all heads (cos and sin of rotary positions, the weight of a norm over a head) is a tensor with ``L`` and
   without ``H``;
2. no operator that sees ``L`` pinned ``H`` itself: a rule pins what an operator does not treat index by index (softmax,
   cumsum, roll, gather). Pins from elsewhere, such as a lookup by index, do no harm: the indices of ``H`` all stay;
3. no operator sums ``H`` away while ``L`` stays;
4. no operator that sees ``L`` meets one ``h`` with another, so that its output has ``H`` twice, as ``q @ k.T`` over
   the heads themselves has.

By 2 to 4 every operator maps what is under ``h`` to what is under ``h``, and by 1 nothing else knows ``L``: renumbering
``L`` under one ``h`` is then as free as renumbering all of it. The counts stay equal, so all sizes are as without it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx

from graphprune.ir.axes import Axis, find, leaves
from graphprune.ir.program import AxisMap, NodeGroup, Program
from graphprune.passes.base import compiler_pass
from graphprune.rules.registry import Dims

Leaves = set[Axis]


@compiler_pass(requires=("groups", "axes"), ensures=("ragged",), analysis=True)
def find_ragged_axes(program: Program) -> None:
    """Group → the group that it is ragged under, when inner axes are to be pruned; nothing otherwise."""
    program.ragged = ragged_axes(program) if program.options.inner_axes else {}


def ragged_axes(program: Program) -> dict[str, str]:
    """Group → the group that it is ragged under: of several that qualify, the one with the most indices.

    Where two could be ragged under each other, the later one in the order of the parameters is, so there are no cycles.
    """
    axes: AxisMap = program.need("axes")
    groups: dict[Axis, NodeGroup] = {find(group.axis): group for group in program.need("groups")}
    free = {leaf for leaf, group in groups.items() if group.size > 1 and not group.pins}
    found = _Candidates(axes, free, set(groups))
    for dims in axes.tensors.values():
        found.see_value(dims)
    for node in axes.values:
        found.see_node(node)
    outer: dict[Axis, Axis] = {}
    for leaf in reversed(groups):
        possible = found.above.get(leaf, set())
        fitting = [axis for axis in groups if axis in possible and not _is_below(axis, leaf, outer)]
        if fitting:
            outer[leaf] = max(fitting, key=lambda axis: axis.size)
    return {group.name: groups[outer[leaf]].name for leaf, group in groups.items() if leaf in outer}


def _is_below(axis: Axis, other: Axis, outer: dict[Axis, Axis]) -> bool:
    while axis in outer:
        axis = outer[axis]
        if axis is other:
            return True
    return False


class _Candidates:
    """``above[L]``: the axes that ``L`` may be ragged under, as far as what was seen allows."""

    def __init__(self, axes: AxisMap, wanted: Leaves, possible: Leaves):
        self.above = {leaf: {h for h in possible if h is not leaf and h.size > 1} for leaf in wanted}
        self._values = axes.values
        self._terms: dict[Axis, list[Counter[Axis]]] = {}
        self._held: dict[fx.Node, Leaves] = {}
        self._summed: dict[fx.Node, Leaves] = {}
        for node, axis in axes.facts.held:
            self._held.setdefault(node, set()).update(leaves(axis))
        for contraction in axes.facts.contractions:
            dims = axes.values[contraction.operand]
            summed = contraction.factor or dims[contraction.dim]
            self._summed.setdefault(contraction.node, set()).update(leaves(summed))

    def see_value(self, dims: Dims) -> None:
        """Condition 1."""
        below = [set(leaves(axis)) for axis in dims]
        for place, axis in enumerate(dims):
            for leaf in below[place] & self.above.keys():
                others = [i for i in range(len(dims)) if i != place]
                mine = [term for term in self.terms(axis) if leaf in term]
                if any(term[leaf] > 1 for term in mine) or any(leaf in below[i] for i in others):
                    self.above[leaf].clear()
                    continue
                together = set.intersection(*({h for h in term if term[h] == 1} for term in mine))
                together -= {h for i in others for h in below[i]}
                apart = {h for i in others for h in self._everywhere(dims[i]) if self._is_only_in(h, below, i)}
                self.above[leaf] &= together | apart

    def see_node(self, node: fx.Node) -> None:
        """Condition 1 for its outputs, and conditions 2 to 4."""
        outputs = list(_every_dims(self._values[node]))
        for dims in outputs:
            self.see_value(dims)
        if node.op != "call_function":
            return
        inputs = [dims for source in node.all_input_nodes for dims in _every_dims(self._values[source])]
        made = _leaves_of(outputs)
        seen = (made | _leaves_of(inputs)) & self.above.keys()
        if not seen:
            return
        mixed = self._held.get(node, set()) | {h for dims in outputs for h in self._repeated(dims)}
        for leaf in seen:
            if leaf in mixed:  # not pinned, so a statistic over it: it has one number of indices, and one choice
                self.above[leaf].clear()
            self.above[leaf] -= mixed
            if leaf in made:
                self.above[leaf] -= self._summed.get(node, set())

    def terms(self, axis: Axis) -> list[Counter[Axis]]:
        """The leaves at every kind of position of ``axis``: ``a·(b + c)`` has positions of a and b, and of a and c."""
        axis = find(axis)
        if axis in self._terms:
            return self._terms[axis]
        if axis.kind == "leaf":
            out = [Counter([axis] if axis.size > 1 else [])]
        elif axis.kind == "concat":
            out = [term for part in axis.parts for term in self.terms(part)]
        else:
            out = [Counter()]
            for part in axis.parts:
                out = [a + b for a in out for b in self.terms(part)]
        self._terms[axis] = list({frozenset(term.items()): term for term in out}.values())
        return self._terms[axis]

    def _everywhere(self, axis: Axis) -> Leaves:
        """What occurs exactly once at every position."""
        return set.intersection(*({h for h in term if term[h] == 1} for term in self.terms(axis)))

    @staticmethod
    def _is_only_in(leaf: Axis, below: list[Leaves], place: int) -> bool:
        return not any(leaf in others for i, others in enumerate(below) if i != place)

    def _repeated(self, dims: Dims) -> Leaves:
        seen: Counter[Axis] = Counter()
        for axis in dims:
            most: Counter[Axis] = Counter()
            for term in self.terms(axis):
                most |= term
            seen += most
        return {leaf for leaf, count in seen.items() if count > 1}


def _every_dims(dims: Any) -> Iterator[Dims]:
    if isinstance(dims, list):
        for one in dims:
            yield from _every_dims(one)
    elif dims is not None:
        yield dims


def _leaves_of(many: Iterable[Dims]) -> Leaves:
    return {leaf for dims in many for axis in dims for leaf in leaves(axis)}
