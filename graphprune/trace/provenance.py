"""Size provenance: where the integers that reach an operator come from.

While a model is traced, the integers its modules and configs hold are :class:`SizeInt`: ordinary ints that remember
which attribute, or which dimension of which tensor, they were read from, and how they were combined since. They do
what ints do; :class:`SizeRecorder` sees them arrive at ``view``, ``split``, ``expand`` and writes them down, so that
after pruning every attribute can be given the value its uses demand.

A size that turns into something other than a size (``head_dim ** -0.5``, ``x / heads``) *escapes*: the function the
model computes depends on it, so it may not change. So does a size that is compared: the branch that was traced
depends on the answer. What reads an int without asking it (``range(n)``, ``math.log(n)``) cannot be seen here; the
oracle refuses to prune such a model wrongly.
"""

from __future__ import annotations

import copy
import math
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from graphprune.trace.source_lines import on_line, place, running_frame


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
    """``left op right`` with op one of ``+ - * // %``; a comparison, ``== < <=``, only inside an :class:`Escape`."""

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
    """A size that entered arithmetic other than sizes, or was compared, in a repeated block of number ``block``."""

    expr: Expr
    where: str
    block: int | None = None


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
            self.recorder.tell(self.expr)
        return plain(self)

    def __float__(self) -> float:
        return float(self._escape())

    def __pow__(self, other: Any, mod: Any = None) -> Any:
        return pow(self._escape(), other, mod)

    def __rpow__(self, other: Any, mod: Any = None) -> Any:
        return pow(other, self._escape(), mod)

    def __int__(self) -> int:
        # A plain int is a literal where it becomes a size; anywhere else it is a number.
        return self._escape() if self._in_forward() else plain(self)

    def __hash__(self) -> int:
        return hash(self._escape() if self._in_forward() else plain(self))

    def __neg__(self) -> SizeInt:
        return SizeInt(-plain(self), Combined("-", 0, self.expr), self.recorder)

    def __pos__(self) -> SizeInt:
        return self

    def __abs__(self) -> SizeInt:
        return self if self >= 0 else -self

    def __invert__(self) -> int:
        return -self - 1

    def __bool__(self) -> bool:
        return self != 0

    def _in_forward(self) -> bool:
        return self.recorder is not None and self.recorder.in_forward

    def __truediv__(self, other: Any) -> Any:
        return self._escape() / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / self._escape()


def _beside_symbol(word: str, number: int, other: torch.SymInt, swap: bool) -> Any:
    """An operation with one of torch's symbolic integers, which go together with exact ints only."""
    left, right = (other, number) if swap else (number, other)
    return getattr(operator, f"__{word}__")(left, right)


def _arithmetic(word: str, symbol: str, swap: bool) -> Callable[[SizeInt, Any], Any]:
    name = f"__r{word}__" if swap else f"__{word}__"
    of_int = getattr(int, name)

    def method(self: SizeInt, other: Any) -> Any:
        if isinstance(other, float):  # a product with a float is no size any more
            return getattr(float, name)(float(self), other)
        if isinstance(other, torch.SymInt):  # a size that depends on values: so does the result
            return _beside_symbol(word, self._escape(), other, swap)
        result = of_int(self, other)
        if result is NotImplemented or isinstance(other, bool):
            return result
        mine, theirs = self.expr, other.expr if isinstance(other, SizeInt) else other
        left, right = (theirs, mine) if swap else (mine, theirs)
        return SizeInt(result, Combined(symbol, left, right), self.recorder)

    return method


for _name, _symbol in (("add", "+"), ("sub", "-"), ("mul", "*"), ("floordiv", "//"), ("mod", "%")):
    setattr(SizeInt, f"__{_name}__", _arithmetic(_name, _symbol, swap=False))
    setattr(SizeInt, f"__r{_name}__", _arithmetic(_name, _symbol, swap=True))


def _escaping(name: str) -> Callable[[SizeInt, Any], Any]:
    of_int = getattr(int, name)

    def method(self: SizeInt, other: Any) -> Any:
        if isinstance(other, SizeInt):
            other = other._escape()
        return of_int(self._escape(), other)

    return method


for _name in ("and", "or", "xor", "lshift", "rshift", "divmod"):
    setattr(SizeInt, f"__{_name}__", _escaping(f"__{_name}__"))
    setattr(SizeInt, f"__r{_name}__", _escaping(f"__r{_name}__"))


def _comparison(name: str, symbol: str, swap: bool) -> Callable[[SizeInt, Any], Any]:
    """What a comparison says has to stay so: the branch that was traced depends on it."""
    of_int = getattr(int, name)

    def method(self: SizeInt, other: Any) -> Any:
        if isinstance(other, torch.SymInt):
            return getattr(operator, name)(self._escape(), other)
        result = of_int(self, other)
        recorder = self.recorder if self._in_forward() else None
        if recorder is not None and isinstance(other, int) and not isinstance(other, bool):
            mine, theirs = self.expr, other.expr if isinstance(other, SizeInt) else other
            recorder.tell(Combined(symbol, theirs, mine) if swap else Combined(symbol, mine, theirs))
        return result

    return method


# a > b is b < a, and a != b is not a == b.
for _name, _symbol, _swap in (
    ("eq", "==", False),
    ("ne", "==", False),
    ("lt", "<", False),
    ("le", "<=", False),
    ("gt", "<", True),
    ("ge", "<=", True),
):
    setattr(SizeInt, f"__{_name}__", _comparison(f"__{_name}__", _symbol, _swap))


plain = int.__int__  # the value of a size, without asking for it as the model does


@dataclass
class Call:
    """One torch call that was seen with sizes among its arguments."""

    name: str
    args: tuple
    kwargs: dict
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of its tensor outputs


META_KEY = "graphprune_call"
# In-place operators after which the tensor has other dimensions than before.
_RELAYOUT = {"transpose_", "t_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_"}
_SET_GRAD = torch._C._set_grad_enabled


_COUNTS_ALL = (torch.numel, torch.Tensor.numel, torch.Tensor.nelement)
_SHAPE_GETTER = torch.Tensor.shape.__get__  # type: ignore[attr-defined]


class SizeRecorder(TorchFunctionMode):
    """Numbers every torch call, so that graph nodes can be led back to the Python arguments they came from.

    The number travels in ``node.meta["custom"]``; sizes read from tensors (``x.shape``, ``x.size(1)``) come out as
    :class:`SizeInt`.
    """

    def __init__(self, block: Callable[[], int | None] = lambda: None) -> None:
        super().__init__()
        self.block = block  # the number of the repeated block that is being traced, if any
        self.calls: dict[int, Call] = {}
        self.escapes: list[Escape] = []
        self.in_forward = False  # the model's own code is running, so that a comparison is one of the model
        self._number = 0
        self._outermost: CodeType | None = None  # what entered first, and calls the model
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __enter__(self) -> SizeRecorder:
        self.in_forward = True
        self._outermost = self._outermost or sys._getframe(1).f_code
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.in_forward = False
        super().__exit__(*exception)

    def tell(self, expr: Expr) -> None:
        self.escapes.append(Escape(expr, place(running_frame(self._outermost)), self.block()))

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
        if func in _COUNTS_ALL:
            sizes = [self._size_of(args[0], i, n) for i, n in enumerate(_SHAPE_GETTER(args[0]))]
            return math.prod(sizes[1:], start=sizes[0]) if sizes else 1
        if func is torch.Tensor.__len__:
            func(*args)  # raises what there is to raise; Python makes a plain int of what is returned
            return int(self._size_of(args[0], 0, _SHAPE_GETTER(args[0])[0]))
        opened = _open(func) if isinstance(func, FunctionType) else None
        if opened is not None:
            try:
                with self:
                    return opened(*args, **kwargs)
            finally:
                self.in_forward = True  # which leaving ended
        self._number += 1
        number = self._number
        self.in_forward = False
        try:
            with fx_traceback.annotate({META_KEY: number}), on_line(running_frame(self._outermost)):
                out = func(*args, **kwargs)
        finally:
            self.in_forward = True
        tensors = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, torch.Tensor)]
        for index, tensor in enumerate(tensors):
            # In-place calls and no-ops return a tensor that is known already: it keeps its first name.
            if tensor not in self._known or getattr(func, "__name__", "") in _RELAYOUT:
                self._known[tensor] = (number, index)
        if any(isinstance(leaf, SizeInt) for leaf in _int_leaves((args, kwargs))):
            self.calls[number] = Call(getattr(func, "__name__", str(func)), _strip(args), _strip(kwargs))
        return out

    def _size_of(self, tensor: torch.Tensor, dim: int, size: Any) -> Any:
        known = self._known.get(tensor)
        if known is None or not isinstance(size, int):
            return size
        return SizeInt(int(size), Dim(known[0], known[1], int(dim) % tensor.ndim), self)


def _always_false(*_: Any) -> bool:
    return False


_ASKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


@cache
def _open(function: FunctionType) -> FunctionType | None:
    """A torch function that is written in Python, such that the calls inside it are seen one by one.

    Such a function begins by asking whether a mode wants to handle it as a whole; this copy does not ask. Methods of
    ``Tensor`` stay closed: what they call in C is looked up by name, and would find them again.
    """
    asked = [name for name in _ASKS if name in function.__code__.co_names]
    if not asked or function.__module__ == "torch._tensor":
        return None
    world = {**function.__globals__, **dict.fromkeys(asked, _always_false)}
    opened = FunctionType(function.__code__, world, function.__name__, function.__defaults__, function.__closure__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


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
