"""Example inputs for tracing: small, random, and of sizes that no dimension of the model has."""

from __future__ import annotations

import inspect
from itertools import count
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphPruneError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def normalise(example_inputs: Any) -> Inputs:
    """``(args, kwargs)`` from what the user gave: a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def odd_sizes(model: nn.Module, how_many: int) -> list[int]:
    """Small primes that are no dimension of any weight and no integer of the config, smallest first."""
    taken = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    config = getattr(model, "config", None)
    if config is not None:
        taken |= {value for value in vars(config).values() if isinstance(value, int)}
    primes = (n for n in count(3) if all(n % d for d in range(2, int(n**0.5) + 1)))
    return [next(n for n in primes if n not in taken) for _ in range(how_many)]


def example_inputs_for(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Inputs for a Hugging Face model, found from its ``main_input_name``, its forward signature and its config.

    Raises :class:`GraphPruneError` when the model's forward needs something that cannot be guessed.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name"):
        raise GraphPruneError(
            f"{type(model).__name__}.forward needs inputs and nobody gave any: pass example_inputs=, "
            "a tuple of positional or a dict of keyword arguments with small example tensors."
        )
    generator = torch.Generator().manual_seed(0)
    parameters = inspect.signature(model.forward).parameters
    batch, length = odd_sizes(model, 2)
    kwargs: dict[str, Any] = {}

    def tokens(name: str, settings: Any) -> None:
        vocabulary = getattr(settings, "vocab_size", None)
        if vocabulary is None:
            raise GraphPruneError(f"The config of {type(model).__name__} has no vocab_size: pass example_inputs=.")
        limit = getattr(settings, "max_position_embeddings", None)
        width = min(length, limit) if isinstance(limit, int) and limit > 0 else length
        kwargs[name] = torch.randint(0, int(vocabulary), (batch, width), generator=generator)

    if model.main_input_name == "input_ids":
        settings = _text_settings(model, config)
        tokens("input_ids", settings)
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
            tokens("decoder_input_ids", settings)
    elif model.main_input_name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        side = getattr(vision, "image_size", 224)
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        channels = getattr(vision, "num_channels", 3)
        kwargs["pixel_values"] = torch.randn(batch, channels, height, width, generator=generator).to(dtype)
    else:
        raise GraphPruneError(
            f"{type(model).__name__} takes {model.main_input_name!r}, for which no example can be made: "
            "pass example_inputs=."
        )
    for name, parameter in parameters.items():
        if name == "use_cache":
            kwargs["use_cache"] = False
        elif (
            parameter.default is inspect.Parameter.empty
            and parameter.kind
            not in (
                inspect.Parameter.VAR_POSITIONAL,
                inspect.Parameter.VAR_KEYWORD,
            )
            and name not in kwargs
        ):
            raise GraphPruneError(f"{type(model).__name__}.forward needs {name!r}: pass example_inputs=.")
    return (), {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


def _text_settings(model: nn.Module, config: Any) -> Any:
    """The part of the config that knows the vocabulary."""
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError as error:
        raise GraphPruneError(
            f"{type(model).__name__} has several text parts ({error}): pass example_inputs=."
        ) from error
