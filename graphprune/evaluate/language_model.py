"""What is asked of a causal language model before it is measured, and its prefill."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphPruneError

TOKENS_PER_FORWARD = 2048  # bounds the logits: 400 MB in float32 for a vocabulary of 49k


def check_language_model(model: nn.Module, length: int) -> None:
    """``model`` predicts the next of up to ``length`` tokens.

    Raises :class:`GraphPruneError` for a model that does not (an encoder, a classifier, an encoder with a decoder), and
    when its positions do not reach that far.
    """
    config: Any = getattr(model, "config", None)
    can_generate: Any = getattr(model, "can_generate", lambda: True)
    if not can_generate() or getattr(config, "is_encoder_decoder", False):
        raise GraphPruneError(f"{type(model).__name__} is not a causal language model: it predicts no next token.")
    if length < 2:
        raise GraphPruneError(f"A window of {length} tokens has no next token to predict: give 2 or more.")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < length:
        raise GraphPruneError(f"{type(model).__name__} reads at most {limit} tokens, not {length}: ask for less.")


def vocabulary_size(model: nn.Module) -> int | None:
    """How many tokens ``model`` can look up; None if it does not say."""
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)
    size = getattr(embeddings(), "num_embeddings", None)
    return size if isinstance(size, int) else None


def random_prompt(model: nn.Module, batch: int, length: int) -> torch.Tensor:
    """Token ids (batch, length), int64, on the model's device; the same every time."""
    size = vocabulary_size(model)
    if size is None:
        raise GraphPruneError(f"{type(model).__name__} does not look up tokens: there is no prompt to give it.")
    ids = torch.randint(0, size, (batch, length), generator=torch.Generator().manual_seed(0))
    return ids.to(next(model.parameters()).device)


def step(model: nn.Module, ids: torch.Tensor, cache: Any = None) -> Any:
    """One step of generation: the output for ``ids`` (batch, length) after what is in ``cache``.

    As ``generate()`` does it: with a cache, and logits of the last position only where the model can leave out others.
    """
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    if cache is not None:
        options["past_key_values"] = cache
    return model(input_ids=ids, **options)
