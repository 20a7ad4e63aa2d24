"""How many structures of every axis go, when the next one to go is always the cheapest that a key names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush

import torch

from graphprune.errors import GraphPruneError
from graphprune.ir.axes import Axis, find, inner_width, leaves
from graphprune.ir.order import longest_prefix
from graphprune.ir.program import NodeGroup, Program
from graphprune.ir.sizes import Polynomial

# Name of a group → key of its first structure to go, of the next, …: float64 of shape (size,), never falling.
Keys = dict[str, torch.Tensor]


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
    return _fill(counter, blocks, wanted)


def check_reachable(program: Program) -> None:
    """Raises :class:`GraphPruneError` as :func:`fill_budget` does when not even all that may go is enough."""
    steps = {group.name: _steps(group, program) for group in program.need("prunable")}
    counter = ParameterCounter(program)
    reachable = 1 - counter.count({name: found[-1] for name, found in steps.items() if found}) / counter.total
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

    def cost(self, name: str, how_many: int, removed: dict[str, int]) -> int:
        """Parameters that ``how_many`` more indices of a group would take."""
        touched = self._of_group[name]
        before, after = self._sizes(removed), self._sizes({**removed, name: removed.get(name, 0) + how_many})
        return touched.value(before) - touched.value(after)

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
    """The structures of every group as blocks that go together, so that widths stay multiples of ``round_to``.

    ``keys`` has, for every group, the key of each of its blocks: that of the last structure in it.
    """

    def __init__(self, program: Program, keys: Keys):
        groups = {group.name: group for group in program.need("prunable")}
        self.steps = {name: _steps(groups[name], program) for name in keys}
        self.keys = [keys[name].numpy()[_ends(steps)] for name, steps in self.steps.items()]

    def removed(self, taken: Sequence[int]) -> dict[str, int]:
        """Indices removed per group by so many blocks of each."""
        return {name: steps[n - 1] for (name, steps), n in zip(self.steps.items(), taken, strict=True) if n}

    def most(self) -> dict[str, int]:
        return self.removed([len(keys) for keys in self.keys])


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


def _ends(steps: range) -> slice:
    """Where the last structure of every block is."""
    return slice(steps.start - 1, max(steps.start, steps.stop) - 1, steps.step)


def _fill(counter: ParameterCounter, blocks: _Blocks, wanted: float) -> dict[str, int]:
    """The blocks of the smallest keys that remove no more than ``wanted``, and then every one that still fits."""
    taken = longest_prefix(blocks.keys, lambda taken: counter.total - counter.count(blocks.removed(taken)) <= wanted)
    removed = blocks.removed(taken)
    gap = wanted - (counter.total - counter.count(removed))
    names = list(blocks.steps)
    next_ones = [(keys[n], i) for i, (keys, n) in enumerate(zip(blocks.keys, taken, strict=True)) if n < len(keys)]
    heapify(next_ones)
    while next_ones:  # a group whose next block does not fit is done: the gap only gets smaller
        _, i = heappop(next_ones)
        name = names[i]
        gone = removed.get(name, 0)
        step = blocks.steps[name][taken[i]] - gone
        cost = counter.cost(name, step, removed)
        if cost <= gap:
            removed[name] = gone + step
            gap -= cost
            taken[i] += 1
            if taken[i] < len(blocks.keys[i]):
                heappush(next_ones, (blocks.keys[i][taken[i]], i))
    return removed


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
    rounded = f" and round_to={program.options.round_to}" if program.options.round_to > 1 else ""
    return GraphPruneError(
        f"ratio {program.options.ratio} cannot be reached: {reachable:.4f} is as far as it goes with one index left "
        f"on every axis (or what must stay of it){rounded}. "
        f"What holds the most of the rest:{lines}"
    )
