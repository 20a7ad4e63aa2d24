"""How many structures of every axis go, when the next one to go is always the cheapest that a key names."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from graphprune.errors import GraphPruneError
from graphprune.ir.axes import Axis, find, inner_width, leaves
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
    return _fill(counter, blocks, blocks.longest_prefix(counter, wanted), wanted)


class ParameterCounter:
    """How many parameters are left when so many indices of each group are gone; tied ones count once."""

    def __init__(self, program: Program):
        axes = program.need("axes")
        groups = {find(group.axis): group.name for group in program.need("prunable")}
        self.fixed = 0
        self.shrinking: list[tuple[Polynomial, frozenset[str]]] = []
        distinct = {axes.canonical[name] for name, _ in program.model.named_parameters()}
        for name in sorted(distinct):
            dims = axes.tensors[name]
            if any(leaf in groups for axis in dims for leaf in leaves(axis)):
                size = Polynomial.constant(1)
                for axis in dims:
                    size = size * Polynomial.of(axis)
                self.shrinking.append((size, frozenset(groups[a] for a in size.symbols() if a in groups)))
            else:
                self.fixed += math.prod(axis.size for axis in dims)
        self.names = groups
        self.total = self.count({})

    def count(self, removed: dict[str, int]) -> int:
        size = self._sizes(removed)
        return self.fixed + sum(polynomial.value(size) for polynomial, _ in self.shrinking)

    def cost(self, name: str, how_many: int, removed: dict[str, int]) -> int:
        """Parameters that ``how_many`` more indices of a group would take."""
        touched = [polynomial for polynomial, names in self.shrinking if name in names]
        before, after = self._sizes(removed), self._sizes({**removed, name: removed.get(name, 0) + how_many})
        return sum(polynomial.value(before) - polynomial.value(after) for polynomial in touched)

    def _sizes(self, removed: dict[str, int]) -> Callable[[Axis], int]:
        def size(axis: Axis) -> int:
            return axis.size - removed.get(self.names.get(axis, ""), 0)

        return size


class _Blocks:
    """All structures in one order, as blocks of those that go together, so that widths stay multiples.

    ``queue`` has one entry per block, the number of its group, at the place of the last of its structures.
    """

    def __init__(self, program: Program, keys: Keys):
        groups = {group.name: group for group in program.need("prunable")}
        self.names = list(keys)
        self.steps = {name: _steps(groups[name], program) for name in self.names}
        nothing = torch.zeros(0)
        # Sorted runs behind each other: NumPy's stable sort only merges them.
        order = torch.from_numpy(np.argsort(torch.cat([*keys.values(), nothing]).numpy(), kind="stable"))
        sizes = [len(values) for values in keys.values()]
        # Of small numbers torch sorts short ones sooner.
        number = torch.int16 if len(sizes) < 2**15 else torch.int64
        group = torch.cat([torch.full((n,), i, dtype=number) for i, n in enumerate(sizes)] or [nothing.long()])[order]
        is_end = torch.zeros(len(group), dtype=torch.bool)
        for name, places in zip(self.names, group.argsort(stable=True).split(sizes), strict=True):
            steps = self.steps[name]
            is_end[places[torch.arange(steps.start, max(steps.start, steps.stop), steps.step) - 1]] = True
        self.queue = group[is_end]

    def prefix(self, length: int) -> dict[str, int]:
        """Indices removed per group by the first ``length`` blocks."""
        taken = self.queue[:length].bincount(minlength=len(self.names)).tolist()
        return {name: self.steps[name][n - 1] for name, n in zip(self.names, taken, strict=True) if n}

    def most(self) -> dict[str, int]:
        return self.prefix(len(self.queue))

    def longest_prefix(self, counter: ParameterCounter, wanted: float) -> int:
        """The largest number of blocks that removes no more than ``wanted``."""
        low, high = 0, len(self.queue)
        while low < high:
            middle = (low + high + 1) // 2
            if counter.total - counter.count(self.prefix(middle)) <= wanted:
                low = middle
            else:
                high = middle - 1
        return low


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


def _fill(counter: ParameterCounter, blocks: _Blocks, length: int, wanted: float) -> dict[str, int]:
    """Go on behind the prefix with every block that still fits, until nothing does."""
    removed = blocks.prefix(length)
    gap = wanted - (counter.total - counter.count(removed))
    costs: dict[str, tuple[int, int]] = {}
    blocked: set[str] = set()  # a group whose next block does not fit: the gap only gets smaller
    for number in blocks.queue[length:].tolist():
        name = blocks.names[number]
        if name in blocked:
            continue
        if name not in costs:
            gone = removed.get(name, 0)
            step = next(s for s in blocks.steps[name] if s > gone) - gone
            costs[name] = (step, counter.cost(name, step, removed))
        step, cost = costs[name]
        if cost <= gap:
            removed[name] = removed.get(name, 0) + step
            gap -= cost
            costs.clear()
        else:
            blocked.add(name)
            if len(blocked) == len(blocks.steps):
                break
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
