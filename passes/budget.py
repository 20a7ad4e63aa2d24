"""How many structures of every axis go, when the next one to go is always the cheapest that a key names.

With ``deploy`` groups move in lockstep: the structures of a *class* of groups, one of each in a step, count as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from heapq import heapify, heappop, heappush

import numpy as np
import torch

from graphprune.deploy.solve import can_say
from graphprune.errors import GraphPruneError
from graphprune.ir.axes import Axis, find, inner_width, leaves
from graphprune.ir.order import longest_prefix
from graphprune.ir.program import NodeGroup, Program
from graphprune.ir.sizes import Polynomial

# Name of a group → key of its first structure to go, of the next, …: float64 of shape (size,), never falling.
Keys = dict[str, torch.Tensor]
Class = dict[str, int]  # name of a group → how many of its indices go in one step

_FAR = 256  # blocks of a class to look through for a count that can be said


def fill_budget(program: Program, keys: Keys) -> dict[str, int]:
    """Name → number of indices to remove, reaching ``ratio`` of all parameters to within one structure.

    Structures go in the order of their keys over all groups; ties keep the order of the model. What must stay of an
    axis stays, and widths stay multiples of ``round_to``.

    Raises :class:`GraphPruneError` saying how far it can go, and what pins the rest, when that is not enough.
    """
    assert program.options.ratio is not None
    counter = ParameterCounter(program)
    blocks = _Blocks(program, keys)
    wanted = program.options.ratio * counter.total
    reachable = counter.total - counter.count(blocks.most())
    if reachable < wanted:
        raise _unreachable(program, reachable / counter.total)
    taken = _fill(counter, blocks, wanted, {})
    if program.classes is None:
        return blocks.removed(taken)
    return _settle(program, counter, blocks, wanted, taken)


def check_reachable(program: Program) -> None:
    """Raises :class:`GraphPruneError` as :func:`fill_budget` does when not even all that may go is enough."""
    groups = {group.name: group for group in program.need("prunable")}
    counter = ParameterCounter(program)
    most: dict[str, int] = {}
    for one in _classes(program, groups):
        if found := _steps_together(one, groups, program):
            most |= {name: rate * found[-1] for name, rate in one.items()}
    reachable = 1 - counter.count(most) / counter.total
    if program.options.ratio is not None and reachable < program.options.ratio:
        raise _unreachable(program, reachable)


class ParameterCounter:
    """How many parameters are left when so many indices of each group are gone; tied ones count once.

    Adapters that will be merged do not count.
    """

    def __init__(self, program: Program):
        axes = program.need("axes")
        groups = {find(group.axis): group.name for group in program.need("prunable")}
        self.fixed = 0
        self.shrinking = Polynomial({})  # the sum of all that shrink
        sizes: dict[Axis, Polynomial] = {}
        for name in {axes.canonical[name] for name, _ in program.model.named_parameters()} - _merged_away(program):
            dims = [find(axis) for axis in axes.tensors[name]]
            if any(leaf in groups for axis in dims for leaf in leaves(axis)):
                size = Polynomial.constant(1)
                for axis in dims:
                    if axis not in sizes:
                        sizes[axis] = Polynomial.of(axis)
                    size = size * sizes[axis]
                self.shrinking.add(size)
            else:
                self.fixed += math.prod(axis.size for axis in dims)
        self.names = groups
        self._of_group: dict[str, Polynomial] = {name: Polynomial({}) for name in groups.values()}
        for monomial, factor in self.shrinking.terms.items():
            for leaf in {leaf for leaf in monomial if leaf in groups}:
                self._of_group[groups[leaf]].terms[monomial] = factor
        self.total = self.count({})

    def count(self, removed: dict[str, int]) -> int:
        return self.fixed + self.shrinking.value(self._sizes(removed))

    def cost(self, more: dict[str, int], removed: dict[str, int]) -> int:
        """Parameters that so many more indices of each group would take."""
        touched = self._of_group[next(iter(more))]
        if len(more) > 1:  # a term that several have is the same in each
            touched = Polynomial({term: n for name in more for term, n in self._of_group[name].terms.items()})
        return touched.value(self._sizes(removed)) - touched.value(self._sizes(_with(removed, more)))

    def _sizes(self, removed: dict[str, int]) -> Callable[[Axis], int]:
        def size(axis: Axis) -> int:
            return axis.size - removed.get(self.names.get(axis, ""), 0)

        return size


def _merged_away(program: Program) -> set[str]:
    """The parameters that are there no more when adapters have been merged."""
    composed = program.composed if program.options.merge and program.composed else []
    canonical = program.need("axes").canonical
    return {canonical[name] for one in composed for name in set(one.tensors) - {one.base} if "base_layer" not in name}


class _Blocks:
    """The structures of every class of groups as blocks that go together, so that widths stay multiples.

    ``keys`` has, for every class, the key of each of its blocks: that of the last structure in it, over the groups of
    the class on average.
    """

    def __init__(self, program: Program, keys: Keys):
        groups = {group.name: group for group in program.need("prunable")}
        self.classes = _classes(program, keys)
        self.steps = [_steps_together(one, groups, program) for one in self.classes]
        self.keys = []
        for one, steps in zip(self.classes, self.steps, strict=True):
            ends = np.arange(steps.start, steps.stop, steps.step) if isinstance(steps, range) else np.array(steps, int)
            each = [keys[name].numpy()[rate * ends - 1] for name, rate in one.items()]
            self.keys.append(each[0] if len(each) == 1 else np.mean(each, axis=0))

    def removed(self, taken: Sequence[int]) -> dict[str, int]:
        """Indices removed per group by so many blocks of each class."""
        found = zip(self.classes, self.steps, taken, strict=True)
        return {name: rate * steps[n - 1] for one, steps, n in found if n for name, rate in one.items()}

    def next(self, place: int, taken: int) -> dict[str, int]:
        """Indices per group in the block of a class that comes after so many."""
        steps = self.steps[place]
        count = steps[taken] - (steps[taken - 1] if taken else 0)
        return {name: rate * count for name, rate in self.classes[place].items()}

    def most(self) -> dict[str, int]:
        return self.removed([len(keys) for keys in self.keys])


def _classes(program: Program, names: Iterable[str]) -> list[Class]:
    """What moves in lockstep: single groups, or the classes all of whose groups are among ``names``."""
    names = list(names)
    if program.classes is None:
        return [{name: 1} for name in names]
    whole = [one for one in program.classes if one.keys() <= set(names)]
    moving = {name for one in whole for name in one}
    for name in names:
        if name not in moving:
            program.need("skipped")[name] = "what must shrink together with it (deploy='transformers') is left alone"
    return whole


def _steps_together(one: Class, groups: dict[str, NodeGroup], program: Program) -> Sequence[int]:
    """How many steps of a class may be gone: those after which every group has a size that it may have."""
    if len(one) == 1 and set(one.values()) == {1}:
        return _steps(groups[next(iter(one))], program)
    allowed = [(rate, _steps(groups[name], program)) for name, rate in one.items()]
    longest = max((steps[-1] // rate for rate, steps in allowed if steps), default=0)
    return [step for step in range(1, longest + 1) if all(rate * step in steps for rate, steps in allowed)]


def _steps(group: NodeGroup, program: Program) -> range:
    """How many indices may be gone: every count that leaves the minimum, and widths in multiples of ``round_to``.

    Kernels may want multiples of their own. An axis that is a factor of a wider dimension (heads of 64) needs multiples
    of less.
    """
    unit, round_to = group.multiple, program.options.round_to
    tensors = program.need("axes").tensors
    for member in group.members if round_to > 1 else ():
        inner = inner_width(tensors[member.tensor][member.dim], find(group.axis))
        unit = math.lcm(unit, round_to // math.gcd(round_to, inner))
    return range(group.size % unit or unit, group.size - max(group.minimum, group.careful) + 1, unit)


def _with(removed: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return {**removed, **{name: removed.get(name, 0) + count for name, count in more.items()}}


def _fill(counter: ParameterCounter, blocks: _Blocks, wanted: float, fixed: dict[int, int]) -> list[int]:
    """The blocks of the smallest keys that remove no more than ``wanted``, and then every one that still fits.

    Returns how many of each class; of those in ``fixed``, by their places, as many as it says.
    """
    free = [keys[:0] if place in fixed else keys for place, keys in enumerate(blocks.keys)]

    def all_of(taken: Sequence[int]) -> list[int]:
        return [fixed.get(place, count) for place, count in enumerate(taken)]

    first = longest_prefix(free, lambda few: counter.total - counter.count(blocks.removed(all_of(few))) <= wanted)
    taken = all_of(first)
    removed = blocks.removed(taken)
    gap = wanted - (counter.total - counter.count(removed))
    next_ones = [(keys[n], i) for i, (keys, n) in enumerate(zip(free, first, strict=True)) if n < len(keys)]
    heapify(next_ones)
    while next_ones:  # a class whose next block does not fit is done: the gap only gets smaller
        _, i = heappop(next_ones)
        block = blocks.next(i, taken[i])
        cost = counter.cost(block, removed)
        if cost <= gap:
            removed = _with(removed, block)
            gap -= cost
            taken[i] += 1
            if taken[i] < len(free[i]):
                heappush(next_ones, (free[i][taken[i]], i))
    return taken


def _settle(
    program: Program, counter: ParameterCounter, blocks: _Blocks, wanted: float, taken: list[int]
) -> dict[str, int]:
    """What is removed by ``taken``, or else by what is near it and can be said by a config, which may want multiples.

    One class after the other gives back until its count can be said, the one first that has to give back least, and the
    others are filled again.
    """
    said = partial(can_say, program)
    fixed: dict[int, int] = {}
    while not said(blocks.removed(taken)):
        found = []
        for place in (place for place in range(len(taken)) if place not in fixed):
            for fewer in range(taken[place] - 1, max(-1, taken[place] - _FAR - 1), -1):
                other = [fewer if n == place else one for n, one in enumerate(taken)]
                if said(blocks.removed(other)):
                    found.append((counter.count(blocks.removed(other)), place, fewer))
                    break
        _, place, count = min(found, default=(0, next(n for n in range(len(taken)) if n not in fixed), 0))
        fixed[place] = count
        taken = _fill(counter, blocks, wanted, fixed)
    further = [_further(blocks, taken, place, said) for place in range(len(taken))]
    removed = blocks.removed(taken)
    reached = 1 - counter.count(removed) / counter.total
    if not removed or not any(further):
        more = [1 - counter.count(blocks.removed(one)) / counter.total for one in further if one]
        raise _not_said(program, reached, min(more, default=None))
    return removed


def _further(blocks: _Blocks, taken: list[int], place: int, said: Callable[[dict[str, int]], bool]) -> list[int] | None:
    """``taken`` with the fewest more blocks of one class that can be said, if any can."""
    for count in range(taken[place] + 1, min(len(blocks.keys[place]), taken[place] + _FAR) + 1):
        other = [count if n == place else one for n, one in enumerate(taken)]
        if said(blocks.removed(other)):
            return other
    return None


def _not_said(program: Program, reached: float, further: float | None) -> GraphPruneError:
    near = " and ".join(f"{ratio:.4f}" for ratio in (reached, further) if ratio)
    return GraphPruneError(
        f"ratio {program.options.ratio} cannot be reached with deploy='transformers', where all layers shrink alike "
        f"and the config must allow their sizes. The nearest that can be: {near or 'none'}. Ask for that, or let more "
        "of the model shrink (include=, width=, round_to=)."
    )


def _unreachable(program: Program, reachable: float) -> GraphPruneError:
    axes = program.need("axes")
    parameters = {axes.canonical[name] for name, _ in program.model.named_parameters()}
    held: dict[str, int] = {}
    for group in program.need("groups"):
        reason = program.need("skipped").get(group.name)
        if reason is not None and group.size > 1:
            size = sum(
                math.prod(a.size for a in axes.tensors[m.tensor]) for m in group.members if m.tensor in parameters
            )
            held[f"{group.name} ({size:,} parameters): {reason}"] = size
    worst = sorted(held, key=lambda line: -held[line])[:5]
    lines = "".join(f"\n  {line}" for line in worst)
    unsaid = "".join(f"\n  {name}: {reason}" for name, reason in list(program.unsaid.items())[:3])
    rounded = f" and round_to={program.options.round_to}" if program.options.round_to > 1 else ""
    return GraphPruneError(
        f"ratio {program.options.ratio} cannot be reached: {reachable:.4f} is as far as it goes with one index left "
        f"on every axis (or what must stay of it){rounded}. "
        f"What holds the most of the rest:{lines}{unsaid}"
    )
