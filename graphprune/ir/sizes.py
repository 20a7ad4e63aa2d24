"""Sizes as polynomials of leaf axes.

The size of a dimension after pruning is a polynomial in the new sizes of its leaf axes: a leaf that may be pruned is a
symbol, everything else a number. Equality of two such polynomials means: equal whatever is pruned.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from graphprune.ir.axes import Axis, find

Monomial = tuple[Axis, ...]  # sorted by serial; the empty tuple is the constant


class Polynomial:
    """An integer polynomial; but for :meth:`add` immutable by convention."""

    __slots__ = ("terms",)

    def __init__(self, terms: dict[Monomial, int]):
        self.terms = {monomial: factor for monomial, factor in terms.items() if factor}

    @classmethod
    def constant(cls, value: int) -> Polynomial:
        return cls({(): value})

    @classmethod
    def of(cls, axis: Axis) -> Polynomial:
        """The size of ``axis``: pinned leaves count as numbers, free leaves as symbols."""
        axis = find(axis)
        if axis.kind == "leaf":
            return cls.constant(axis.size) if axis.pins or axis.size <= 1 else cls({(axis,): 1})
        sizes = [cls.of(part) for part in axis.parts]
        out = sizes[0]
        for size in sizes[1:]:
            out = out * size if axis.kind == "product" else out + size
        return out

    def add(self, other: Polynomial) -> None:
        """Add in place: of a sum of many only the last is looked at."""
        for monomial, value in other.terms.items():
            self.terms[monomial] = self.terms.get(monomial, 0) + value

    def __add__(self, other: Polynomial) -> Polynomial:
        terms = dict(self.terms)
        for monomial, value in other.terms.items():
            terms[monomial] = terms.get(monomial, 0) + value
        return Polynomial(terms)

    def __sub__(self, other: Polynomial) -> Polynomial:
        return self + Polynomial({m: -v for m, v in other.terms.items()})

    def __mul__(self, other: Polynomial) -> Polynomial:
        terms: dict[Monomial, int] = {}
        for m, v in self.terms.items():
            for n, w in other.terms.items():
                key = tuple(sorted(m + n, key=lambda a: a.serial))
                terms[key] = terms.get(key, 0) + v * w
        return Polynomial(terms)

    def divide(self, other: Polynomial) -> Polynomial | None:
        """The exact quotient by a single-term polynomial, or None if there is none."""
        if len(other.terms) != 1:
            return None
        ((divisor, factor),) = other.terms.items()
        terms: dict[Monomial, int] = {}
        for monomial, value in self.terms.items():
            rest = list(monomial)
            for axis in divisor:
                if axis not in rest:
                    return None
                rest.remove(axis)
            if value % factor:
                return None
            terms[tuple(rest)] = value // factor
        return Polynomial(terms)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Polynomial) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(frozenset(self.terms.items()))

    def value(self, size: Callable[[Axis], int]) -> int:
        """The number, given the size of every leaf."""
        total = 0
        for monomial, factor in self.terms.items():
            for axis in monomial:
                factor *= size(axis)
            total += factor
        return total

    def slopes(self) -> dict[Axis, int]:
        """How fast the value grows with each leaf, at full size."""
        found: dict[Axis, int] = {}
        for monomial, factor in self.terms.items():
            for place, axis in enumerate(monomial):
                others = (one.size for n, one in enumerate(monomial) if n != place)
                found[axis] = found.get(axis, 0) + factor * math.prod(others)
        return found

    def bounds(self, least: int = 1) -> tuple[int, int]:
        """Numbers that the value stays between, both included, when every leaf keeps at least ``least`` indices."""
        low = high = 0
        for monomial, factor in self.terms.items():
            ends = (factor * least ** len(monomial), factor * math.prod(axis.size for axis in monomial))
            low, high = low + min(ends), high + max(ends)
        return low, high

    def symbols(self) -> set[Axis]:
        return {axis for monomial in self.terms for axis in monomial}


def disagreement(a: Polynomial, b: Polynomial) -> set[Axis]:
    """The leaves whose pruning would make ``a`` and ``b`` differ; a factor common to all of it does not count.

    ``heads·qk`` against ``heads·v`` gives ``{qk, v}``: the heads shrink both alike.
    """
    difference = (a - b).terms
    if not difference:
        return set()
    monomials = list(difference)
    common = list(monomials[0])
    for monomial in monomials[1:]:
        rest = list(monomial)
        shared = []
        for axis in common:
            if axis in rest:
                rest.remove(axis)
                shared.append(axis)
        common = shared
    out: set[Axis] = set()
    for monomial in monomials:
        rest = list(monomial)
        for axis in common:
            rest.remove(axis)
        out.update(rest)
    return out
