"""Order and budget → plan: take structures from the front of the order until the parameters are gone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from graphprune.errors import GraphPruneError
from graphprune.ir.axes import Axis, find, inner_width, leaves
from graphprune.ir.plan import Keep, Plan
from graphprune.ir.program import NodeGroup, Order, Program
from graphprune.ir.sizes import Polynomial
from graphprune.passes.base import compiler_pass


@compiler_pass(requires=("order", "axes", "prunable"), ensures=("plan",))
def select_structures(program: Program) -> None:
    """Reach ``ratio`` of all parameters to within one structure; at least one index stays on every axis.

    Raises :class:`GraphPruneError` saying how far it can go, and what pins the rest, when that is not enough.
    """
    options = program.options
    assert options.ratio is not None
    counter = ParameterCounter(program)
    blocks = _Blocks(program, options.round_to)
    wanted = options.ratio * counter.total
    reachable = counter.total - counter.count(blocks.most())
    if reachable < wanted:
        raise _unreachable(program, reachable / counter.total)
    removed = _fill(counter, blocks, blocks.longest_prefix(counter, wanted), wanted)
    keep: dict[str, Keep] = {}
    sizes, under = {}, {}
    for group in program.need("prunable"):
        count = removed.get(group.name, 0)
        if count:
            keep[group.name] = _kept(blocks.removed_from(group.name, count), group.size)
            sizes[group.name] = group.size
            if group.name in blocks.choices:
                under[group.name] = program.need("ragged")[group.name]
    reached = 1 - counter.count(removed) / counter.total
    program.plan = Plan(reached, keep, sizes, dict(program.need("skipped")), options.method, options.width, under)


def _kept(removed: torch.Tensor, size: int) -> Keep:
    """What is left of ``range(size)``; of several rows of removed indices, row by row."""
    if removed.ndim == 2:
        return [_kept(row, size) for row in removed]  # type: ignore[misc]
    kept = torch.ones(size, dtype=torch.bool)
    kept[removed] = False
    return kept.nonzero().flatten().tolist()


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
    """The order as blocks of indices that go together, so that widths stay multiples of ``round_to``.

    ``queue`` has one entry per block, the number of its group, at the place of the last of its indices.
    """

    def __init__(self, program: Program, round_to: int):
        order: Order = program.need("order")
        self.names = order.names
        self.choices = order.choices
        groups = {group.name: group for group in program.need("prunable")}
        self.steps = {name: _steps(groups[name], program, round_to) for name in order.names}
        self.indices: dict[str, torch.Tensor] = {}
        is_end = torch.zeros(len(order.group), dtype=torch.bool)
        by_group = order.group.argsort(stable=True)
        sizes = order.group.bincount(minlength=len(order.names)).tolist()
        for name, places in zip(order.names, by_group.split(sizes), strict=True):
            self.indices[name] = order.index[places]
            is_end[places[torch.tensor(self.steps[name], dtype=torch.long) - 1]] = True
        self.queue = order.group[is_end]

    def removed_from(self, name: str, count: int) -> torch.Tensor:
        """The first ``count`` indices to go; of a ragged group one row of them per outer index."""
        first = self.indices[name][:count]
        return self.choices[name][:, first] if name in self.choices else first

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


def _steps(group: NodeGroup, program: Program, round_to: int) -> list[int]:
    """How many indices may be gone: every count that leaves at least one, and widths in multiples of ``round_to``.

    Kernels may want multiples of their own.

    An axis that is a factor of a wider dimension (heads of 64) needs multiples of less.
    """
    unit = group.multiple
    tensors = program.need("axes").tensors
    for member in group.members if round_to > 1 else ():
        inner = inner_width(tensors[member.tensor][member.dim], find(group.axis))
        unit = math.lcm(unit, round_to // math.gcd(round_to, inner))
    return [gone for gone in range(1, group.size - group.minimum + 1) if (group.size - gone) % unit == 0]


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
    return GraphPruneError(
        f"ratio {program.options.ratio} cannot be reached: {reachable:.4f} is as far as it goes with one index left "
        f"on every axis{f' and round_to={program.options.round_to}' if program.options.round_to > 1 else ''}. "
        f"What holds the most of the rest:{lines}"
    )
