"""Solve the integers of the model's Python code.

Every integer that sizes a tensor must equal the size of that axis, whatever is pruned. The uses that tracing recorded
are equations between integer attributes and size polynomials; what cannot be solved pins the axes in the way.
"""

from __future__ import annotations

from collections.abc import Iterator

from graphprune.ir.axes import Axis, Pin, pin
from graphprune.ir.program import Program
from graphprune.ir.sizes import Polynomial, disagreement
from graphprune.passes.base import compiler_pass
from graphprune.passes.emit_graph import rewrite_of
from graphprune.rules.registry import SizeUse
from graphprune.trace.provenance import Attribute, Combined, Comparison, Dim, Expr, get_attribute

Solution = dict[Attribute, Polynomial]


@compiler_pass(requires=("axes",), ensures=("attributes",))
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
        self.comparisons: list[Comparison] = trace.comparisons
        self.in_graph = program.options.emit == "graph"
        if self.in_graph:  # every number stands by itself there: what is no size keeps its value
            self.escapes, self.comparisons = [], []
            self.uses = [use for use in self.uses if use.node is not None and rewrite_of(use.node.target) is None]
        self._old: dict[Attribute, Polynomial] = {}

    def solve(self) -> Solution:
        """Attributes that stand alone first, then those inside a sum or product with known ones."""
        solution: Solution = {}
        if self.in_graph:
            return solution
        compound = []
        for use in self.uses:
            if isinstance(use.expr, Attribute):
                solution.setdefault(use.expr, Polynomial.of(use.axis))
            elif isinstance(use.expr, Combined):
                compound.append(use)
        for use in compound:
            unknown = [a for a in _attributes(use.expr) if a not in solution]
            if len(set(unknown)) == 1 and len(unknown) == 1:
                found = self._invert(use.expr, unknown[0], Polynomial.of(use.axis), solution)
                if found is not None:
                    solution[unknown[0]] = found
        for attribute, other in self._equated():
            if attribute not in solution and (size := self.evaluate(other, solution)) is not None:
                solution[attribute] = size
        return solution

    def _equated(self) -> Iterator[tuple[Attribute, Expr]]:
        """Attributes that forward checks against a size (``if x.shape[-1] != self.width: raise``): they follow it."""
        for comparison in self.comparisons:
            if comparison.op == "==" and comparison.outcome:
                for one, other in ((comparison.left, comparison.right), (comparison.right, comparison.left)):
                    if isinstance(one, Attribute) and not isinstance(other, (int, Attribute)):
                        yield one, other

    def clashes(self, solution: Solution) -> Iterator[tuple[Axis, Pin]]:
        """Every leaf that must be pinned for all equations to hold, with the reason."""
        for use in self.uses:
            want = Polynomial.of(use.axis)
            have = self.evaluate(use.expr, solution)
            if have is None:
                why = Pin(f"its size is computed as {show(use.expr)}", use.where)
                yield from ((axis, why) for axis in want.symbols() | self._symbols(use.expr, solution))
            elif have != want:
                what = f"the number {use.expr}" if isinstance(use.expr, int) else show(use.expr)
                why = Pin(f"its size is given by {what}, which cannot follow", use.where)
                yield from ((axis, why) for axis in disagreement(have, want))
        for group, where in self.equal_sizes:
            sizes = [Polynomial.of(axis) for axis in group]
            for size in sizes[1:]:
                why = Pin("split into equal parts that need not stay equal", where)
                yield from ((axis, why) for axis in disagreement(sizes[0], size))
        for escape in self.escapes:
            why = Pin(f"the number {show(escape.expr)} enters the computation", escape.where)
            yield from ((axis, why) for axis in self._symbols(escape.expr, solution))
        for comparison in self.comparisons:
            shown = f"{show(comparison.left)} {comparison.op} {show(comparison.right)}"
            why = Pin(f"forward asks whether {shown}", comparison.where)
            yield from ((axis, why) for axis in self._undecided(comparison, solution))

    def _symbols(self, expr: Expr, solution: Solution) -> set[Axis]:
        """Every free leaf that an expression depends on."""
        found = self.evaluate(expr, solution)
        if found is not None:
            return found.symbols()
        if isinstance(expr, Combined):
            return self._symbols(expr.left, solution) | self._symbols(expr.right, solution)
        return set()

    def _undecided(self, comparison: Comparison, solution: Solution) -> set[Axis]:
        """The free leaves on which the outcome of a comparison depends.

        Left to the oracle are sizes that differ and might come to agree, and what is so only at size 1
        (``groups > 1``): few plans do either, and most forwards then do the same in another way.
        """
        left, right = self.evaluate(comparison.left, solution), self.evaluate(comparison.right, solution)
        if left is None or right is None:
            if comparison.op == "==" and not comparison.outcome:
                return set()
            return self._symbols(comparison.left, solution) | self._symbols(comparison.right, solution)
        if comparison.op == "==":
            return disagreement(left, right) if comparison.outcome else set()
        low, high = (left - right).bounds()
        decided = (high < 0 or low >= 0) if comparison.op == "<" else (high <= 0 or low > 0)
        return set() if decided else (left - right).symbols()

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
        if expr.op == "//":
            if not left.symbols() and not right.symbols():
                return Polynomial.constant(left.value(_no_symbols) // right.value(_no_symbols))
            return left.divide(right)
        if expr.op == "%":
            return _remainder(left, right)
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
        return Polynomial.of(dims[expr.dim])

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


def _remainder(left: Polynomial, right: Polynomial) -> Polynomial | None:
    if not left.symbols() and not right.symbols():
        return Polynomial.constant(left.value(_no_symbols) % right.value(_no_symbols))
    return Polynomial.constant(0) if left.divide(right) is not None else None


def _no_symbols(axis: Axis) -> int:
    raise AssertionError("a constant polynomial has no symbols")


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
