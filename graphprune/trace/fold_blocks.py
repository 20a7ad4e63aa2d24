"""Trace repeated blocks once.

The layers of a deep model are the same program on other weights. While tracing, the first of a run of equal blocks is
traced; for each further one there is an empty *outline*, which leaves a single node. :func:`unroll` afterwards replaces
it by a copy of the first one's nodes on its own weights. The result is the graph that tracing every block would have
given, and what torch.export sees of the weights of a deep model are those of one block.

Blocks are equal when their modules have the same classes, attributes and tensor shapes all the way down, no tensor of
theirs is shared, and they are called with the same kinds of arguments. A number that counts the blocks (a layer index)
may differ as long as nobody looks at it while the block is traced. Neither may anybody look into an outline.
"""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import torch
import torch.fx.traceback as fx_traceback
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from graphprune.trace.provenance import SizeInt, plain
from graphprune.trace.skeleton import copy_structure, tensors

MINIMUM = 3  # blocks in a run: fewer are not worth it
BLOCK_KEY = "graphprune_block"
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class CannotFold(Exception):
    """A block did something that a copy of its nodes would not repeat; the model has to be traced in full."""


@torch.library.custom_op("graphprune::enter", mutates_args=())
def enter_block(tensors: list[torch.Tensor], block: str) -> list[torch.Tensor]:
    """The inputs of a block that is traced, as they are."""
    return [tensor.clone() for tensor in tensors]


@enter_block.register_fake
def _(tensors: list[torch.Tensor], block: str) -> list[torch.Tensor]:
    return [torch.empty_like(tensor) for tensor in tensors]


# Stands for output ``output`` of call ``call`` of a block like one traced before, whose output is ``like``. It is never
# run, and of all ways to define an operator this is the one that is traced soonest.
torch.library.define("graphprune::repeat", "(Tensor[] tensors, Tensor like, int call, int output) -> Tensor")


@torch.library.register_fake("graphprune::repeat")
def _(tensors: list[torch.Tensor], like: torch.Tensor, call: int, output: int) -> torch.Tensor:
    return torch.empty_like(like)


class Counter:
    """A number that counts the blocks, such as a layer index, and notices when it is looked at.

    It is no subclass of int, because Python reads those (as an index of a list, say) without asking them.
    """

    looked_at = False

    def __init__(self, value: int):
        self._value = value

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        Counter.looked_at = True  # isinstance asks
        return int


def _noticing(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: Counter, *args: Any) -> Any:
        Counter.looked_at = True
        return plain(self._value, *args)

    return method


_LOOKS = (
    "add radd sub rsub mul rmul floordiv rfloordiv truediv rtruediv mod rmod divmod pow rpow and or xor lshift rshift "
    "eq ne lt le gt ge bool index int float hash neg abs str repr format"
)
for _name in _LOOKS.split(" "):
    if hasattr(int, f"__{_name}__"):
        setattr(Counter, f"__{_name}__", _noticing(f"__{_name}__"))


class _Unseen(dict):
    """What an outline has in the place of its tensors and children: nothing, and it notices being looked at."""

    looked_at = False

    def __init__(self, names: Iterable[str]):
        super().__init__()
        self._names = frozenset(names)

    def __contains__(self, name: object) -> bool:  # nn.Module asks for every attribute
        _Unseen.looked_at = _Unseen.looked_at or name in self._names
        return False


def _noticed(name: str) -> Callable[..., Any]:
    plain = getattr(dict, name)

    def method(self: _Unseen, *args: Any) -> Any:
        _Unseen.looked_at = True
        return plain(self, *args)

    return method


for _name in ("__getitem__", "__setitem__", "__delitem__", "__iter__", "__len__", "get", "keys", "values", "items"):
    setattr(_Unseen, _name, _noticed(_name))


@contextmanager
def nobody_looks_inside() -> Iterator[None]:
    """Raises :class:`CannotFold` when what runs inside looked into an outline."""
    _Unseen.looked_at = False
    yield
    if _Unseen.looked_at:
        raise CannotFold("a repeated block is looked into from outside")


@dataclass(frozen=True)
class Run:
    """Equal blocks by their paths; ``counting`` has the integers that number them, as (path inside, attribute)."""

    paths: list[str]
    counting: list[tuple[str, str]]


@dataclass
class _Template:
    """A call of a block that was traced: what it was called with, and what it returned."""

    number: int
    path: str
    call: tuple
    tensors: list[torch.Tensor]
    versions: list[int]
    outputs: list[Any]
    spec: Any


@dataclass(frozen=True)
class Repeat:
    """A call like that of the template numbered ``template``: the same tensors went in but for those at ``places``."""

    path: str
    original: str
    template: int
    places: list[int]


@dataclass
class Folder:
    """Copies a model such that of every run of equal blocks one is traced.

    The others are copied as outlines, but for those in ``whole``. ``current`` is the number of the template that is
    being traced, ``missing`` the path of an outline that had to be traced.
    """

    whole: frozenset[str] = frozenset()
    runs: list[Run] = field(default_factory=list)
    repeats: list[Repeat] = field(default_factory=list)
    current: int | None = None
    missing: str | None = None
    _templates: dict[str, list[_Template]] = field(default_factory=dict)
    _traced: int = 0

    def copy_structure(self, model: nn.Module) -> nn.Module:
        """See :func:`graphprune.trace.skeleton.copy_structure`. Raises :class:`CannotFold`."""
        self.runs = _all_runs(model)
        outlined = [model.get_submodule(path) for path in self.outlines()]
        memo: dict[int, Any] = {id(block): type(block).__new__(type(block)) for block in outlined}
        skeleton = copy_structure(model, memo=memo)
        for block in outlined:
            _outline(block, memo)
        if any(id(inner) in memo for block in outlined for inner in block.modules() if inner is not block):
            raise CannotFold("something else holds a module inside a repeated block")
        for run in self.runs:
            _count_noticeably(skeleton, run)
            for path in run.paths:
                block = skeleton.get_submodule(path)
                block.forward = types.MethodType(self._folded(run.paths[0], path, type(block).forward), block)
        return skeleton

    def outlines(self) -> dict[str, str]:
        """Path of every block that is an outline → path of the first of its run."""
        return {path: run.paths[0] for run in self.runs for path in run.paths[1:] if path not in self.whole}

    def more(self) -> frozenset[str]:
        """``whole`` with the missing block; at the second one that a run misses, with all of the run."""
        run = next(run for run in self.runs if self.missing in run.paths)
        return self.whole.union([self.missing or ""] if self.whole.isdisjoint(run.paths) else run.paths)

    def _folded(self, run: str, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        is_outline = path in self.outlines()

        def folded(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            leaves, spec = tree_flatten((args, kwargs))
            call = (spec, tuple(_kind(leaf) for leaf in leaves))
            known = next((t for t in self._templates.get(run, ()) if t.call == call), None)
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            if known is not None and self.current is None:
                return self._repeat(path, known, tensors)
            if is_outline:
                self.missing = path
                raise CannotFold(f"{path} is called in another way than the first of its kind")
            if not tensors or self.current is not None:
                return forward(block, *args, **kwargs)
            return self._trace(run, path, call, leaves, spec, block, lambda a, k: forward(block, *a, **k))

        return folded

    def _repeat(self, path: str, known: _Template, tensors: list[torch.Tensor]) -> Any:
        before = list(zip(known.tensors, known.versions, strict=True))
        with torch._C.DisableTorchFunction():  # as in _kind
            places = [i for i, new in enumerate(tensors) if new is not before[i][0] or new._version != before[i][1]]
        call = len(self.repeats)
        self.repeats.append(Repeat(path, known.path, known.number, places))
        changed, outputs = [tensors[i] for i in places], list(known.outputs)
        for i, output in enumerate(outputs):
            if isinstance(output, torch.Tensor):
                outputs[i] = torch.ops.graphprune.repeat.default(changed, output, call, i)
        return tree_unflatten(outputs, known.spec)

    def _trace(
        self,
        run: str,
        path: str,
        call: tuple,
        leaves: list[Any],
        spec: Any,
        block: nn.Module,
        forward: Callable[[Any, Any], Any],
    ) -> Any:
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self._traced += 1
        number = self.current = self._traced
        given_versions = [tensor._version for tensor in tensors]
        Counter.looked_at = False
        try:
            with fx_traceback.annotate({BLOCK_KEY: number}):
                entered = enter_block(tensors, path)
                versions = [tensor._version for tensor in entered]
                held = list(map(id, block.buffers()))
                given = iter(entered)
                args, kwargs = tree_unflatten(
                    [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec
                )
                out = forward(args, kwargs)
        finally:
            self.current = None
        outputs, out_spec = tree_flatten(out)
        if Counter.looked_at:
            raise CannotFold(f"{path} looks at its number")
        if versions != [tensor._version for tensor in entered]:
            raise CannotFold(f"{path} writes into its inputs")
        if held != list(map(id, block.buffers())):
            raise CannotFold(f"{path} replaces its buffers")
        if not all(isinstance(output, (*_PLAIN, torch.Tensor)) for output in outputs):
            raise CannotFold(f"{path} returns an object that is no tensor")
        made = _Template(number, path, call, tensors, given_versions, outputs, out_spec)
        self._templates.setdefault(run, []).append(made)
        return out


def _outline(block: nn.Module, memo: dict[int, Any]) -> None:
    """Give the copy of ``block`` in ``memo`` all that the block itself has, but nothing that is inside it."""
    own = vars(memo[id(block)])
    own.update(copy.deepcopy({name: value for name, value in vars(block).items() if name not in _INSIDE}, memo))
    own.update((kind, _Unseen(held) if (held := vars(block)[kind]) else {}) for kind in _INSIDE)


_INSIDE = ("_parameters", "_buffers", "_modules")


def _kind(leaf: Any) -> Any:
    """What must agree for two calls to trace alike."""
    if isinstance(leaf, torch.Tensor):
        with torch._C.DisableTorchFunction():  # looking at the shape here is not forward's doing
            shape = tuple(leaf.shape)
        return (shape, leaf.dtype, leaf.device, leaf.requires_grad)
    if isinstance(leaf, SizeInt):
        return (SizeInt, plain(leaf))
    return (type(leaf), leaf) if isinstance(leaf, _PLAIN) else id(leaf)


def _all_runs(model: nn.Module) -> list[Run]:
    """Every run of equal blocks in ``model``, none inside another."""
    shared = _shared_tensors(model)
    taken: list[str] = []
    found: list[Run] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(path.startswith(f"{t}.") for t in taken):
            continue
        for run in _runs(path, module, shared):
            taken += run.paths
            found.append(run)
    return found


def _shared_tensors(model: nn.Module) -> set[int]:
    """The ids of all tensors that have several names."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, module in model.named_modules(remove_duplicate=False):
        held = [id(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        shared.update(seen.intersection(held) if len(set(held)) == len(held) else held)
        seen.update(held)
    return shared


def _runs(path: str, container: nn.Module, shared: set[int]) -> Iterator[Run]:
    """The children of a container that are equal, at least ``MINIMUM`` of them."""
    alike: dict[Any, list[tuple[int, str, _Integers]]] = {}
    for place, (name, block) in enumerate(container.named_children()):
        is_called = type(block).forward is not nn.Module.forward  # a list of modules is not
        if is_called and "forward" not in vars(block) and shared.isdisjoint(map(id, tensors(block))):
            integers: _Integers = {}
            alike.setdefault(_signature(block, integers), []).append((place, f"{path}.{name}".lstrip("."), integers))
    for blocks in alike.values():
        columns = {key: [integers[key] for _, _, integers in blocks] for key in blocks[0][2]}
        changing = {key: column for key, column in columns.items() if len(set(column)) > 1}
        counting = [key for key, column in changing.items() if _counts(column, [place for place, _, _ in blocks])]
        same: dict[tuple, list[str]] = {}
        for i, (_, name, _) in enumerate(blocks):
            telling = tuple(column[i] for key, column in changing.items() if key not in counting)
            same.setdefault(telling, []).append(name)
        yield from (Run(run, counting) for run in same.values() if len(run) >= MINIMUM)


_Integers = dict[tuple[str, str], int]  # (path of a module inside a block, attribute) → value


def _counts(column: list[int], places: list[int]) -> bool:
    """The integers number the blocks."""
    return len({value - place for value, place in zip(column, places, strict=True)}) == 1


def _signature(block: nn.Module, integers: _Integers) -> tuple:
    """Equal for blocks that are the same program up to their integers, which are added to ``integers``."""
    out: list[Any] = []
    for path, module in block.named_modules():
        attributes = []
        for name in sorted(vars(module).keys() - _STATE):
            value = vars(module)[name]
            if type(value) is int:
                integers[path, name] = value
                attributes.append((name, int))
            else:
                attributes.append((name, _attribute(value)))
        tensors = tuple(
            (name, None if t is None else (tuple(t.shape), t.dtype, t.device, t.requires_grad))
            for name, t in (*module._parameters.items(), *module._buffers.items())
        )
        out.append((path, type(module), tuple(attributes), tensors))
    return tuple(out)


# What nn.Module itself keeps in a module; tensors and children are compared by their own.
_STATE = set(vars(nn.Module()))


def _attribute(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, (list, tuple)) and all(isinstance(item, _PLAIN) for item in value):
        return (type(value), tuple(value))
    if isinstance(value, types.MethodType):
        return value.__func__
    return id(value)


def _count_noticeably(skeleton: nn.Module, run: Run) -> None:
    """Make a :class:`Counter` of every integer that numbers equal blocks."""
    for block in map(skeleton.get_submodule, run.paths):
        inside: dict[str, Any] = dict(block.named_modules())
        for path, name in run.counting:
            if path in inside:  # of an outline only the block itself
                vars(inside[path])[name] = Counter(vars(inside[path])[name])


@dataclass
class Copy:
    """One block's copy of the nodes of a template: ``nodes`` maps original → copy."""

    path: str
    original: str
    template: int
    nodes: dict[fx.Node, fx.Node]


def add_inputs(
    graph: fx.Graph, placeholders: dict[str, fx.Node], order: Iterable[str], outlines: dict[str, str]
) -> None:
    """Give ``graph`` the tensors of the ``outlines`` (path → path of the block it is like) as placeholders.

    ``placeholders`` maps tensor names to nodes, and gets the new ones; ``order`` has all names in the order of the
    model.
    """
    inside: dict[str, list[str]] = {path: [] for path in outlines.values()}
    for name in placeholders:
        for path in inside:
            if name.startswith(f"{path}."):
                inside[path].append(name.removeprefix(path))
    hidden = {path + rest: original + rest for path, original in outlines.items() for rest in inside[original]}
    used = {node.name for node in graph.nodes}
    before = next(iter(graph.nodes))
    for name in order:
        if name in placeholders:
            before = placeholders[name]
        elif name in hidden:
            like = placeholders[hidden[name]]
            wanted = like.name.removesuffix(_identifier(hidden[name])) + _identifier(name)
            with graph.inserting_after(before):
                before = placeholders[name] = graph.placeholder(wanted)
            before.meta = dict(like.meta)
            if before.name in used:
                raise CannotFold(f"{before.name} is the name of two values")
            used.add(before.name)


def _identifier(name: str) -> str:
    """How torch.export writes the name of a tensor in the name of its placeholder."""
    return re.sub(r"[^a-zA-Z0-9]", "_", name).lower()


def unroll(
    graph: fx.Graph, placeholders: dict[str, fx.Node], repeats: list[Repeat]
) -> tuple[list[Copy], dict[fx.Node, fx.Node]]:
    """Replace every ``graphprune::repeat`` node by the output of a copy of the block it repeats.

    ``placeholders`` maps tensor names to nodes. Returns the copies and, for every node that is gone, its successor.
    """
    templates: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        number = (node.meta.get("custom") or {}).get(BLOCK_KEY)
        if number is not None and node.op == "call_function":
            templates.setdefault(number, []).append(node)
    names_of = {node: name for name, node in placeholders.items()}
    copies: dict[int, Copy] = {}
    gone: dict[fx.Node, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.graphprune.repeat.default):
        changed, like, call, _ = node.args
        repeat = repeats[call]
        if call not in copies:
            with graph.inserting_before(node):
                made = _copied(graph, templates[repeat.template], repeat, changed, names_of, placeholders)
            copies[call] = Copy(repeat.path, repeat.original, repeat.template, made)
        made = copies[call].nodes
        gone[node] = made[_of_block(like, made)]
        node.replace_all_uses_with(gone[node])
        graph.erase_node(node)
    return list(copies.values()), gone


def _copied(
    graph: fx.Graph,
    template: list[fx.Node],
    repeat: Repeat,
    changed: list[fx.Node],
    names_of: dict[fx.Node, str],
    placeholders: dict[str, fx.Node],
) -> dict[fx.Node, fx.Node]:
    """Original → copy of every node of the template, on the weights of the block at ``repeat.path``."""
    path, original = repeat.path, repeat.original
    made: dict[fx.Node, fx.Node] = {}

    def moved(source: fx.Node) -> fx.Node:
        if source in made:
            return made[source]
        name = names_of.get(source)
        if name is not None and name.startswith(f"{original}."):
            return placeholders[path + name.removeprefix(original)]
        return source

    for source in template:
        # Not graph.node_copy, nor with the arguments at once: torch would look for symbolic numbers among them.
        node = made[source] = graph.create_node(source.op, source.target, name=source.name)
        if source.target is torch.ops.graphprune.enter.default:
            tensors: list[Any] = list(cast("Any", source.args[0]))
            for place, tensor in zip(repeat.places, changed, strict=True):
                tensors[place] = tensor
            node.args = (tensors, path)
        else:
            node.args = fx.map_arg(source.args, moved)
            if source.kwargs:
                node.kwargs = fx.map_arg(source.kwargs, moved)
        node.meta.update(source.meta)
        node.meta["nn_module_stack"] = _moved_stack(source, original, path)
    return made


def _of_block(node: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """The node of the block behind one of its outputs.

    What returns the tensor it was given, as ``x.to(its own dtype)`` and in-place operators do, takes over its name in
    the graph even after the block.
    """
    while node not in made:
        source = node.args[0]
        if not isinstance(source, fx.Node):
            raise CannotFold(f"{node.name} is no output of the block")
        node = source
    return node


def _moved_stack(node: fx.Node, original: str, path: str) -> Any:
    """The innermost module of the node, under the name it has in the copy; nobody asks for the outer ones."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return stack
    key, (where, *rest) = next(reversed(stack.items()))
    return {key: (_moved_path(where, original, path), *rest)}


@lru_cache(maxsize=4096)
def _moved_path(text: str, original: str, path: str) -> str:
    head, found, tail = f"{text}.".partition(f".{original}.")
    return f"{head}.{path}.{tail}".rstrip(".") if found else text
