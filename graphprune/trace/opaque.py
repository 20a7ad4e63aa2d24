"""Modules that cannot be traced, as one operator each.

Where a forward looks at the values of a tensor (``if x.sum() > 0``, ``.tolist()``, boolean masks), torch.export stops.
The innermost module that does it is then replaced, while tracing, by the operator ``graphprune::opaque``: tensors in,
tensors out, nothing known in between. What it touches is pinned; the oracle runs the real module in its place. The
shapes of what it returns come from really running the model once, so this needs real weights.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from graphprune.trace.inputs import Inputs
from graphprune.trace.provenance import SizeInt
from graphprune.trace.quiet import seeded, without_hooks
from graphprune.trace.skeleton import names, scratch_copy

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
MOST = 0.5  # of all parameters: with more of them inside opaque modules there is little left to look at


@torch.library.custom_op("graphprune::opaque", mutates_args=())
def opaque(tensors: list[torch.Tensor], like: list[torch.Tensor], call: str) -> list[torch.Tensor]:
    """Stands for a call of a module that cannot be traced; its outputs have the shapes of ``like``."""
    return [torch.empty_like(tensor) for tensor in like]


@opaque.register_fake
def _(tensors: list[torch.Tensor], like: list[torch.Tensor], call: str) -> list[torch.Tensor]:
    return [torch.empty_like(tensor) for tensor in like]


class CannotHide(Exception):
    """A module cannot be made opaque: it does not run, or more than tensors and plain values goes in or out."""


@dataclass
class Call:
    """One call of an opaque module: its arguments but for the tensors, and what it returned when it really ran."""

    path: str
    outputs: list[Any]  # leaves; of tensors only shape, dtype and device matter
    out_spec: Any
    leaves: list[Any] = field(default_factory=list)  # of the traced call; True where a tensor goes
    spec: Any = None

    def run(self, module: nn.Module, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors that the real ``module`` returns for ``tensors``."""
        given = iter(tensors)
        args, kwargs = tree_unflatten([next(given) if leaf is _TENSOR else leaf for leaf in self.leaves], self.spec)
        found = [leaf for leaf in tree_flatten(module(*args, **kwargs))[0] if isinstance(leaf, torch.Tensor)]
        return [tensor.clone() for tensor in found]


_TENSOR = object()


@dataclass
class Opaque:
    """The modules that are opaque: path → why, and their calls by name."""

    why: dict[str, str] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)

    def hides(self, tensor: str) -> str | None:
        """Why the tensor of that name cannot be looked at, or None if it can."""
        return next((why for path, why in self.why.items() if tensor.startswith(f"{path}.")), None)

    def install(self, skeleton: nn.Module) -> None:
        """Replace every opaque module's forward by the operator."""
        for path in self.why:
            calls = [name for name, call in self.calls.items() if call.path == path]
            module = skeleton.get_submodule(path)
            module.forward = types.MethodType(self._hidden(calls), module)

    def _hidden(self, calls: list[str]) -> Callable[..., Any]:
        queue = iter(calls)

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = next(queue, None)
            if name is None:
                raise CannotHide("it is called more often in the trace than in a run")
            call = self.calls[name]
            leaves, call.spec = tree_flatten((args, kwargs))
            _check(leaves)
            call.leaves = [_TENSOR if isinstance(leaf, torch.Tensor) else _number(leaf) for leaf in leaves]
            like = [torch.empty(o.shape, dtype=o.dtype, device=o.device) for o in _tensors(call.outputs)]
            made = iter(opaque(_tensors(leaves), like, name))
            return tree_unflatten(
                [next(made) if isinstance(o, torch.Tensor) else o for o in call.outputs], call.out_spec
            )

        return forward


def _tensors(leaves: list[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _number(leaf: Any) -> Any:
    """A size that goes into an opaque module is a number like any other: it may not change."""
    return int(leaf) if isinstance(leaf, SizeInt) else leaf


def _check(leaves: list[Any]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, (*_PLAIN, torch.Tensor)):
            raise CannotHide(f"a {type(leaf).__name__} goes in or out")


def offender(skeleton: nn.Module, error: BaseException) -> str | None:
    """The path of the innermost module whose forward was running when ``error`` was raised; None if none was."""
    paths = {id(module): path for path, module in skeleton.named_modules()}
    found, frames = None, error.__traceback__
    while frames is not None:
        owner = frames.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found = paths.get(id(owner), found)
        frames = frames.tb_next
    return found


def hide(model: nn.Module, inputs: Inputs, known: Opaque, path: str, why: str) -> Opaque:
    """``known`` with the module at ``path`` made opaque too. At the second of its kind, all of its kind are.

    Runs a copy of the model once. Raises :class:`CannotHide` when it has no real weights, fails, or the module cannot
    be hidden, or most parameters would be.
    """
    inner = {name: reason for name, reason in known.why.items() if not name.startswith(f"{path}.")}
    if not path:
        raise CannotHide("it is the whole model")
    if path in inner:
        raise CannotHide("it fails even so")
    alike = _alike(model, path)
    reasons = {**inner, **dict.fromkeys(alike if any(name in inner for name in alike) else [path], why)}
    found = Opaque(reasons)
    held = names(model)
    if any(tensor.is_meta for tensor in held.values()):
        raise CannotHide("there are no real weights to run it with")
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    if sum(n for name, n in parameters.items() if found.hides(name)) > MOST * sum(parameters.values()):
        raise CannotHide("most parameters are inside")
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    _run(model, inputs, found, [name for name in held if name in buffers or found.hides(name)])
    return found


def _alike(model: nn.Module, path: str) -> list[str]:
    """The modules of the same class at the same place of other blocks."""
    kind, place = type(model.get_submodule(path)), re.sub(r"\d+", "#", path)
    return [name for name, m in model.named_modules() if type(m) is kind and re.sub(r"\d+", "#", name) == place]


def _run(model: nn.Module, inputs: Inputs, found: Opaque, written: list[str]) -> None:
    """Fill ``found.calls`` with the calls of the opaque modules in a real run."""
    copy = scratch_copy(model, written)

    def watch(path: str, module: nn.Module) -> None:
        forward = module.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            given = _tensors(tree_flatten((args, kwargs))[0])
            versions = [tensor._version for tensor in given]
            out = forward(*args, **kwargs)
            outputs, out_spec = tree_flatten(out)
            _check(outputs)
            if versions != [tensor._version for tensor in given]:
                raise CannotHide("it writes into its inputs")
            found.calls[f"{path}#{len(found.calls)}"] = Call(path, outputs, out_spec)
            return out

        module.forward = watched

    for path in found.why:
        watch(path, copy.get_submodule(path))
    args, kwargs = inputs
    leaves, spec = tree_flatten((args, kwargs))
    own = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(own, spec)
    try:
        with torch.no_grad(), seeded(), without_hooks(copy):
            copy(*args, **kwargs)
    except CannotHide:
        raise
    except Exception as error:
        raise CannotHide(f"the model does not run: {type(error).__name__}: {error}") from error
