"""nn.Module → graph: ``torch.export`` on a skeleton of the model, so that no weight is touched or copied."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from itertools import count
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_flatten, tree_unflatten

from graphprune.errors import GraphPruneError, first_line
from graphprune.trace.adapters import show_all_adapters
from graphprune.trace.backends import use_portable
from graphprune.trace.fold_blocks import BLOCK_KEY, CannotFold, Copy, Folder, add_inputs, nobody_looks_inside, unroll
from graphprune.trace.inputs import Inputs
from graphprune.trace.loops import EveryIndex
from graphprune.trace.opaque import CannotHide, Opaque, hide, offender
from graphprune.trace.provenance import (
    META_KEY,
    Call,
    Escape,
    SizeInt,
    SizeRecorder,
    TensorArg,
    moved,
    preserved_annotations,
    wrap_sizes,
)
from graphprune.trace.quiet import (
    einsum_as_written,
    idle_conversions,
    log_level,
    unchecked_distributions,
    without_autocast,
    without_hooks,
)
from graphprune.trace.reads import Reads, find_reads
from graphprune.trace.skeleton import copy_structure, names
from graphprune.trace.source_lines import base_name, frame_of, no_whole_stacks, place_in
from graphprune.trace.writes import written_placeholders

_ENTRY = "model"  # the name of the traced model inside _Entry; stripped from every path


@dataclass(frozen=True)
class Place:
    """Stands for the tensor ``outputs[place]``."""

    place: int


@dataclass
class Trace:
    """A traced model.

    ``module`` runs the model: its placeholders are, in order, the parameters, buffers and constants in
    ``tensor_names`` (placeholder → name in the model), and the tensors in ``inputs``. ``sized_args`` holds the
    arguments of every node with :class:`SizeInt` where an integer's source is known. ``written`` has the names of the
    parameters and buffers that forward writes to in place, ``opaque`` the modules that could not be traced.
    """

    module: fx.GraphModule
    tensor_names: dict[str, str]
    constants: dict[str, torch.Tensor]
    inputs: list[torch.Tensor]
    input_names: list[str]
    outputs: list[fx.Node]
    sized_args: dict[fx.Node, tuple[tuple, dict]]
    call_outputs: dict[int, fx.Node | list[fx.Node]]
    escapes: list[Escape] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    opaque: Opaque = field(default_factory=Opaque)
    rebound: dict[str, fx.Node] = field(default_factory=dict)  # buffer that forward replaces → its new value
    out_spec: Any = None  # the structure that forward returned, None if pytree does not know it
    out_leaves: list[Any] = field(default_factory=list)  # of that structure; a Place for each tensor

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph


def module_path(node: fx.Node) -> str:
    """The path of the innermost module whose forward made ``node``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, *_ = next(reversed(stack.values()))
    return str(path).removeprefix(_ENTRY).lstrip(".")


def source_line(node: fx.Node) -> str:
    """``modeling_x.py:123 layers.0.mlp``: where in the user's code ``node`` comes from."""
    return f"{place_in(node.meta.get('stack_trace') or '')} {module_path(node)}".strip()


def output_tensors(out: Any) -> list[torch.Tensor]:
    """Every tensor in what a forward returned, in a fixed order: tuples, mappings, dataclasses, nested."""
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, Mapping):
        return [t for value in out.values() for t in output_tensors(value)]
    if isinstance(out, (tuple, list)):
        return [t for value in out for t in output_tensors(value)]
    if dataclasses.is_dataclass(out):
        return [t for f in dataclasses.fields(out) for t in output_tensors(getattr(out, f.name))]
    return []


def _structure(out: Any, found: list[torch.Tensor]) -> tuple[Any, list[Any]]:
    """The pytree of an output with a :class:`Place` for each tensor, or (None, []) if it holds anything else."""
    leaves, spec = tree_flatten(out)
    places = {id(tensor): Place(i) for i, tensor in enumerate(found)}
    made = [places.get(id(leaf), leaf) for leaf in leaves]
    made = [int(leaf) if isinstance(leaf, SizeInt) else leaf for leaf in made]
    if sum(isinstance(leaf, Place) for leaf in made) != len(found):
        return None, []
    known = all(isinstance(leaf, (Place, bool, int, float, str, type(None))) for leaf in made)
    return (spec, made) if known else (None, [])


@dataclass
class _Returned:
    """What forward returned; see :func:`_structure`."""

    spec: Any = None
    leaves: list[Any] = field(default_factory=list)
    rebound: list[str] = field(default_factory=list)  # buffers that forward replaced, whose new values come last


class _Entry(nn.Module):
    """The model with tensors in and tensors out; everything else is bound here."""

    def __init__(self, model: nn.Module, spec: Any, leaves: list[Any], recorder: SizeRecorder, reads: Reads):
        super().__init__()
        self.model = model
        self.spec = spec
        self.leaves = leaves
        self.recorder = recorder
        self.reads = reads
        self.returned = _Returned()  # an object: torch.export undoes assignments to a module

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        given = iter(tensors)
        for i, tensor in enumerate(tensors):
            self.recorder.know(tensor, f"input{i}")
        for name, tensor in names(self.model).items():
            self.recorder.know(tensor, name)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        held = names(self.model)
        with self.recorder, self.reads.replayed_in(self.model), EveryIndex(), nobody_looks_inside():
            out = self.model(*args, **kwargs)
        found = output_tensors(out)
        self.returned.spec, self.returned.leaves = _structure(out, found)
        if not found:
            raise GraphPruneError(f"{type(self.model).__name__}.forward returns no tensor: there is nothing to keep.")
        now = names(self.model)
        with torch._C.DisableTorchFunction():
            self.returned.rebound = [
                name for name, old in held.items() if now[name] is not old and now[name].shape == old.shape
            ]
        return [*found, *(now[name] for name in self.returned.rebound)]


def trace(
    model: nn.Module,
    inputs: Inputs,
    *,
    fold: bool = True,
    whole: frozenset[str] = frozenset(),
    hidden: Opaque | None = None,
    reads: Reads | None = None,
) -> Trace:
    """Export ``model`` to an fx graph of ATen operators, with module paths, source lines and size provenance.

    ``inputs`` are real or meta tensors; nothing is computed with them. The model is not touched: what is traced is
    a structural copy that shares its weights, in eval mode and without hooks. With ``fold`` equal blocks are traced
    once (:mod:`graphprune.trace.fold_blocks`), and those in ``whole`` where they are called otherwise; the graph is the
    same without. ``hidden`` are modules to leave opaque (:mod:`graphprune.trace.opaque`); a module that turns out to
    need it is added. ``reads`` are numbers that forward reads out of tensors (:mod:`graphprune.trace.reads`), looked
    for where the graph is none or not plain without.

    Raises :class:`GraphPruneError` naming the line when the forward cannot be traced.
    """
    folder = Folder(whole)
    recorder = SizeRecorder(lambda: folder.current)
    try:
        skeleton = (folder.copy_structure(model) if fold else copy_structure(model)).eval()
    except CannotFold:
        return trace(model, inputs, fold=False, hidden=hidden)
    use_portable(skeleton, tracing=True)
    show_all_adapters(skeleton, tracing=True)
    hidden = hidden or Opaque()
    hidden.install(skeleton)
    wrap_sizes(skeleton, recorder)
    leaves, spec = tree_flatten(inputs)
    given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    entry = _Entry(skeleton, spec, leaves, recorder, reads or Reads())
    try:
        with _undisturbed(skeleton), torch.no_grad(), preserved_annotations(), _silence():
            program = torch.export.export(entry, tuple(given), strict=False)
        found = _read(program, recorder, given, entry.returned.rebound, folder, list(names(model)))
    except Exception as error:
        if folder.missing is not None:
            return trace(model, inputs, whole=folder.more())
        if folder.runs:  # perhaps only because of the folding
            return trace(model, inputs, fold=False)
        if isinstance(error, GraphPruneError):
            raise
        if reads is None and (reads := find_reads(model, inputs)):
            return trace(model, inputs, fold=False, hidden=hidden, reads=reads)
        more = _hide_offender(model, inputs, skeleton, hidden, error)
        return trace(model, inputs, fold=False, hidden=more, reads=reads)
    if reads is None and _has_unknown_numbers(found.graph) and (reads := find_reads(model, inputs)):
        return trace(model, inputs, fold=False, hidden=hidden, reads=reads)
    found.opaque = hidden
    if reads is not None and reads.used and _unused(found, model, reads.used):
        return trace(model, inputs, fold=False, hidden=hidden, reads=Reads())
    _refuse_shared_memory(model, found.written)
    found.out_spec, found.out_leaves = entry.returned.spec, entry.returned.leaves
    found.written |= {name for name in names(model) if hidden.hides(name)}  # perhaps: nobody sees what they do
    found.written |= set(found.rebound)  # which the emitted graph does in place
    return found


def _hide_offender(model: nn.Module, inputs: Inputs, skeleton: nn.Module, hidden: Opaque, error: Exception) -> Opaque:
    """``hidden`` with the module added that ``error`` comes from. Raises what to tell the user where that cannot be."""
    path = offender(skeleton, error)
    try:
        return hide(model, inputs, hidden, path or "", _line(error))
    except CannotHide as reason:
        told = _explain(model, error)
        if path:
            told = GraphPruneError(f"{told} The module {path} cannot be left out of the graph either: {reason}.")
        raise told from error


def _has_unknown_numbers(graph: fx.Graph) -> bool:
    """Whether a number or a size follows from what is in a tensor: no rule can tell what it is."""
    values = {id(value := n.meta.get("val")): value for n in graph.nodes if n.op == "call_function"}  # equal in copies
    return any(map(free_unbacked_symbols, values.values()))


def _unused(found: Trace, model: nn.Module, paths: set[str]) -> list[str]:
    """The parameters of the modules at ``paths`` that the graph does not use, by all their names."""
    held = names(model)
    used = {id(held[found.tensor_names[n.name]]) for n in found.graph.nodes if n.users and n.name in found.tensor_names}
    return [
        name
        for name, tensor in model.named_parameters()
        if id(tensor) not in used
        and not found.opaque.hides(name)
        and any(not path or name.startswith(f"{path}.") for path in paths)
    ]


def _refuse_shared_memory(model: nn.Module, written: set[str]) -> None:
    """A tensor that forward writes to may not be another one's memory as well: sliced, each would have its own."""
    held = names(model) if written else {}
    for name in written:
        storage = held[name].untyped_storage()
        for other, tensor in held.items():
            if tensor is not held[name] and storage.size() and tensor.untyped_storage()._cdata == storage._cdata:
                raise GraphPruneError(
                    f"Forward writes to {name}, whose memory {other} shares. Pruning would part them: make one a real "
                    "copy, or tie them by being the same Parameter."
                )


@contextmanager
def _undisturbed(skeleton: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for quiet in (without_autocast, unchecked_distributions, idle_conversions, einsum_as_written, no_whole_stacks):
            stack.enter_context(quiet())
        with without_hooks(skeleton):
            yield


@contextmanager
def _silence() -> Iterator[None]:
    """torch.export prints the graph and logs guesses when it fails; the error that is raised says it better."""
    with (
        log_level(logging.CRITICAL, "torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor"),
        warnings.catch_warnings(),
        redirect_stderr(StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _line(error: Exception) -> str:
    last = frame_of(error)
    return f"{base_name(last.filename)}:{last.lineno}: {last.line}" if last else type(error).__name__


def _explain(model: nn.Module, error: Exception) -> GraphPruneError:
    last = frame_of(error)
    where = f"{last.filename}:{last.lineno} in {last.name}: {last.line}" if last else "unknown line"
    text = first_line(error)[:300]
    name = type(model).__name__
    kind = type(error).__name__
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    text += ". Forward hooks are not run while tracing" if hooked else ""
    if "DataDependent" in kind or "data-dependent" in str(error).lower() or "unbacked" in str(error).lower():
        return GraphPruneError(
            f"{name}.forward takes a branch or a size from the values of a tensor, at {where}. A graph cannot hold "
            f"that: make the choice outside of forward, or from shapes. ({kind}: {text})"
        )
    if isinstance(error, TypeError) and "argument" in str(error):
        return GraphPruneError(f"{name}.forward did not accept the example inputs: {text}. Pass example_inputs=.")
    return GraphPruneError(f"{name} could not be traced, at {where}. ({kind}: {text})")


def _read(
    program: torch.export.ExportedProgram,
    recorder: SizeRecorder,
    given: list[torch.Tensor],
    replaced: list[str],
    folder: Folder,
    order: list[str],
) -> Trace:
    tensor_names, constants, input_names = {}, {}, []
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            tensor_names[name] = str(spec.target).removeprefix(f"{_ENTRY}.")
        elif spec.kind is InputKind.USER_INPUT:
            input_names.append(name)
        else:
            constant = program.constants[str(spec.target)]
            if not isinstance(constant, torch.Tensor):
                raise GraphPruneError(f"forward uses an object that is no tensor, {spec.target!r}: cannot be traced.")
            constants[name] = constant
    by_name = {node.name: node for node in program.graph.nodes}
    outputs = [
        by_name[spec.arg.name] for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT
    ]
    sized_args, call_outputs, unmatched = _match_calls(program.graph, recorder.calls)
    escapes = [*recorder.escapes, *unmatched]
    placeholders = {name: by_name[placeholder] for placeholder, name in tensor_names.items()}
    add_inputs(program.graph, placeholders, order, folder.outlines())
    tensor_names = {node.name: name for name, node in placeholders.items()}
    copies, gone = unroll(program.graph, placeholders, folder.repeats)
    _repeat_facts(copies, gone, sized_args, call_outputs, escapes)
    # What was matched before blocks were unrolled still names the nodes that are gone.
    sized_args = {node: fx.node.map_arg(found, lambda n: gone.get(n, n)) for node, found in sized_args.items()}
    written = {tensor_names[node.name] for node in written_placeholders(program.graph) if node.name in tensor_names}
    outputs = [gone.get(node, node) for node in outputs]
    plain = len(outputs) - len(replaced)
    return Trace(
        module=program.graph_module,
        tensor_names=tensor_names,
        constants=constants,
        inputs=given,
        input_names=input_names,
        outputs=outputs[:plain],
        sized_args=sized_args,
        call_outputs=call_outputs,
        escapes=escapes,
        written=written,
        rebound=dict(zip(replaced, outputs[plain:], strict=True)),
    )


def _match_calls(
    graph: fx.Graph, calls: dict[int, Call]
) -> tuple[dict[fx.Node, tuple[tuple, dict]], dict[int, fx.Node | list[fx.Node]], list[Escape]]:
    """Put the :class:`SizeInt` of every recorded torch call back into the arguments of the nodes it made."""
    made: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        number = (node.meta.get("custom") or {}).get(META_KEY)
        # Torch adds checks of a tensor's dtype, under the number of the call that made the tensor: they make nothing.
        is_check = node.target is torch.ops.aten._assert_tensor_metadata.default
        if node.op == "call_function" and number is not None and "val" in node.meta and not is_check:
            made.setdefault(number, []).append(node)
    sized: dict[fx.Node, tuple[tuple, dict]] = {}
    outputs: dict[int, fx.Node | list[fx.Node]] = {}
    unmatched: list[Escape] = []
    for number, nodes in made.items():
        outputs[number] = [n for n in nodes if "getitem" not in n.name][-1] if len(nodes) > 1 else nodes[0]
        call = calls.get(number)
        if call is None:
            continue
        sizes = _Sizes(call)
        for node in nodes:
            sized[node] = sizes.put_into(node)
        block = (nodes[-1].meta.get("custom") or {}).get(BLOCK_KEY)
        unmatched += [Escape(size.expr, source_line(nodes[-1]), block) for size in sizes.left_over()]
    return sized, outputs, unmatched


def _repeat_facts(
    copies: list[Copy],
    gone: dict[fx.Node, fx.Node],
    sized_args: dict[fx.Node, tuple[tuple, dict]],
    call_outputs: dict[int, fx.Node | list[fx.Node]],
    escapes: list[Escape],
) -> None:
    """What is known of a traced block holds for its copies, with their names, and calls numbered anew."""
    for node, successor in gone.items():
        call_outputs[node.meta["custom"][META_KEY]] = successor
    numbers = count(max(call_outputs, default=0) + 1)
    made_by = {node: number for number, node in call_outputs.items() if isinstance(node, fx.Node)}
    for copy in copies:
        new = {made_by[old]: next(numbers) for old in copy.nodes if old in made_by}

        def rename(name: str, copy: Copy = copy) -> str:
            inside = name == copy.original or name.startswith((f"{copy.original}.", f"{copy.original}@"))
            return copy.path + name.removeprefix(copy.original) if inside else name

        def renumber(number: int, new: dict[int, int] = new) -> int:
            return new.get(number, number)

        for old, made in copy.nodes.items():
            if old in made_by:
                call_outputs[new[made_by[old]]] = made
            if old in sized_args:
                args, kwargs = sized_args[old]
                sized_args[made] = (
                    tuple(_of_copy(a, b, rename, renumber) for a, b in zip(args, made.args, strict=True)),
                    {key: _of_copy(value, made.kwargs[key], rename, renumber) for key, value in kwargs.items()},
                )
        escapes += [
            Escape(moved(escape.expr, rename, renumber), escape.where)
            for escape in list(escapes)
            if escape.block == copy.template
        ]


def _of_copy(value: Any, made: Any, rename: Callable[[str], str], renumber: Callable[[int], int]) -> Any:
    """An argument of the original as the copy has it: ``made`` is the copy's argument, without known sizes."""
    if isinstance(value, SizeInt):
        return SizeInt(int(value), moved(value.expr, rename, renumber))
    if isinstance(value, (list, tuple)):
        return type(value)(_of_copy(v, m, rename, renumber) for v, m in zip(value, made, strict=True))
    return made


class _Sizes:
    """The integers of one torch call, to be matched, in order and by value, with those of its nodes."""

    def __init__(self, call: Call):
        self.is_index = call.name in ("__getitem__", "__setitem__")
        self.slices = _slices(call) if self.is_index else []
        self.ints = [] if self.is_index else _ints((call.args, call.kwargs))
        self.used: set[int] = set()

    def put_into(self, node: fx.Node) -> tuple[tuple, dict]:
        if self.is_index:
            return self._put_into_slice(node)
        position = 0

        def match(value: Any) -> Any:
            nonlocal position
            if isinstance(value, (tuple, list)):
                return [match(item) for item in value]
            if type(value) is not int:
                return value
            for i in range(position, len(self.ints)):
                if self.ints[i] == value:
                    position = i + 1
                    self.used.add(id(self.ints[i]))
                    return self.ints[i]
            return value

        args = tuple(match(a) for a in node.args)
        return args, {key: match(value) for key, value in node.kwargs.items()}

    def _put_into_slice(self, node: fx.Node) -> tuple[tuple, dict]:
        args = list(node.args)
        if node.target is torch.ops.aten.slice.Tensor:
            rank = node.meta["val"].ndim
            for i, (dim, item) in enumerate(self.slices):
                if dim == args[1] % rank and all(
                    bound is None or int(bound) == args[place]
                    for place, bound in ((2, item.start), (3, item.stop))
                    if place < len(args)
                ):
                    for place, bound in ((2, item.start), (3, item.stop)):
                        if isinstance(bound, SizeInt) and place < len(args):
                            args[place] = bound
                            self.used.add(id(bound))
                    del self.slices[i]
                    break
        return tuple(args), dict(node.kwargs)

    def left_over(self) -> list[SizeInt]:
        bounds = [bound for _, item in self.slices for bound in (item.start, item.stop)]
        return [s for s in (*self.ints, *bounds) if isinstance(s, SizeInt) and id(s) not in self.used]


def _ints(tree: Any) -> list[int]:
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, (tuple, list)):
        return [i for item in tree for i in _ints(item)]
    return [tree] if isinstance(tree, int) and not isinstance(tree, bool) else []


def _slices(call: Call) -> list[tuple[int, slice]]:
    """The slices of an indexing call with the dimension each applies to when its node is made."""
    tensor, index = call.args[0], call.args[1]
    items = index if isinstance(index, tuple) else (index,)

    def width(item: Any) -> int:  # how many dimensions of the tensor an index consumes
        if item is None or item is Ellipsis or isinstance(item, bool):
            return 0
        return item.ndim if isinstance(item, TensorArg) and item.is_bool else 1

    dim, out = 0, []
    for item in items:
        if item is Ellipsis:
            dim += tensor.ndim - sum(width(other) for other in items)
        elif isinstance(item, slice):
            out.append((dim, item))
            dim += 1
        elif item is None or isinstance(item, (TensorArg, bool)):
            dim += 1
    return out
