"""Numbers that forward reads out of tensors, where no weight and no float decides them.

``lengths.tolist()``, ``int(grid[0, 1])``, ``if mask.any()``: torch.export does not know what is in a tensor and stops.
Where that follows from integer inputs and constants alone (the rows and columns of an image, a mask, a table of
probabilities), it is like the shape of an input: the number found with the example inputs is part of what is traced.
What follows from weights or activations never is.

A branch that is taken by such a number may hide parameters that only the other branch uses, and nothing would be known
of them. The numbers are therefore only used if every parameter of the modules that read them is used.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from graphprune.trace.inputs import Inputs
from graphprune.trace.quiet import REFUSALS, seeded, without_hooks
from graphprune.trace.skeleton import names, scratch_copy
from graphprune.trace.source_lines import is_library

_T = torch.Tensor
_READS: set[Any] = {_T.item, _T.tolist, _T.__bool__, _T.__int__, _T.__index__, _T.__float__, _T.equal, torch.equal}
_SIZE = "size"  # a read that torch does by itself
_LEAVES: set[Any] = {_T.numpy, _T.__array__}  # numbers that are out of sight then
# Functions that take sizes, which may be given as tensors of one number each, and their first argument that is one.
_SIZED = {
    **dict.fromkeys(("view", "reshape", "expand", "repeat", "pad", "interpolate", "narrow", "__getitem__"), 1),
    **dict.fromkeys(("zeros", "ones", "empty", "arange"), 0),
}
Place = tuple[str, str, int]  # path of the module that reads, file, line
_MOST = 1 << 20  # numbers in a tensor that is kept


@dataclass
class Reads:
    """What is read where.

    ``found``: place → the numbers read there, in order. A list is kept number by number: torch.export asks for it so.
    ``made``: place, name of the function, which call of it there → a tensor whose very shape depends on numbers, such
    as the indices of what is not zero. ``used`` are the modules that read any of them while traced.
    """

    found: dict[Place, list[Any]] = field(default_factory=dict)
    made: dict[tuple[Place, str, int], torch.Tensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.found or self.made)

    def replayed_in(self, model: nn.Module) -> _Replay:
        """A mode in which ``model``, a copy of the one they were found in, reads the same numbers again."""
        return _Replay(self, model)


def find_reads(model: nn.Module, inputs: Inputs) -> Reads:
    """Run a copy of ``model`` once, and note what it reads that no weight and no float decides.

    There is none to find without real weights, or if the model does not run.
    """
    held = names(model)
    if any(tensor.is_meta for tensor in held.values()):
        return Reads()
    scratch = scratch_copy(model, [name for name, _ in model.named_buffers(remove_duplicate=False)])
    args, kwargs = tree_map_only(torch.Tensor, torch.clone, inputs)
    floats = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and not _is_whole(t)]
    taint = _Taint([*scratch.parameters(), *floats], list(scratch.buffers()))
    record = _Record(scratch, taint)
    try:
        with torch.no_grad(), seeded(), without_hooks(scratch), taint, record:
            scratch(*args, **kwargs)
    except REFUSALS:
        return Reads()
    return Reads(record.found, record.made)


def _is_whole(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex()


class _Taint(TorchDispatchMode):
    """Knows the memory that a weight, an activation, a random number, or a buffer that changes has a part in."""

    def __init__(self, tainted: list[torch.Tensor], buffers: list[torch.Tensor]):
        super().__init__()
        self._tainted = {_memory(tensor) for tensor in tainted}
        self._buffers = {_memory(tensor) for tensor in buffers}
        self.shapes_from_numbers = 0  # operators that ran whose output's shape depends on numbers

    def has(self, values: Any) -> bool:
        return any(_memory(t) in self._tainted for t in tree_leaves(values) if isinstance(t, torch.Tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tainted = torch.Tag.nondeterministic_seeded in func.tags or self.has((args, kwargs))
        self.shapes_from_numbers += torch.Tag.dynamic_output_shape in func.tags
        out = func(*args, **kwargs)
        made = {_memory(t) for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        written = {_memory(t) for t in _written(func, args, kwargs)}
        # What is free of it may have been given memory that was not: an address is used again.
        self._tainted = (
            self._tainted | made | written if tainted else (self._tainted - made) | (written & self._buffers)
        )
        return out


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    if not func._schema.is_mutable:
        return
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from (t for t in tree_leaves(given.get(argument.name)) if isinstance(t, torch.Tensor))


class _Reader(TorchFunctionMode):
    """Sees every read, and where it is done."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._calls: Counter[tuple[Place, str]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", "__get__"), kwargs or {}
        if name == "__get__":  # a shape, a dtype, …
            return func(*args, **kwargs)
        place = self._place(sys._getframe(1))
        if name in _SIZED:
            first = _SIZED[name]
            args = (*args[:first], *(self._sizes(a, place, name != "__getitem__") for a in args[first:]))
            kwargs = {key: self._sizes(value, place, key in ("size", "pad")) for key, value in kwargs.items()}
        call = functools.partial(func, *args, **kwargs)
        if func in _READS or func in _LEAVES:
            return self.read(place, func, args, call)
        number = self._calls[place, name]
        self._calls[place, name] += 1
        return self.make((place, name, number), call)

    def _sizes(self, value: Any, place: Place, is_size: bool) -> Any:
        """``value`` with the sizes in it read, if they can be; an index is none, but the ends of a slice are."""
        if isinstance(value, (tuple, list, torch.Size)):
            return type(value)(self._sizes(item, place, is_size) for item in value)
        if isinstance(value, slice):
            return slice(*(self._sizes(end, place, True) for end in (value.start, value.stop, value.step)))
        if is_size and isinstance(value, torch.Tensor) and value.ndim == 0 and _is_whole(value):
            return self.read(place, _SIZE, (value,), lambda: value)
        return value

    def read(self, place: Place, func: Any, args: Any, call: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def make(self, place: tuple[Place, str, int], call: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def _place(self, frame: FrameType | None) -> Place:
        file, line = "", 0
        while frame is not None:
            code = frame.f_code
            if not file and not is_library(code.co_filename):
                file, line = code.co_filename, frame.f_lineno
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self._paths:
                return self._paths[id(owner)], file, line
            frame = frame.f_back
        return "", file, line


class _Record(_Reader):
    """Keeps what is read, until a weight or a float decides a number: whatever comes after may follow from that."""

    def __init__(self, model: nn.Module, taint: _Taint):
        super().__init__(model)
        self._taint = taint
        self.found: dict[Place, list[Any]] = {}
        self.made: dict[tuple[Place, str, int], torch.Tensor] = {}
        self._over = False

    def read(self, place: Place, func: Any, args: Any, call: Callable[[], Any]) -> Any:
        self._over = self._over or self._taint.has(args)
        value = call()
        if func is _SIZE:
            value = value.item()
        if not self._over and func not in _LEAVES:
            self.found.setdefault(place, []).extend(tree_leaves(value))
        return value

    def make(self, place: tuple[Place, str, int], call: Callable[[], Any]) -> Any:
        before = self._taint.shapes_from_numbers
        value = call()
        if before < self._taint.shapes_from_numbers and isinstance(value, torch.Tensor):
            free = not self._over and _is_whole(value) and not self._taint.has(value)
            if free and value.numel() <= _MOST:
                self.made[place] = value.clone()
        return value


class _Replay(_Reader):
    """Answers from what was kept; a read that was not is left to torch."""

    def __init__(self, reads: Reads, model: nn.Module):
        super().__init__(model)
        self._reads = reads
        self._left = {place: deque(values) for place, values in reads.found.items()}

    def read(self, place: Place, func: Any, args: Any, call: Callable[[], Any]) -> Any:
        left = self._left.get(place, deque())
        many = args[0].numel() if func is _T.tolist else 1
        if func in _LEAVES or len(left) < many:
            return call()
        self._reads.used.add(place[0])
        taken = [left.popleft() for _ in range(many)]
        return _nested(taken, args[0].shape) if func is _T.tolist else _AS.get(func, _same)(taken[0])

    def make(self, place: tuple[Place, str, int], call: Callable[[], Any]) -> Any:
        known = self._reads.made.get(place)
        if known is None:
            return call()
        self._reads.used.add(place[0][0])
        return torch.tensor(known.tolist(), dtype=known.dtype, device=known.device).reshape(known.shape)


def _nested(numbers: list[Any], shape: torch.Size) -> Any:
    if not shape:
        return numbers[0]
    step = len(numbers) // max(1, shape[0])
    return [_nested(numbers[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


def _same(number: Any) -> Any:
    return number


_AS = {_T.__bool__: bool, _T.__int__: int, _T.__index__: int, _T.__float__: float}
