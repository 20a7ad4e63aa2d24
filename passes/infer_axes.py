"""Type inference for dimensions: give every dimension of every tensor its axis by running the rules over the graph."""

from __future__ import annotations

import math
import operator
from functools import cache
from typing import Any

import torch
from torch import fx

from graphprune.ir.axes import Misaligned, Pin, leaves, pin, unify
from graphprune.ir.program import AxisMap, Options, Program
from graphprune.passes.base import compiler_pass
from graphprune.rules.index_of import follow_indices, settle
from graphprune.rules.registry import (
    Dims,
    Facts,
    Rule,
    SizeUse,
    any_stand_ins,
    concrete,
    dims_of,
    find_rule,
    is_stand_in,
)
from graphprune.trace.adapters import twins
from graphprune.trace.export import Trace, source_line
from graphprune.trace.provenance import SizeInt
from graphprune.trace.skeleton import names

# What a rule may raise when it meets a form of its operator that it cannot read; the operator then counts as unknown.
_UNREADABLE = (TypeError, ValueError, IndexError, KeyError, AttributeError, Misaligned)


@compiler_pass(requires=("trace",), ensures=("axes",), analysis=True)
def infer_axes(program: Program) -> None:
    """Run every operator's rule; pin inputs, outputs, constants, and all that an operator without a rule touches."""
    found: Trace = program.need("trace")
    idle = twins(program.model)
    canonical, tensors = _tensor_dims(program, idle)
    axes = AxisMap({}, tensors, canonical, Facts())
    for name in canonical:
        if (reason := found.opaque.hides(name)) is not None:
            _pin_all(tensors[canonical[name]], Pin(f"inside a module that cannot be traced: {reason}"))
    for node in found.graph.nodes:
        if node.op == "placeholder":
            axes.values[node] = _placeholder(found, axes, node)
        elif node.op == "call_function":
            axes.values[node] = _call(found, axes, node, program.options)
        elif node.op == "get_attr":  # an object that some operator takes, no tensor
            axes.values[node] = None
    for name, node in found.rebound.items():
        for axis, other in zip(tensors[canonical[name]], axes.values[node], strict=True):
            unify(axis, other)
    for node in found.outputs:
        _pin_all(axes.values[node], Pin("model output"))
        _pin_indices(axes, [node], Pin("its indices are a model output"))
    placeholders = [node for node in axes.values if node.op == "placeholder" and node.users]
    used = {canonical[found.tensor_names[node.name]] for node in placeholders if node.name in found.tensor_names}
    used |= {canonical[name] for name, other in idle.items() if canonical[other] in used}
    for name, dims in tensors.items():
        if name not in used:
            _pin_all(dims, Pin("not used by forward"))
    settle(axes.facts)
    program.axes = axes


def _tensor_dims(program: Program, idle: dict[str, str]) -> tuple[dict[str, str], dict[str, Dims]]:
    """One set of dims per distinct tensor object: tied tensors share theirs, and those of copies that do not run."""
    canonical: dict[str, str] = {}
    first: dict[int, str] = {}
    tensors: dict[str, Dims] = {}
    held = names(program.model)
    for name, tensor in held.items():
        canonical[name] = first.setdefault(id(tensor), name)
        if canonical[name] == name:
            tensors[name] = dims_of(tensor.shape)
    for name, other in idle.items():
        if held[name].shape == held[other].shape:
            tensors[canonical[name]] = tensors[canonical[other]]
    return canonical, tensors


def _placeholder(found: Trace, axes: AxisMap, node: fx.Node) -> Any:
    if node.name in found.tensor_names:
        return axes.tensors[axes.canonical[found.tensor_names[node.name]]]
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    dims = dims_of(node.meta["val"].shape)
    _pin_all(dims, Pin("model input" if node.name in found.input_names else "a constant of forward"))
    return dims


def _call(found: Trace, axes: AxisMap, node: fx.Node, options: Options) -> Any:
    value = node.meta.get("val")
    selections = axes.facts.selections
    if node.target is operator.getitem:
        source = axes.values[node.args[0]]
        if node.args in selections.index_of:
            selections.index_of[node] = selections.index_of[node.args]  # type: ignore[index]
        return source[node.args[1]] if isinstance(source, list) else None
    if not _has_tensors(value):
        if value is not None:
            _pin_indices(axes, node.all_input_nodes, _as_numbers(node))
        return None
    args, kwargs = found.sized_args.get(node, (node.args, dict(node.kwargs)))
    if node.target is torch.ops.graphprune.opaque.default:
        return _hidden(found, axes, node)
    kwargs, targets = _split_off_targets(node, kwargs)
    rule = find_rule(node.target)
    speaker = Rule(node, axes.facts, source_line, options.width, options.experts)
    out = None
    problem = "has no rule"
    if rule is not None:
        try:
            out = rule(
                speaker,
                *(_to_dims(a, axes.values) for a in args),
                **{k: _to_dims(v, axes.values) for k, v in kwargs.items()},
            )
            problem = "has a rule that does not cover this form of it"
        except _UNREADABLE as error:
            problem = f"has a rule that cannot read this call ({type(error).__name__}: {error})"
    if out is None or not _fits(out, value) or not all(_fits(out, target.meta["val"]) for target in targets):
        return _unknown(axes, node, args, kwargs, problem)
    _pin_unknown_sizes(out)
    for target in targets:
        for axis, other in zip(out, axes.values[target], strict=True):
            speaker.same(axis, other)
    for axis in follow_indices(node, selections) if selections.index_of or selections.running_sums else ():
        pin(axis, _as_numbers(node))
    for size in _sizes((args, kwargs)) if node in found.sized_args else ():
        if id(size) not in speaker.sizes_used:
            # Used as a number, not as a size: what it stands for must keep its value.
            axes.facts.size_uses.append(SizeUse(size.expr, _number(int(size)), source_line(node)))
    return out


def _split_off_targets(node: fx.Node, kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[fx.Node]]:
    """The keyword arguments without those that only receive the result (``out=``), and the nodes of these."""
    written = _only_written(node.target) if kwargs else ()
    if not written:
        return kwargs, []
    targets = [kwargs[name] for name in written if isinstance(kwargs.get(name), fx.Node)]
    return {name: value for name, value in kwargs.items() if name not in written}, targets


@cache
def _only_written(operator: Any) -> set[str]:
    schema = getattr(operator, "_schema", None)
    return {a.name for a in schema.arguments if a.kwarg_only and a.is_write} if schema is not None else set()


def _as_numbers(node: fx.Node) -> Pin:
    return Pin(f"its indices are used as numbers by {node.target}", source_line(node))


def _pin_indices(axes: AxisMap, nodes: list[fx.Node], why: Pin) -> None:
    """Pin what the values of ``nodes`` index."""
    for node in nodes:
        for key, axis in axes.facts.selections.index_of.items():
            if key is node or (isinstance(key, tuple) and key[0] is node):
                pin(axis, why)


def _number(value: int) -> Any:
    """A pinned stand-in axis: ``expr == value`` whatever is pruned."""
    (axis,) = dims_of((value,))
    pin(axis, Pin("used as a number"))
    return axis


def _sizes(tree: Any) -> list[SizeInt]:
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, (tuple, list)):
        return [size for item in tree for size in _sizes(item)]
    return [tree] if isinstance(tree, SizeInt) else []


def _to_dims(value: Any, values: dict[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return values[value]
    if isinstance(value, (list, tuple)):
        return [_to_dims(item, values) for item in value]
    return value


def _has_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(isinstance(item, torch.Tensor) for item in value)
    return isinstance(value, torch.Tensor)


def _pin_unknown_sizes(out: Any) -> None:
    if not any_stand_ins():
        return
    for dims in out if isinstance(out, list) else [out]:
        for axis in dims or ():
            if any(is_stand_in(leaf.size) for leaf in leaves(axis)):
                pin(axis, Pin("its size depends on values"))


def _fits(out: Any, value: Any) -> bool:
    """The dims a rule returned have the traced shapes."""
    if isinstance(value, torch.Tensor):
        return isinstance(out, tuple) and [a.size for a in out] == [concrete(s) for s in value.shape]
    pairs = list(zip(out, value, strict=False)) if isinstance(out, list) and len(out) == len(value) else []
    return bool(pairs) and all(v is None or _fits(o, v) for o, v in pairs)


def _hidden(found: Trace, axes: AxisMap, node: fx.Node) -> Any:
    """A call of an opaque module."""
    path = found.opaque.calls[str(node.args[2])].path
    inside = [dims for name, dims in axes.tensors.items() if name.startswith(f"{path}.")]
    numbers = sum(math.prod(axis.size for axis in dims) for dims in inside)
    problem = f"cannot be traced; the {numbers:,} numbers it holds are pinned ({found.opaque.why[path]})"
    return _unknown(axes, node, node.args[0], {}, problem, f"module {path}")


def _unknown(axes: AxisMap, node: fx.Node, args: Any, kwargs: Any, problem: str, name: str = "") -> Any:
    name = name or f"operator {node.target}"
    where = source_line(node)
    axes.unruled.setdefault(f"{name.removeprefix('operator ')} {problem}", []).append(where)
    why = Pin(f"{name} {problem}", where)
    for source in node.all_input_nodes:
        _pin_all(axes.values[source], why)
    _pin_indices(axes, node.all_input_nodes, why)
    for size in _sizes((args, kwargs)):
        axes.facts.size_uses.append(SizeUse(size.expr, _number(int(size)), where))
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        out: Any = dims_of(value.shape)
    else:
        out = [dims_of(v.shape) if isinstance(v, torch.Tensor) else None for v in value]
    _pin_all(out, why)
    return out


def _pin_all(dims: Any, why: Pin) -> None:
    if isinstance(dims, list):
        for one in dims:
            _pin_all(one, why)
    elif dims is not None:
        for axis in dims:
            pin(axis, why)
