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
from functools import cached_property
from typing import Any

import torch
from torch import fx

from graphprune.ir.axes import Axis, Misaligned, Pin, find, pin, unify
from graphprune.trace.provenance import Expr, SizeInt

Dims = tuple[Axis, ...]
RuleFunction = Callable[..., Any]

_RULES: dict[Any, RuleFunction] = {}
_BY_NAME: dict[str, RuleFunction] = {}


def rule(*operators: Any) -> Callable[[RuleFunction], RuleFunction]:
    """Register a function as the axis rule of ATen ``operators``: packets (all overloads) or single overloads.

    The function takes a :class:`Rule` and the operator's arguments, tensors as their dims, and returns the dims of the
    output, or None for a form that it does not cover.
    """

    def register(function: RuleFunction) -> RuleFunction:
        for operator in operators:
            _RULES[operator] = function
        return function

    return register


def rule_by_name(*names: str) -> Callable[[RuleFunction], RuleFunction]:
    """Like :func:`rule` for operators of libraries that need not be there; ``names`` are ``"library::operator"``."""

    def register(function: RuleFunction) -> RuleFunction:
        for name in names:
            _BY_NAME[name] = function
        return function

    return register


def find_rule(operator: Any) -> RuleFunction | None:
    """The rule of an operator: of the exact overload, else of its packet, else the pointwise rule if tagged so."""
    found = _RULES.get(operator)
    if found is not None:
        return found
    packet = getattr(operator, "overloadpacket", None)
    found = _RULES.get(packet) or _BY_NAME.get(str(getattr(packet, "_qualified_op_name", "")))
    if found is None and torch.Tag.pointwise in getattr(operator, "tags", ()):
        return _RULES["pointwise"]
    return found


@dataclass(frozen=True)
class Contraction:
    """Dimension ``dim`` of tensor argument ``arg`` of ``node`` is summed away; ``item`` says which tensor of a list.

    Removing an index of its axis means dropping its term of the sum. ``weight`` is the (argument, dimension) of the
    other operand when that may be a weight. ``factor`` is the part of the dimension that is summed away, if not all.
    """

    node: fx.Node
    arg: int
    dim: int
    weight: tuple[int, int] | None = None
    item: int | None = None
    factor: Axis | None = None

    @property
    def operand(self) -> fx.Node:
        """The node whose value loses a dimension."""
        value: Any = self.node.args[self.arg]
        return value if self.item is None else value[self.item]


@dataclass(frozen=True)
class SizeUse:
    """The runtime integer ``expr`` (or a literal, when it is a plain int) must equal the size of ``axis``."""

    expr: Expr
    axis: Axis
    where: str
    node: fx.Node | None = None  # the operator that it is an argument of; None for a number that is no size


@dataclass
class Selections:
    """What ``experts`` needs to know; see :mod:`graphprune.rules.index_of`.

    ``index_of`` has the axis that the values of a tensor index, for a node or for one output of a node;
    ``running_sums`` the axis that the values of a node are inclusive sums along. A router chooses from an axis that is
    in ``ranked``, with how many are chosen, and in ``looked_up``, since something is looked up with the choice; the
    ``pins`` do not hold for such an axis.
    """

    index_of: dict[fx.Node | tuple[fx.Node, int], Axis] = field(default_factory=dict)
    running_sums: dict[fx.Node, Axis] = field(default_factory=dict)
    ranked: list[tuple[Axis, int]] = field(default_factory=list)
    looked_up: list[Axis] = field(default_factory=list)
    pins: list[tuple[Axis, Pin]] = field(default_factory=list)


@dataclass
class Facts:
    """What the rules found out, beside the axes themselves.

    ``held`` has every axis that a node itself pinned: its indices may not be treated one by one there.
    """

    contractions: list[Contraction] = field(default_factory=list)
    held: list[tuple[fx.Node, Axis]] = field(default_factory=list)
    size_uses: list[SizeUse] = field(default_factory=list)
    equal_sizes: list[tuple[list[Axis], str]] = field(default_factory=list)
    multiples: list[tuple[Axis, int]] = field(default_factory=list)
    careful: list[Axis] = field(default_factory=list)  # of which a planner leaves two
    minimums: list[tuple[Axis, int]] = field(default_factory=list)  # how many indices must stay
    statistics: list[fx.Node] = field(default_factory=list)  # whose statistic is to be taken over what is kept
    selections: Selections = field(default_factory=Selections)


class Rule:
    """What one application of a rule may say about axes. ``node`` is the operator's call.

    With ``width`` an axis that a statistic is taken over is not pinned, with ``experts`` an axis that a router chooses
    from.
    """

    def __init__(
        self,
        node: fx.Node,
        facts: Facts,
        where: Callable[[fx.Node], str],
        width: bool = False,
        experts: bool = False,
    ):
        self.node = node
        self._facts = facts
        self._where = where
        self._width = width
        self.experts = experts
        self.sizes_used: set[int] = set()

    @cached_property
    def where(self) -> str:
        return self._where(self.node)

    def pin(self, axis: Axis, reason: str) -> None:
        """The axis may not be pruned."""
        pin(axis, Pin(reason, self.where))
        self._facts.held.append((self.node, axis))

    def statistic(self, axis: Axis, reason: str) -> None:
        """A mean, a variance or a norm is taken over the axis: it changes with every index that goes, so it pins.

        With ``width`` the user wants it taken over what is kept; the oracle then does the same
        (:mod:`graphprune.passes.restrict`, which has to know the operator).
        """
        if self._width:
            self._facts.statistics.append(self.node)
            self._facts.held.append((self.node, axis))
        else:
            self.pin(axis, reason)

    def selected(self, axis: Axis, reason: str) -> None:
        """Pins, but for an axis that a router chooses from when the user wants whole ``experts`` to go.

        What the operator does must come out the same for the indices that are kept, provided that the router chooses
        no other.
        """
        if self.experts:
            self._facts.selections.pins.append((axis, Pin(reason, self.where)))
            self._facts.held.append((self.node, axis))
        else:
            self.pin(axis, reason)

    def among_kept(self, axis: Axis, reason: str) -> None:
        """The indices of the axis compete (softmax, the largest): with ``experts`` only those that are kept do.

        The oracle does the same (:mod:`graphprune.passes.restrict`, which has to know the operator).
        """
        self.selected(axis, reason)
        if self.experts:
            self._facts.statistics.append(self.node)

    def ranked(self, axis: Axis, reason: str, chosen: int, output: int | None = None) -> None:
        """The best ``chosen`` indices of the axis are taken, as a router does; ``output`` of the node has them."""
        self.among_kept(axis, reason)
        if self.experts:
            selections = self._facts.selections
            selections.ranked.append((axis, chosen))
            selections.index_of[self.node if output is None else (self.node, output)] = axis

    def index_of(self, tensor: Any) -> Axis | None:
        """The axis that the values of an argument of the node index, where that is known."""
        return self._facts.selections.index_of.get(tensor) if isinstance(tensor, fx.Node) else None

    def looked_up(self, axis: Axis, indices: Any, reason: str = "looked up by index") -> None:
        """The axis is indexed by the values of ``indices``, an argument of the node: it may not be renumbered.

        When a router chose them, they are renumbered as its axis is, and the two are one.
        """
        chosen_from = self.index_of(indices)
        if chosen_from is None:
            self.pin(axis, reason)
        else:
            self.selected(axis, reason)
            self.same(axis, chosen_from)
            self._facts.selections.looked_up.append(chosen_from)

    def running_sum(self, axis: Axis, reason: str) -> None:
        """The output is the inclusive running sum of the first argument along the axis."""
        self.selected(axis, reason)
        if self.experts:
            self._facts.selections.running_sums[self.node] = axis

    def running_sum_of(self, tensor: Any) -> Axis | None:
        """The axis that an argument of the node is an inclusive running sum along, where that is known."""
        return self._facts.selections.running_sums.get(tensor) if isinstance(tensor, fx.Node) else None

    def fresh(self, size: int, reason: str | None = None) -> Axis:
        """A new axis, pinned if a reason is given."""
        axis = Axis(int(size))
        if reason is not None:
            self.pin(axis, reason)
        return axis

    def same(self, a: Axis, b: Axis) -> Axis:
        """The two axes are one. A disagreement pins both."""
        if find(a) is find(b):
            return a
        try:
            unify(a, b, Pin("", self.where))
        except Misaligned as error:
            self.pin(a, str(error))
            self.pin(b, str(error))
        if find(a) is not find(b):  # no common description was found
            self._facts.held += [(self.node, a), (self.node, b)]
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

    def contract(
        self,
        arg: int,
        dim: int,
        weight: tuple[int, int] | None = None,
        item: int | None = None,
        factor: Axis | None = None,
    ) -> None:
        """See :class:`Contraction`."""
        self._facts.contractions.append(Contraction(self.node, arg, dim, weight, item, factor))

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

    def multiple(self, axis: Axis, of: int) -> None:
        """The kernel of this operator only takes sizes of ``axis`` that are multiples of ``of``."""
        if of > 1:
            self._facts.multiples.append((axis, of))

    def keep_two(self, axis: Axis) -> None:
        """With one index left, memory may be laid out otherwise than with more, and a later ``view`` fail."""
        self._facts.careful.append(axis)

    def at_least(self, axis: Axis, minimum: int) -> None:
        """So many indices of the axis, and of every leaf below it, must stay."""
        self._facts.minimums.append((axis, minimum))

    def named(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of the call under the names that the operator's schema gives them."""
        schema = self.node.target._schema  # type: ignore[union-attr]
        return {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}

    def options(self, given: Sequence[Any], named: dict[str, Any]) -> dict[str, Any]:
        """The arguments behind the first by their names in the operator's schema, which differs per overload."""
        names = [argument.name for argument in self.node.target._schema.arguments]  # type: ignore[union-attr]
        return dict(zip(names[1:], given, strict=False)) | named

    def output_shape(self, index: int | None = None) -> tuple[int, ...]:
        """The shape of the node's output as traced."""
        value = self.node.meta["val"]
        return tuple(concrete(s) for s in (value if index is None else value[index]).shape)


def dims_of(shape: Sequence[Any]) -> Dims:
    """Fresh axes for a shape; those whose size depends on values are pinned."""
    out = tuple(Axis(concrete(size)) for size in shape)
    for axis, size in zip(out, shape, strict=True):
        if isinstance(size, torch.SymInt):
            pin(axis, Pin("its size depends on values"))
    return out


_FIRST_STAND_IN = 1_000_003  # larger than any real dimension that a rule could take it for
_stand_ins: dict[str, int] = {}


def concrete(size: Any) -> int:
    """A size as a number: one that depends on values gets a number that no other size has."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return _stand_ins.setdefault(str(size), _FIRST_STAND_IN + 2 * len(_stand_ins))


def any_stand_ins() -> bool:
    """False as long as no size was one that depends on values."""
    return bool(_stand_ins)


def is_stand_in(size: int) -> bool:
    """True for a number that :func:`concrete` made up."""
    return size >= _FIRST_STAND_IN and size in _stand_ins.values()
