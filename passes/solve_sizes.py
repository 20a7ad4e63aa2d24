"""Solve the integers of the model's Python code.

Every integer that sizes a tensor must equal the size of that axis, whatever is pruned. The uses that tracing recorded
are equations between integer attributes and size polynomials; what cannot be solved pins the axes in the way.
"""

from __future__ import annotations

from collections.abc import Iterator

from graphprune.ir.axes import Axis, Pin, find, pin
from graphprune.ir.program import AxisMap, Program
from graphprune.ir.sizes import Polynomial, disagreement
from graphprune.passes.base import compiler_pass
from graphprune.passes.emit_graph import rewrite_of
from graphprune.rules.registry import SizeUse
from graphprune.trace.provenance import Attribute, Combined, Dim, Expr, get_attribute

Solution = dict[Attribute, Polynomial]
_COMPARISONS = ("==", "<", "<=")


@compiler_pass(requires=("axes",), ensures=("attributes",), analysis=True)
def solve_sizes(program: Program) -> None:
    """Give every used attribute its polynomial; pin whatever would make two uses disagree. Runs to a fixed point."""
    solver = _Solver(program)
    while True:
        solution = solver.solve()
        clashes = list(solver.clashes(solution))
        for axis, why in clashes:
            pin(axis, why)
        if not clashes:
            break
    axes: AxisMap = program.need("axes")
    axes.more_than_one = {find(leaf) for leaf in solver.more_than_one}
    program.attributes = {name: size for name, size in solution.items() if size.symbols()}


class _Solver:
    def __init__(self, program: Program):
        axes, trace = program.need("axes"), program.need("trace")
        self.model = program.model
        self.values = axes.values
        self.tensors = {name: axes.tensors[first] for name, first in axes.canonical.items()}
        nodes = {node.name: node for node in trace.graph.nodes if node.op == "placeholder"}
        self.tensors |= {f"input{i}": axes.values[nodes[name]] for i, name in enumerate(trace.input_names)}
        self.uses: list[SizeUse] = axes.facts.size_uses
        self.equal_sizes = axes.facts.equal_sizes
        self.call_outputs = trace.call_outputs
        self.escapes = trace.escapes
        self.more_than_one: set[Axis] = set()  # forward does something else when one index is left
        self.in_graph = program.options.emit == "graph"
        if self.in_graph:  # every number stands by itself there: what is no size keeps its value
            self.escapes = []
            self.uses = [use for use in self.uses if use.node is not None and rewrite_of(use.node.target) is None]
        self._old: dict[Attribute, Polynomial] = {}
        self._sizes: dict[Axis, Polynomial] = {}

    def solve(self) -> Solution:
        """Attributes that stand alone first, then those inside a sum or product with known ones."""
        self._sizes.clear()  # what is pinned since is a number now
        solution: Solution = {}
        if self.in_graph:
            return solution
        compound = []
        for use in self.uses:
            if isinstance(use.expr, Attribute):
                solution.setdefault(use.expr, self._size(use.axis))
            elif isinstance(use.expr, Combined):
                compound.append(use)
        for use in compound:
            unknown = [a for a in _attributes(use.expr) if a not in solution]
            if len(set(unknown)) == 1 and len(unknown) == 1:
                found = self._invert(use.expr, unknown[0], self._size(use.axis), solution)
                if found is not None:
                    solution[unknown[0]] = found
        for escape in self.escapes:
            self._solve_equality(escape.expr, solution)
        return solution

    def _solve_equality(self, expr: Expr, solution: Solution) -> None:
        """An attribute that is only compared (``assert x.shape[-1] == self.width``) follows what it is equal to."""
        if isinstance(expr, Combined) and expr.op == "==":
            for mine, other in ((expr.left, expr.right), (expr.right, expr.left)):
                if isinstance(mine, Attribute) and mine not in solution:
                    size = self.evaluate(other, solution)
                    if size is not None and size.value(_full_size) == self._old_value(mine).value(_no_symbols):
                        solution[mine] = size

    def _size(self, axis: Axis) -> Polynomial:
        axis = find(axis)
        if axis not in self._sizes:
            self._sizes[axis] = Polynomial.of(axis)
        return self._sizes[axis]

    def clashes(self, solution: Solution) -> Iterator[tuple[Axis, Pin]]:
        """Every leaf that must be pinned for all equations to hold, with the reason."""
        for use in self.uses:
            want = self._size(use.axis)
            have = self.evaluate(use.expr, solution)
            if have is None:
                yield from (
                    (axis, Pin(f"its size is computed as {show(use.expr)}", use.where))
                    for axis in want.symbols() | self.symbols(use.expr, solution)
                )
            elif have is not want and have != want:
                what = f"the number {use.expr}" if isinstance(use.expr, int) else show(use.expr)
                why = Pin(f"its size is given by {what}, which cannot follow", use.where)
                yield from ((axis, why) for axis in disagreement(have, want))
        for group, where in self.equal_sizes:
            sizes = [self._size(axis) for axis in group]
            for size in sizes[1:]:
                why = Pin("split into equal parts that need not stay equal", where)
                yield from ((axis, why) for axis in disagreement(sizes[0], size))
        for escape in self.escapes:
            if isinstance(escape.expr, Combined) and escape.expr.op in _COMPARISONS:
                what, axes = f"forward asks whether {show(escape.expr)}", self._deciding(escape.expr, solution)
            else:
                what, axes = (
                    f"the number {show(escape.expr)} enters the computation",
                    self.symbols(escape.expr, solution),
                )
            yield from ((axis, Pin(what, escape.where)) for axis in axes)

    def _deciding(self, expr: Combined, solution: Solution) -> set[Axis]:
        """The leaves whose pruning could change what a comparison says."""
        left, right = self.evaluate(expr.left, solution), self.evaluate(expr.right, solution)
        if left is None or right is None:
            return self.symbols(expr, solution)
        difference = left - right
        if _is_decided(expr.op, *difference.bounds()):
            return set()
        if _is_decided(expr.op, *difference.bounds(2)):  # only the last index matters: ``groups == 1``
            self.more_than_one |= difference.symbols()
            return set()
        return disagreement(left, right) if expr.op == "==" else (left - right).symbols()

    def symbols(self, expr: Expr, solution: Solution) -> set[Axis]:
        """The leaves that the value of an expression depends on, also where it is no polynomial."""
        have = self.evaluate(expr, solution)
        if have is not None:
            return have.symbols()
        if isinstance(expr, Combined):
            return self.symbols(expr.left, solution) | self.symbols(expr.right, solution)
        return set()

    def evaluate(self, expr: Expr, solution: Solution) -> Polynomial | None:
        """The polynomial an expression will have after pruning, or None if it is none."""
        if isinstance(expr, int):
            return Polynomial.constant(expr)
        if isinstance(expr, Attribute):
            return solution.get(expr) or self._old_value(expr)
        if isinstance(expr, Dim):
            return self._dim(expr)
        left, right = self.evaluate(expr.left, solution), self.evaluate(expr.right, solution)
        if left is None or right is None:
            return None
        if expr.op in ("//", "%"):
            if not left.symbols() and not right.symbols():
                a, b = left.value(_no_symbols), right.value(_no_symbols)
                return Polynomial.constant(a // b if expr.op == "//" else a % b)
            quotient = left.divide(right)
            return quotient if expr.op == "//" or quotient is None else Polynomial.constant(0)
        return {"+": left.__add__, "-": left.__sub__, "*": left.__mul__}[expr.op](right)

    def _dim(self, expr: Dim) -> Polynomial | None:
        if isinstance(expr.call, str):
            dims = self.tensors.get(expr.call)
        else:
            made = self.call_outputs.get(expr.call)
            if isinstance(made, list):
                made = made[expr.output] if expr.output < len(made) else None
            dims = self.values.get(made) if made is not None else None
            if isinstance(dims, list):
                dims = dims[expr.output] if expr.output < len(dims) else None
        if dims is None or expr.dim >= len(dims):
            return None
        return self._size(dims[expr.dim])

    def _old_value(self, attribute: Attribute) -> Polynomial:
        if attribute not in self._old:
            self._old[attribute] = Polynomial.constant(get_attribute(self.model, attribute))
        return self._old[attribute]

    def _invert(self, expr: Expr, unknown: Attribute, value: Polynomial, solution: Solution) -> Polynomial | None:
        """The value of ``unknown`` for which ``expr`` has ``value``."""
        if expr == unknown:
            return value
        if not isinstance(expr, Combined):
            return None
        in_left = unknown in _attributes(expr.left)
        inside, beside = (expr.left, expr.right) if in_left else (expr.right, expr.left)
        other = self.evaluate(beside, solution)
        if other is None:
            return None
        if expr.op == "+":
            value = value - other
        elif expr.op == "-":
            value = value + other if in_left else other - value
        elif expr.op == "*":
            quotient = value.divide(other)
            if quotient is None:
                return None
            value = quotient
        elif expr.op == "//" and in_left:  # unknown // other == value, exactly
            value = value * other
        else:
            return None
        return self._invert(inside, unknown, value, solution)


def _is_decided(comparison: str, low: int, high: int) -> bool:
    """Whether a difference between ``low`` and ``high`` always compares with zero alike."""
    if comparison == "==":
        return low == high == 0 or low > 0 or high < 0
    return high < 0 or low >= 0 if comparison == "<" else high <= 0 or low > 0


def _no_symbols(axis: Axis) -> int:
    raise AssertionError("a constant polynomial has no symbols")


def _full_size(axis: Axis) -> int:
    return axis.size


def _attributes(expr: Expr) -> list[Attribute]:
    if isinstance(expr, Combined):
        return [*_attributes(expr.left), *_attributes(expr.right)]
    return [expr] if isinstance(expr, Attribute) else []


def show(expr: Expr) -> str:
    """``num_heads + 2``: an expression as it would be written."""
    if isinstance(expr, Combined):
        return f"{show(expr.left)} {expr.op} {show(expr.right)}"
    if isinstance(expr, Dim):
        return f"shape[{expr.dim}]"
    return str(expr)
