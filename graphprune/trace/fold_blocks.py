"""Trace repeated blocks once.

The layers of a deep model are the same program on other weights. While tracing, the first of a run of equal blocks is
traced; each further one leaves a single node, which :func:`unroll` afterwards replaces by a copy of the first one's
nodes on its own weights. The result is the graph that tracing every block would have given.

Blocks are equal when their modules have the same classes, attributes and tensor shapes all the way down, no tensor of
theirs is shared, and they are called with the same kinds of arguments. A number that counts the blocks (a layer index)
may differ as long as nobody looks at it while the block is traced.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from graphprune.trace.provenance import SizeInt, plain
from graphprune.trace.skeleton import names

MINIMUM = 3  # blocks in a run: fewer are not worth it
BLOCK_KEY = "graphprune_block"
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class CannotFold(Exception):
    """A block did something that a copy of its nodes would not repeat; the model has to be traced in full."""


@torch.library.custom_op("graphprune::enter", mutates_args=())
def enter_block(tensors: list[torch.Tensor], block: str) -> list[torch.Tensor]:
    """The inputs of a block that is traced, as they are."""
    return [tensor.clone() for tensor in tensors]


@torch.library.custom_op("graphprune::repeat", mutates_args=())
def repeat_block(tensors: list[torch.Tensor], like: list[torch.Tensor], block: str) -> list[torch.Tensor]:
    """Stands for a block like one traced before; its outputs have the shapes of ``like``."""
    return [torch.empty_like(tensor) for tensor in like]


@enter_block.register_fake
def _(tensors: list[torch.Tensor], block: str) -> list[torch.Tensor]:
    return [torch.empty_like(tensor) for tensor in tensors]


@repeat_block.register_fake
def _(tensors: list[torch.Tensor], like: list[torch.Tensor], block: str) -> list[torch.Tensor]:
    return [torch.empty_like(tensor) for tensor in like]


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


@dataclass
class _Template:
    """What a traced block returned, and for which call."""

    path: str
    call: tuple
    outputs: list[Any]
    spec: Any


@dataclass
class Folder:
    """Installs itself on the blocks of a skeleton. ``runs`` has the paths of equal blocks, first one first."""

    runs: list[list[str]] = field(default_factory=list)
    current: str | None = None
    _templates: dict[str, list[_Template]] = field(default_factory=dict)

    def install(self, model: nn.Module) -> None:
        """Let every run of equal blocks in ``model`` (a skeleton) be traced once."""
        shared = _shared_tensors(model)
        taken: list[str] = []
        for path, module in model.named_modules():
            if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(path.startswith(f"{t}.") for t in taken):
                continue
            for run in _runs(path, module, shared):
                taken += run
                self.runs.append(run)
                blocks = [model.get_submodule(name) for name in run]
                _count_noticeably(blocks)
                for block_path, block in zip(run, blocks, strict=True):
                    block.forward = types.MethodType(self._folded(run[0], block_path, type(block).forward), block)

    def _folded(self, run: str, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def folded(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.current is not None:
                return forward(block, *args, **kwargs)
            leaves, spec = tree_flatten((args, kwargs))
            call = (spec, tuple(_kind(leaf) for leaf in leaves))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            if not tensors:
                return forward(block, *args, **kwargs)
            known = next((t for t in self._templates.get(run, ()) if t.call == call), None)
            if known is None or known.path == path:
                return self._trace(run, path, call, leaves, spec, block, lambda a, k: forward(block, *a, **k))
            like = [output for output in known.outputs if isinstance(output, torch.Tensor)]
            made = iter(repeat_block(tensors, like, f"{path}={known.path}"))
            return tree_unflatten([next(made) if isinstance(o, torch.Tensor) else o for o in known.outputs], known.spec)

        return folded

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
        self.current, Counter.looked_at = path, False
        try:
            with fx_traceback.annotate({BLOCK_KEY: path}):
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
        self._templates.setdefault(run, []).append(_Template(path, call, outputs, out_spec))
        return out


def _kind(leaf: Any) -> Any:
    """What must agree for two calls to trace alike."""
    if isinstance(leaf, torch.Tensor):
        with torch._C.DisableTorchFunction():  # looking at the shape here is not forward's doing
            shape = tuple(leaf.shape)
        return (shape, leaf.dtype, leaf.device, leaf.requires_grad)
    if isinstance(leaf, SizeInt):
        return (SizeInt, plain(leaf))
    return (type(leaf), leaf) if isinstance(leaf, _PLAIN) else id(leaf)


def _shared_tensors(model: nn.Module) -> set[int]:
    seen: dict[int, int] = {}
    for tensor in names(model).values():
        seen[id(tensor)] = seen.get(id(tensor), 0) + 1
    return {key for key, count in seen.items() if count > 1}


def _runs(path: str, container: nn.Module, shared: set[int]) -> Iterator[list[str]]:
    """The children of a container that are equal, as lists of paths of at least ``MINIMUM``."""
    alike: dict[Any, list[tuple[int, str, list[int]]]] = {}
    for place, (name, block) in enumerate(container.named_children()):
        if "forward" not in vars(block) and not any(id(t) in shared for t in names(block).values()):
            integers: list[int] = []
            alike.setdefault(_signature(block, integers), []).append((place, f"{path}.{name}".lstrip("."), integers))
    for blocks in alike.values():
        same: dict[tuple, list[str]] = {}
        columns = list(zip(*(integers for _, _, integers in blocks), strict=True))
        telling = [column for column in columns if not _is_constant(column) and not _counts(column, blocks)]
        for i, (_, name, _) in enumerate(blocks):
            same.setdefault(tuple(column[i] for column in telling), []).append(name)
        yield from (run for run in same.values() if len(run) >= MINIMUM)


def _is_constant(column: tuple[int, ...]) -> bool:
    return len(set(column)) == 1


def _counts(column: tuple[int, ...], blocks: list[tuple[int, str, list[int]]]) -> bool:
    """The integers number the blocks."""
    return len({value - place for value, (place, _, _) in zip(column, blocks, strict=True)}) == 1


def _signature(block: nn.Module, integers: list[int]) -> tuple:
    """Equal for blocks that are the same program up to their integers, which are added to ``integers`` in order."""
    out: list[Any] = []
    for path, module in block.named_modules():
        attributes = []
        for name, value in sorted(vars(module).items()):
            if type(value) is int:
                integers.append(value)
                attributes.append((name, int))
            elif name not in _STATE:
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


def _count_noticeably(blocks: list[nn.Module]) -> None:
    """Make a :class:`Counter` of every integer in which equal blocks differ."""
    for same in zip(*(block.modules() for block in blocks), strict=True):
        for name, value in list(vars(same[0]).items()):
            if type(value) is int and any(vars(module)[name] != value for module in same):
                for module in same:
                    vars(module)[name] = Counter(vars(module)[name])


@dataclass
class Copy:
    """One block's copy of the nodes of another: ``nodes`` maps original → copy."""

    path: str
    original: str
    nodes: dict[fx.Node, fx.Node]


def unroll(graph: fx.Graph, placeholders: dict[str, fx.Node]) -> tuple[list[Copy], dict[fx.Node, fx.Node]]:
    """Replace every ``graphprune::repeat`` node by a copy of the block it repeats.

    ``placeholders`` maps tensor names to nodes. Returns the copies and, for every node that is gone, its successor.
    """
    segments: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        block = (node.meta.get("custom") or {}).get(BLOCK_KEY)
        if block is not None and node.op == "call_function":
            segments.setdefault(block, []).append(node)
    names_of = {node: name for name, node in placeholders.items()}
    copies: list[Copy] = []
    gone: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is not torch.ops.graphprune.repeat.default:
            continue
        tensors, like, label = node.args
        path, _, original = str(label).partition("=")
        made: dict[fx.Node, fx.Node] = {}

        def moved(source: fx.Node, made=made, path=path, original=original) -> fx.Node:
            if source in made:
                return made[source]
            name = names_of.get(source)
            if name is not None and name.startswith(f"{original}."):
                return placeholders[path + name.removeprefix(original)]
            return source

        with graph.inserting_before(node):
            for source in segments[original]:
                copy = graph.node_copy(source, moved)
                if source.target is torch.ops.graphprune.enter.default:
                    copy.args = (tensors, path)
                copy.meta = {**source.meta, "nn_module_stack": _moved_stack(source, original, path)}
                made[source] = copy
        for user in list(node.users):
            successor = made[_of_block(like[user.args[1]], made)]
            user.replace_all_uses_with(successor)
            gone[user] = successor
            graph.erase_node(user)
        graph.erase_node(node)
        copies.append(Copy(path, original, made))
    return copies, gone


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
