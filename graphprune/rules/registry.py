"""The rule registry and what a rule may say.

A rule is one small function per ATen operator. It gets a :class:`Rule` to speak through and the operator's own
arguments, with every tensor replaced by its :data:`Dims` (one axis per dimension), and returns the dims of the output
(a tuple, or a list of tuples for several outputs)::

    @rule(aten.linear)
    def linear(r, x, weight, bias=None):
        r.contract(0, -1, weight=(1, 1))       # x[-1] and weight[1] are summed away
        ...
        return (*x[:-1], weight[0])

An operator without a rule pins everything it touches: less is pruned, never wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphprune.ir.axes import Axis, Misaligned, Pin, pin, unify
from graphprune.trace.provenance import Expr, SizeInt

Dims = tuple[Axis, ...]
RuleFunction = Callable[..., Any]

_RULES: dict[Any, RuleFunction] = {}


def rule(*operators: Any) -> Callable[[RuleFunction], RuleFunction]:
    """Register a function as the axis rule of ATen operators: packets (all overloads) or single overloads."""

    def register(function: RuleFunction) -> RuleFunction:
        for operator in operators:
            _RULES[operator] = function
        return function

    return register


def find_rule(operator: Any) -> RuleFunction | None:
    """The rule of an operator: of the exact overload, else of its packet, else the pointwise rule if tagged so."""
    found = _RULES.get(operator) or _RULES.get(getattr(operator, "overloadpacket", None))
    if found is None and torch.Tag.pointwise in getattr(operator, "tags", ()):
        return _RULES["pointwise"]
    return found


@dataclass(frozen=True)
class Contraction:
    """Dimension ``dim`` of tensor argument ``arg`` of ``node`` is summed away.

    Removing an index of its axis means dropping its term of the sum. ``weight`` is the (argument, dimension) of the
    other operand when that may be a weight.
    """

    node: fx.Node
    arg: int
    dim: int
    weight: tuple[int, int] | None = None


@dataclass(frozen=True)
class SizeUse:
    """The runtime integer ``expr`` (or a literal, when it is a plain int) must equal the size of ``axis``."""

    expr: Expr
    axis: Axis
    where: str
    node: fx.Node | None = None  # the operator that it is an argument of; None for a number that is no size


@dataclass
class Facts:
    """What the rules found out, beside the axes themselves."""

    contractions: list[Contraction] = field(default_factory=list)
    size_uses: list[SizeUse] = field(default_factory=list)
    equal_sizes: list[tuple[list[Axis], str]] = field(default_factory=list)


class Rule:
    """What one application of a rule may say about axes. ``node`` is the operator's call."""

    def __init__(self, node: fx.Node, facts: Facts, where: Callable[[fx.Node], str]):
        self.node = node
        self._facts = facts
        self._where = where
        self.sizes_used: set[int] = set()

    @property
    def where(self) -> str:
        return self._where(self.node)

    def pin(self, axis: Axis, reason: str) -> None:
        """The axis may not be pruned."""
        pin(axis, Pin(reason, self.where))

    def fresh(self, size: int, reason: str | None = None) -> Axis:
        """A new axis, pinned if a reason is given."""
        axis = Axis(int(size))
        if reason is not None:
            self.pin(axis, reason)
        return axis

    def same(self, a: Axis, b: Axis) -> Axis:
        """The two axes are one. A disagreement pins both."""
        try:
            unify(a, b, Pin("", self.where))
        except Misaligned as error:
            self.pin(a, str(error))
            self.pin(b, str(error))
        return a

    def broadcast(self, *tensors: Sequence[Axis]) -> Dims:
        """Unify dimensions as broadcasting does, aligned from the right; a size of 1 gives way."""
        rank = max((len(dims) for dims in tensors), default=0)
        out = []
        for place in range(-rank, 0):
            axes = [dims[place] for dims in tensors if len(dims) >= -place]
            real = [axis for axis in axes if axis.size != 1] or axes[:1]
            for other in real[1:]:
                self.same(real[0], other)
            out.append(real[0])
        return tuple(out)

    def contract(self, arg: int, dim: int, weight: tuple[int, int] | None = None) -> None:
        """See :class:`Contraction`."""
        self._facts.contractions.append(Contraction(self.node, arg, dim, weight))

    def size(self, value: Any, axis: Axis) -> None:
        """The integer argument ``value`` gives the size of ``axis``: it must follow when the axis shrinks.

        An integer whose source is unknown cannot follow, so it pins the axis.
        """
        if isinstance(value, SizeInt):
            self.sizes_used.add(id(value))
        if isinstance(value, int) and int(value) >= 0:
            expr: Expr = value.expr if isinstance(value, SizeInt) else int(value)
            self._facts.size_uses.append(SizeUse(expr, axis, self.where, self.node))

    def harmless(self, value: Any) -> None:
        """``value`` is a size here, but what is done with it does not depend on it (``slice`` to the very end)."""
        self.sizes_used.add(id(value))

    def equal_sizes(self, axes: Sequence[Axis]) -> None:
        """The axes must shrink by the same count (the parts of ``chunk``)."""
        self._facts.equal_sizes.append((list(axes), self.where))

    def output_shape(self, index: int | None = None) -> tuple[int, ...]:
        """The shape of the node's output as traced."""
        value = self.node.meta["val"]
        return tuple(int(s) for s in (value if index is None else value[index]).shape)


def dims_of(shape: Sequence[int]) -> Dims:
    """Fresh axes for a shape."""
    return tuple(Axis(int(size)) for size in shape)
