"""Plan → a smaller ``fx.GraphModule``: the traced graph with its size constants rewritten and its weights sliced.

For models whose Python cannot follow: an integer that is a literal, or that sizes two things at once. In the graph
every such number stands by itself and gets the value that the plan leaves.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils._pytree import tree_flatten

from graphprune.errors import GraphPruneError
from graphprune.ir.axes import Axis, expand_mask
from graphprune.ir.program import Program
from graphprune.ir.selection import Selection
from graphprune.passes.base import compiler_pass
from graphprune.passes.rewrite import collect_slices, like, sliced
from graphprune.rules.registry import Dims
from graphprune.trace.export import Place, Trace
from graphprune.trace.skeleton import names

aten = torch.ops.aten
Rewritten = tuple[Any, tuple]  # the operator and its arguments


@dataclass
class Sizes:
    """The sizes of a graph's tensors before and after the plan."""

    values: dict[fx.Node, Any]
    selection: Selection

    def dims(self, node: Any) -> Dims:
        return self.values[node]

    def after(self, axis: Axis) -> int:
        return self.kept(axis, 0, axis.size)

    def kept(self, axis: Axis, start: int, end: int) -> int:
        """How many of the indices ``start … end-1`` stay: as many in every row of a ragged axis."""
        return int(expand_mask(axis, self._mask)[start:end].sum())

    def _mask(self, leaf: Axis) -> torch.Tensor | None:
        kept = self.selection.get(leaf)
        return None if kept is None else kept.mask.view(-1, leaf.size)[0]


def _as_output(place: int) -> Callable[[fx.Node, Sizes], Rewritten]:
    """The argument at ``place`` has one size for every dimension of the output; -1 stays."""

    def rewritten(node: fx.Node, sizes: Sizes) -> Rewritten:
        given: Sequence[Any] = node.args[place]  # type: ignore[assignment]
        new = [-1 if n == -1 else sizes.after(axis) for n, axis in zip(given, sizes.dims(node), strict=True)]
        return node.target, (*node.args[:place], new, *node.args[place + 1 :])

    return rewritten


def _unflatten(node: fx.Node, sizes: Sizes) -> Rewritten:
    x, dim, given, *rest = node.args
    out = sizes.dims(node)[dim % len(sizes.dims(x)) :]
    return node.target, (x, dim, [-1 if n == -1 else sizes.after(a) for n, a in zip(given, out, strict=False)], *rest)


def _repeat(node: fx.Node, sizes: Sizes) -> Rewritten:
    x, _, *rest = node.args
    out = sizes.dims(node)
    given = (*(None for _ in range(len(out) - len(sizes.dims(x)))), *sizes.dims(x))
    new = [sizes.after(a) // (1 if b is None else sizes.after(b)) for a, b in zip(out, given, strict=True)]
    return node.target, (x, new, *rest)


def _repeat_interleave(node: fx.Node, sizes: Sizes) -> Rewritten:
    x, _, *rest = node.args
    before = after = 1
    for axis in sizes.dims(x):
        before *= sizes.after(axis)
    for axis in sizes.dims(node):
        after *= sizes.after(axis)
    return node.target, (x, after // before, *rest)


def _slice(node: fx.Node, sizes: Sizes) -> Rewritten:
    x, dim, start, end, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    axis = sizes.dims(x)[dim]
    low, high, _ = slice(start, end, 1).indices(axis.size)
    to_the_end = high == axis.size
    if step == 1:
        low, high = sizes.kept(axis, 0, low), sizes.kept(axis, 0, max(low, high))
    return node.target, (x, dim, low, 2**63 - 1 if to_the_end else high, step)


def _narrow(node: fx.Node, sizes: Sizes) -> Rewritten:
    x, dim, start, length = node.args
    axis = sizes.dims(x)[dim]
    return node.target, (x, dim, sizes.kept(axis, 0, start), sizes.kept(axis, start, start + length))


def _split(node: fx.Node, sizes: Sizes) -> Rewritten:
    """Every way of splitting becomes one with given sizes."""
    x, _, dim = (*node.args, 0)[:3]
    pieces = [sizes.after(dims[dim]) for dims in sizes.dims(node)]
    return aten.split_with_sizes.default, (x, pieces, dim)


def _groups(place: int) -> Callable[[fx.Node, Sizes], Rewritten]:
    """Convolutions: as many groups as the channels of the input over those of a kernel."""

    def rewritten(node: fx.Node, sizes: Sizes) -> Rewritten:
        if len(node.args) <= place:
            return node.target, node.args
        x, weight = sizes.dims(node.args[0]), sizes.dims(node.args[1])
        channels = x[1 if len(x) == len(weight) else 0]
        groups = sizes.after(channels) // sizes.after(weight[1]) if node.args[place] != 1 else 1
        return node.target, (*node.args[:place], groups, *node.args[place + 1 :])

    return rewritten


def _group_norm(node: fx.Node, sizes: Sizes) -> Rewritten:
    x, groups, *rest = node.args
    channels = sizes.dims(x)[1]
    return node.target, (x, sizes.after(channels) // (channels.size // groups), *rest)


def _normalised_shape(node: fx.Node, sizes: Sizes) -> Rewritten:
    x, shape, *rest = node.args
    return node.target, (x, [sizes.after(axis) for axis in sizes.dims(x)[-len(shape) :]], *rest)


REWRITES: dict[Any, Callable[[fx.Node, Sizes], Rewritten]] = {
    **dict.fromkeys(
        [aten.view.default, aten.reshape, aten._unsafe_view, aten.expand, aten.broadcast_to], _as_output(1)
    ),
    **dict.fromkeys([aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full], _as_output(1)),
    **dict.fromkeys([aten.zeros, aten.ones, aten.empty, aten.full], _as_output(0)),
    **dict.fromkeys([aten.split.Tensor, aten.split_with_sizes, aten.split.sizes, aten.chunk], _split),
    **dict.fromkeys([aten.conv1d, aten.conv2d, aten.conv3d], _groups(6)),
    aten.convolution: _groups(8),
    **dict.fromkeys([aten.layer_norm, aten.rms_norm], _normalised_shape),
    aten.group_norm: _group_norm,
    aten.unflatten: _unflatten,
    aten.repeat: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.slice: _slice,
    aten.narrow: _narrow,
}


def rewrite_of(target: Any) -> Callable[[fx.Node, Sizes], Rewritten] | None:
    """How the size arguments of an operator are rewritten; None if nobody knows."""
    return REWRITES.get(target) or REWRITES.get(getattr(target, "overloadpacket", None))


def state_scales(found: Trace) -> None:
    """Write the default scale of fused attention, 1/√width, into the graph: it then outlives the width."""
    for node in found.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default and node.kwargs.get("scale") is None:
            scale = node.args[0].meta["val"].shape[-1] ** -0.5
            node.kwargs = {**node.kwargs, "scale": scale}
            if node in found.sized_args:
                args, kwargs = found.sized_args[node]
                found.sized_args[node] = (args, {**kwargs, "scale": scale})


@compiler_pass(requires=("plan", "axes"), ensures=("pruned",))
def emit_graph(program: Program) -> None:
    """Build the pruned graph module. Its forward takes what forward took of the example inputs, of the same shapes.

    Raises :class:`GraphPruneError` when a part of the model is in no graph.
    """
    found: Trace = program.need("trace")
    if found.opaque.why:
        raise GraphPruneError(
            f"emit='graph' needs all of the model in the graph; {', '.join(found.opaque.why)} cannot be traced."
        )
    root = _weights(program, found)
    graph = _graph(program, found, root)
    made = fx.GraphModule(root, graph, class_name=f"Pruned{type(program.model).__name__}")
    for path, module in made.named_modules():  # fx makes every buffer persistent
        module._non_persistent_buffers_set |= root.get_submodule(path)._non_persistent_buffers_set
    made.train(program.model.training)
    program.pruned = made


def _weights(program: Program, found: Trace) -> nn.Module:
    """A bare module with the sliced parameters, buffers and constants that the graph uses, under their own names."""
    root = nn.Module()
    slices = collect_slices(program)
    canonical = program.need("axes").canonical
    held = names(program.model)
    used = [node.name for node in found.graph.nodes if node.op == "placeholder" and node.users]
    for name in dict.fromkeys(canonical[found.tensor_names[n]] for n in used if n in found.tensor_names):
        tensor = held[name]
        path, _, last = name.rpartition(".")
        owner = _submodule(root, path)
        new = like(tensor, sliced(program.weight(tensor), slices.get(id(tensor), {})))
        if isinstance(new, nn.Parameter):
            owner.register_parameter(last, new)
        else:
            kept = last not in program.model.get_submodule(path)._non_persistent_buffers_set
            owner.register_buffer(last, new, persistent=kept)
    for name, constant in found.constants.items():
        root.register_buffer(f"constant_{name}", constant, persistent=False)
    return root


def _submodule(root: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else []:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    return root


def _graph(program: Program, found: Trace, root: nn.Module) -> fx.Graph:
    sizes = Sizes(program.need("axes").values, program.selection())
    canonical = program.need("axes").canonical
    graph = fx.Graph(root)
    copies: dict[fx.Node, Any] = dict(zip(_placeholders(found), _inputs(program, graph), strict=True))
    states: dict[str, fx.Node] = {}

    def state(name: str) -> fx.Node:
        if name not in states:
            states[name] = graph.get_attr(name)
        return states[name]

    for node in found.graph.nodes:
        if node.op == "placeholder" and node not in copies and node.users:
            name = found.tensor_names.get(node.name)
            copies[node] = state(f"constant_{node.name}" if name is None else canonical[name])
        elif node.target is torch.ops.graphprune.enter.default:
            copies[node] = [copies[source] for source in node.args[0]]
        elif node.target is operator.getitem and isinstance(copies[node.args[0]], list):
            copies[node] = copies[node.args[0]][node.args[1]]
        elif node.op == "call_function" and node.target is not aten._assert_tensor_metadata.default:
            rewrite = rewrite_of(node.target)
            target, args = (node.target, node.args) if rewrite is None else rewrite(node, sizes)
            args, kwargs = fx.node.map_arg((args, node.kwargs), lambda source: copies[source])
            copies[node] = graph.call_function(target, args, kwargs)
    for name, node in found.rebound.items():
        graph.call_function(aten.copy_.default, (state(canonical[name]), copies[node]))
    _output(program, found, graph, [copies[node] for node in found.outputs])
    return graph


def _placeholders(found: Trace) -> list[fx.Node]:
    by_name = {node.name: node for node in found.graph.nodes if node.op == "placeholder"}
    return [by_name[name] for name in found.input_names]


def _inputs(program: Program, graph: fx.Graph) -> list[fx.Node]:
    """A placeholder for everything in the example inputs; those of the tensors are returned."""
    leaves, spec = tree_flatten(program.inputs)
    args, kwargs = program.inputs
    declared = inspect.signature(program.model.forward).parameters.values()
    positional = [p.name for p in declared if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    called = [positional[i] if i < len(positional) else f"argument_{i}" for i in range(len(args))]
    nodes = [graph.placeholder(f"input_{i}") for i in range(len(leaves))]
    graph._codegen = _PyTreeCodeGen(_PyTreeInfo([*called, *kwargs], spec, None))
    return [node for node, leaf in zip(nodes, leaves, strict=True) if isinstance(leaf, torch.Tensor)]


def _output(program: Program, found: Trace, graph: fx.Graph, tensors: list[fx.Node]) -> None:
    """The structure that forward returned if pytree knows it, else a tuple of all tensors."""
    if found.out_spec is None:
        graph.output(tuple(tensors))
        return
    codegen: Any = graph._codegen
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=found.out_spec)
    graph.output([tensors[leaf.place] if isinstance(leaf, Place) else leaf for leaf in found.out_leaves])
