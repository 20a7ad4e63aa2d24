"""Run a model without leaving a trace in it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

# What a model's code raises of shapes that do not fit, of tensors without values, of arguments it lacks.
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module gets its own train/eval state back."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, state in training.items():
            module.training = state


@contextmanager
def log_level(level: int, *loggers: str) -> Iterator[None]:
    """Loggers have this level inside, and their own again afterwards."""
    before = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    try:
        for logger in before:
            logger.setLevel(level)
        yield
    finally:
        for logger, own in before.items():
            logger.setLevel(own)


@contextmanager
def without_autocast() -> Iterator[None]:
    """``torch.autocast`` inside does nothing: the graph has no casts in it, and both sides of a proof compute alike."""
    plain = torch.autocast.__enter__, torch.autocast.__exit__
    with ExitStack() as outside:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                outside.enter_context(torch.autocast(kind, enabled=False))
        torch.autocast.__enter__, torch.autocast.__exit__ = _enter_nothing, _exit_nothing  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.autocast.__enter__, torch.autocast.__exit__ = plain  # type: ignore[method-assign]


@contextmanager
def einsum_as_written() -> Iterator[None]:
    """``torch.einsum`` inside takes its operands from left to right, whether opt_einsum is installed or not.

    With it torch picks an order by the sizes of the example: the graph would depend on the environment, and on them.
    """
    with torch.backends.opt_einsum.flags(enabled=False):
        yield


def _enter_nothing(context: torch.autocast) -> torch.autocast:
    return context


def _exit_nothing(context: torch.autocast, *error: object) -> None:
    return None


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Random numbers inside are the same every time; the generators outside go on as if nothing was drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Run ``model`` without the user's forward hooks, so that tracing and verifying have no side effects.

    The hooks of transformers itself stay: it collects hidden states by them, and backbones return those.
    The hooks by which torch itself computes weights (``torch.nn.utils.weight_norm`` and its like) stay.
    """
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    stash = [(module, kind, dict(getattr(module, kind))) for module in model.modules() for kind in kinds]
    for module, kind, hooks in stash:
        for key, hook in hooks.items():
            if not _belongs_to_forward(hook):
                del getattr(module, kind)[key]
    try:
        yield
    finally:
        for module, kind, hooks in stash:
            getattr(module, kind).clear()
            getattr(module, kind).update(hooks)


@contextmanager
def unchecked_distributions() -> Iterator[None]:
    """Distributions inside do not check their arguments: that is a branch on values, which no graph can hold."""
    kind = torch.distributions.Distribution
    before = kind._validate_args
    kind.set_default_validate_args(False)
    try:
        yield
    finally:
        kind.set_default_validate_args(before)


@contextmanager
def collected_later() -> Iterator[None]:
    """No garbage collection inside: a graph is many small objects that all stay, and each search among them is long."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _belongs_to_forward(hook: object) -> bool:
    of_torch = type(hook).__module__.startswith("torch.nn.utils.")
    return of_torch or str(getattr(hook, "__module__", "")).startswith("transformers.")


@contextmanager
def idle_conversions() -> Iterator[None]:
    """``module.to(what it is already)`` inside does nothing: torch cannot exchange parameters while it traces."""
    plain = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        held = (*module.parameters(), *module.buffers())
        as_wanted = all(
            (device is None or tensor.device == device)
            and (dtype is None or tensor.dtype == dtype or not tensor.is_floating_point())
            for tensor in held
        )
        return module if as_wanted else plain(module, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.to = plain  # type: ignore[method-assign]
