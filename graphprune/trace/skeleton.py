"""Copies of a model's structure that share, replace or forget its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.trace.backends import use_portable
from graphprune.trace.stored import stored_of

Replace = Callable[[torch.Tensor], torch.Tensor]
QUANTISED = "graphprune_quantised"  # the attribute of a stand-in that holds the quantised weight


def tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every distinct parameter and buffer object, tied ones once."""
    seen: set[int] = set()
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def names(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under every name it has, tied ones several times."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def is_on_meta(model: nn.Module) -> bool:
    """Whether any parameter has no value."""
    return any(parameter.is_meta for parameter in model.parameters())


def copy_structure(model: nn.Module, replace: Replace | None = None, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of everything but the weights: modules, configs, hooks, attributes.

    Each parameter and buffer of the copy is ``replace(original)``, or the original itself when ``replace`` is None;
    tied tensors stay tied. No weight is copied here. ``memo`` is that of :func:`copy.deepcopy`: what is copied already.
    """
    memo = {} if memo is None else memo
    memo |= {id(t): t if replace is None else replace(t) for t in tensors(model)}
    for module in model.modules():  # a tensor that an earlier forward computed and left behind
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
    return copy.deepcopy(model, memo)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that shares its weights, as parameters of its own that need no gradient: others may put things into it."""
    return copy_structure(
        model, lambda t: nn.Parameter(t.detach(), requires_grad=False) if isinstance(t, nn.Parameter) else t
    )


def scratch_copy(model: nn.Module, written: Iterable[str], clone: Replace = torch.clone) -> nn.Module:
    """A copy to run in eval mode and throw away: whatever forward changes, ``model`` keeps its state.

    Its attention and experts are of a kind that runs here (:mod:`graphprune.trace.backends`).

    It shares the weights of ``model``, except for the parameters and buffers named in ``written``, which are cloned.
    """
    held = names(model)
    own = {id(held[name]) for name in written}

    def replace(tensor: torch.Tensor) -> torch.Tensor:
        if hasattr(tensor, QUANTISED):
            raise GraphPruneError(
                "The weights are quantised, and a pass wants to run the model with them: choose a method that only "
                "trains, such as 'loraprune', or load the model in a floating-point dtype."
            )
        if id(tensor) not in own:
            return tensor
        stored = stored_of(tensor)
        cloned = clone(tensor.detach()) if stored is None else stored.read()
        return nn.Parameter(cloned, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cloned

    copied = copy_structure(model, replace).eval()
    use_portable(copied, tracing=False)
    return copied
