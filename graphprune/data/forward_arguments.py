"""What a model says about what it takes: the names of its arguments, its config, how many tokens it knows."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.trace.inputs import VARIADIC, Inputs, forward_parameters

_UNNAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)


def by_name(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Arguments of forward as keyword arguments.

    Raises :class:`GraphPruneError` for those that have no name.
    """
    args, kwargs = inputs
    named = list(forward_parameters(model).values())[: len(args)]
    unnamed = any(p.kind in _UNNAMED or p.kind is p.VAR_KEYWORD for p in named) or len(named) < len(args)
    if unnamed:
        raise GraphPruneError(
            f"{type(model).__name__}.forward takes arguments without names ({inspect.signature(model.forward)}), "
            "which calibration data cannot be given to: give them names."
        )
    return {**{p.name: value for p, value in zip(named, args, strict=True)}, **kwargs}


def first_tensor(arguments: dict[str, Any]) -> str | None:
    """The name of the first argument that is a tensor."""
    return next((name for name, value in arguments.items() if isinstance(value, torch.Tensor)), None)


def parameter_names(model: nn.Module) -> list[str]:
    """The names that forward takes, without ``*args`` and ``**kwargs``."""
    return [name for name, p in forward_parameters(model).items() if p.kind not in VARIADIC]


def check_names(model: nn.Module, batch: dict[str, Any], n: int) -> None:
    """Raises :class:`GraphPruneError` when forward does not take an argument of batch ``n``."""
    parameters = forward_parameters(model)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = [str(name) for name in batch if name not in parameters]
    if unknown:
        raise GraphPruneError(
            f"Batch {n} of data= has {', '.join(unknown)}, which {type(model).__name__}.forward does not take; "
            f"it takes: {', '.join(parameters)}."
        )


def config_of(model: nn.Module) -> Any:
    """The config of a Hugging Face model; None for any other, whatever it calls its config."""
    config = getattr(model, "config", None)
    return config if hasattr(config, "to_dict") else None


def known_tokens(model: Any) -> int | None:
    """The rows of the table that looks up tokens, for a model that says which it is."""
    try:
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:  # so says a Hugging Face model without one
        return None
    return getattr(embedding, "num_embeddings", None)
