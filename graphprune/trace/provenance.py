"""Size provenance: where the integers that reach an operator come from.

While a model is traced, the integers its modules and configs hold are :class:`SizeInt`: ordinary ints that remember
which attribute, or which dimension of which tensor, they were read from, and how they were combined since. They do
what ints do; :class:`SizeRecorder` sees them arrive at ``view``, ``split``, ``expand`` and writes them down, so that
after pruning every attribute can be given the value its uses demand.

A size that turns into something other than a size (``head_dim ** -0.5``, ``x / heads``) *escapes*: the function the
model computes depends on it, so it may not change.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Attribute:
    """An integer attribute: ``owner`` is a module path, or ``path@name`` for a config that the module holds.

    ``index`` is the place inside a tuple or list attribute, or None.
    """

    owner: str
    name: str
    index: int | None = None

    def __str__(self) -> str:
        place = "" if self.index is None else f"[{self.index}]"
        return f"{self.owner}.{self.name}{place}".lstrip(".")


@dataclass(frozen=True)
class Dim:
    """Dimension ``dim`` of output ``output`` of recorded torch call ``call``; for inputs ``call`` is their name."""

    call: int | str
    output: int
    dim: int


@dataclass(frozen=True)
class Combined:
    """``left op right`` with op one of ``+ - * //``."""

    op: str
    left: Expr
    right: Expr


Expr = Attribute | Dim | Combined | int


def moved(expr: Expr, rename: Callable[[str], str], renumber: Callable[[int], int]) -> Expr:
    """The expression as a copy of a block would have it, its names and its call numbers changed."""
    if isinstance(expr, Combined):
        return Combined(expr.op, moved(expr.left, rename, renumber), moved(expr.right, rename, renumber))
    if isinstance(expr, Attribute):
        return Attribute(rename(expr.owner), expr.name, expr.index)
    if isinstance(expr, Dim):
        call = rename(expr.call) if isinstance(expr.call, str) else renumber(expr.call)
        return Dim(call, expr.output, expr.dim)
    return expr


@dataclass(frozen=True)
class Escape:
    """A size that entered arithmetic other than sizes, while ``block`` (a module path) was traced."""

    expr: Expr
    where: str
    block: str | None = None


class SizeInt(int):
    """An int that remembers where it came from. ``recorder`` hears of escapes."""

    expr: Expr
    recorder: SizeRecorder | None

    def __new__(cls, value: int, expr: Expr, recorder: SizeRecorder | None = None) -> SizeInt:
        made = super().__new__(cls, value)
        made.expr = expr
        made.recorder = recorder
        return made

    def __deepcopy__(self, memo: dict) -> SizeInt:
        return self

    def __reduce__(self) -> tuple:
        return (int, (int(self),))

    def _escape(self) -> int:
        if self.recorder is not None:
            self.recorder.escapes.append(Escape(self.expr, _caller(), self.recorder.block()))
        return int(self)

    def __float__(self) -> float:
        return float(self._escape())

    def __pow__(self, other: Any, mod: Any = None) -> Any:
        return pow(self._escape(), other, mod)

    def __rpow__(self, other: Any, mod: Any = None) -> Any:
        return pow(other, self._escape(), mod)

    def __neg__(self) -> SizeInt:
        return SizeInt(-int(self), Combined("-", 0, self.expr), self.recorder)

    def __truediv__(self, other: Any) -> Any:
        return self._escape() / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / self._escape()

    def __mod__(self, other: Any) -> Any:
        return int(self) % other

    def __rmod__(self, other: Any) -> Any:
        return other % int(self)


def _arithmetic(word: str, symbol: str, swap: bool) -> Callable[[SizeInt, Any], Any]:
    name = f"__r{word}__" if swap else f"__{word}__"
    plain = getattr(int, name)

    def method(self: SizeInt, other: Any) -> Any:
        if isinstance(other, float):  # a product with a float is no size any more
            return getattr(float, name)(float(self), other)
        if isinstance(other, torch.SymInt):  # a size that depends on values: so does the result
            number = self._escape()
            return getattr(operator, f"__{word}__")(*((other, number) if swap else (number, other)))
        result = plain(self, other)
        if result is NotImplemented or isinstance(other, bool):
            return result
        given: Expr = other.expr if isinstance(other, SizeInt) else int(other)
        left, right = (given, self.expr) if swap else (self.expr, given)
        return SizeInt(result, Combined(symbol, left, right), self.recorder)

    return method


def _comparison(name: str) -> Callable[[SizeInt, Any], Any]:
    plain = getattr(int, name)

    def method(self: SizeInt, other: Any) -> Any:
        # torch's symbolic integers go together with exact ints only.
        return getattr(operator, name)(int(self), other) if isinstance(other, torch.SymInt) else plain(self, other)

    return method


for _name in ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"):
    setattr(SizeInt, _name, _comparison(_name))
setattr(SizeInt, "__hash__", int.__hash__)  # noqa: B010  (a class body with __eq__ would lose it)

for _name, _symbol in (("add", "+"), ("sub", "-"), ("mul", "*"), ("floordiv", "//")):
    setattr(SizeInt, f"__{_name}__", _arithmetic(_name, _symbol, swap=False))
    setattr(SizeInt, f"__r{_name}__", _arithmetic(_name, _symbol, swap=True))


def _caller() -> str:
    """``file.py:123`` of the model code that is running, for messages."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back  # type: ignore[assignment]
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}" if frame else ""


@dataclass
class Call:
    """One torch call that was seen with sizes among its arguments."""

    name: str
    args: tuple
    kwargs: dict
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of its tensor outputs


META_KEY = "graphprune_call"
_SET_GRAD = torch._C._set_grad_enabled
_SHAPE_GETTER = torch.Tensor.shape.__get__  # type: ignore[attr-defined]


class SizeRecorder(TorchFunctionMode):
    """Numbers every torch call, so that graph nodes can be led back to the Python arguments they came from.

    The number travels in ``node.meta["custom"]``; sizes read from tensors (``x.shape``, ``x.size(1)``) come out as
    :class:`SizeInt`.
    """

    def __init__(self, block: Callable[[], str | None] = lambda: None) -> None:
        super().__init__()
        self.block = block  # the path of the repeated block that is being traced, if any
        self.calls: dict[int, Call] = {}
        self.escapes: list[Escape] = []
        self._number = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def know(self, tensor: torch.Tensor, name: str) -> None:
        """Name an input, parameter or buffer, so that its sizes are told from literals."""
        self._known[tensor] = (name, 0)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is _SET_GRAD:
            # Left out of the graph: nothing here depends on it, and torch.export would split the graph around it.
            with torch._C.DisableTorchFunction():
                return func(*args)
        if func == _SHAPE_GETTER or (func is torch.Tensor.size and len(args) == 1 and not kwargs):
            return torch.Size([self._size_of(args[0], i, n) for i, n in enumerate(func(*args, **kwargs))])
        if func is torch.Tensor.size:
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return self._size_of(args[0], dim, func(*args, **kwargs))
        self._number += 1
        number = self._number
        with fx_traceback.annotate({META_KEY: number}):
            out = func(*args, **kwargs)
        tensors = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, torch.Tensor)]
        for index, tensor in enumerate(tensors):
            # In-place calls and no-ops return a tensor that is known already: it keeps its first name.
            if tensor not in self._known:
                self._known[tensor] = (number, index)
        if any(isinstance(leaf, SizeInt) for leaf in _int_leaves((args, kwargs))):
            self.calls[number] = Call(getattr(func, "__name__", str(func)), _strip(args), _strip(kwargs))
        return out

    def _size_of(self, tensor: torch.Tensor, dim: int, size: Any) -> Any:
        known = self._known.get(tensor)
        if known is None or not isinstance(size, int):
            return size
        return SizeInt(int(size), Dim(known[0], known[1], dim % tensor.ndim), self)


def _int_leaves(tree: Any) -> Iterator[Any]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, slice):
            yield from (leaf.start, leaf.stop, leaf.step)
        else:
            yield leaf


def _strip(tree: Any) -> Any:
    """The arguments with every tensor replaced by its rank, so that no tensor is kept alive."""
    if isinstance(tree, torch.Tensor):
        return TensorArg(tree.ndim, tree.dtype is torch.bool)
    if isinstance(tree, (tuple, list)):
        return tuple(_strip(item) for item in tree)
    if isinstance(tree, dict):
        return {key: _strip(item) for key, item in tree.items()}
    return tree


@dataclass(frozen=True)
class TensorArg:
    """What is left of a tensor in a recorded call."""

    ndim: int
    is_bool: bool


def _is_config(value: Any) -> bool:
    """A plain settings object: what Hugging Face configs are, recognised by what they can do."""
    return hasattr(value, "to_dict") and hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module)


def _wrap(value: Any, owner: str, name: str, recorder: SizeRecorder) -> Any:
    if type(value) is int:
        return SizeInt(value, Attribute(owner, name), recorder)
    if type(value) in (tuple, list, torch.Size) and value and all(type(item) is int for item in value):
        items = [SizeInt(item, Attribute(owner, name, i), recorder) for i, item in enumerate(value)]
        return items if type(value) is list else type(value)(items)
    return value


def configs_of(holder: Any) -> list[tuple[str, Any]]:
    """The settings objects that an object holds directly, by attribute name."""
    return [(name, value) for name, value in vars(holder).items() if _is_config(value)]


def wrap_sizes(model: torch.nn.Module, recorder: SizeRecorder) -> None:
    """Replace every integer attribute of ``model``'s modules and configs by a :class:`SizeInt`, in place.

    Every module gets a copy of its config, so that a size that one layer reads from the config they all share can be
    solved for that layer alone. Only ever called on a skeleton (:mod:`graphprune.trace.skeleton`), never on the
    user's model.
    """
    for path, module in model.named_modules():
        _wrap_holder(module, path, recorder)


def _wrap_holder(holder: Any, owner: str, recorder: SizeRecorder) -> None:
    for name, value in configs_of(holder):
        own = copy.copy(value)
        vars(holder)[name] = own
        _wrap_holder(own, f"{owner}@{name}", recorder)
    for name, value in list(vars(holder).items()):
        if not name.startswith("_"):
            # Straight into __dict__: setters of configs validate types, and a SizeInt is an int.
            vars(holder)[name] = _wrap(value, owner, name, recorder)


def set_attribute(model: torch.nn.Module, attribute: Attribute, value: int) -> None:
    """Give one integer attribute its new value; a config that other modules share is copied for this one first."""
    path, *configs = attribute.owner.split("@")
    holder: Any = model.get_submodule(path)
    for name in configs:
        own = copy.copy(vars(holder)[name])
        vars(holder)[name] = own
        holder = own
    old = vars(holder)[attribute.name]
    if attribute.index is None:
        vars(holder)[attribute.name] = value
    else:
        items = list(old)
        items[attribute.index] = value
        vars(holder)[attribute.name] = items if isinstance(old, list) else type(old)(items)


def _holder(model: torch.nn.Module, owner: str) -> Any:
    path, *configs = owner.split("@")
    found: Any = model.get_submodule(path)
    for name in configs:
        found = vars(found)[name]
    return found


def get_attribute(model: torch.nn.Module, attribute: Attribute) -> int:
    """The present value of one integer attribute."""
    value = vars(_holder(model, attribute.owner))[attribute.name]
    return int(value if attribute.index is None else value[attribute.index])


@contextmanager
def preserved_annotations() -> Iterator[None]:
    """Keep ``custom`` annotations on the nodes that torch.export creates.

    ``torch.fx.traceback`` is documented but young; ``tests/trace/test_provenance.py`` tells when it changes.
    """
    with fx_traceback.preserve_node_meta():
        yield
