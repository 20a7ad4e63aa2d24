"""Run a model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Run ``model`` without the user's forward hooks, so that tracing and verifying have no side effects.

    The hooks of transformers itself stay: it collects hidden states by them, and backbones return those.
    """
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    stash = [(module, kind, dict(getattr(module, kind))) for module in model.modules() for kind in kinds]
    for module, kind, hooks in stash:
        for number, hook in hooks.items():
            if not str(getattr(hook, "__module__", "")).startswith("transformers."):
                del getattr(module, kind)[number]
    try:
        yield
    finally:
        for module, kind, hooks in stash:
            getattr(module, kind).clear()
            getattr(module, kind).update(hooks)
