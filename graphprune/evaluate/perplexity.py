"""Perplexity by the protocol of the pruning papers: the text in consecutive windows, each scored by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.evaluate.language_model import TOKENS_PER_FORWARD, check_language_model, vocabulary_size
from graphprune.trace.quiet import eval_mode

_POSITIONS_PER_LOSS = 256  # the loss makes a copy of its logits
_IGNORED = -100


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    length: int = 128,
    tokens: int | None = None,
    batch: int = 8,
    progress: Callable[[str], None] | None = None,
) -> float:
    """exp of the mean next-token loss of ``model`` on ``text``; infinity when that loss is not a number or overflows.

    Args:
        length: tokens per window; windows do not overlap and do not see each other. What is left over is not scored.
        tokens: use only the first so many tokens of the text.
        batch: windows per forward at most; fewer when they are long, so that memory stays bounded.
        progress: called with how many windows are done.

    Raises:
        GraphPruneError: when the text is shorter than one window, the tokenizer is not this model's, or the model is
            not a causal language model for windows of that length.
    """
    check_language_model(model, length)
    windows = _windows(model, tokenizer, text, length, tokens)
    device = next(model.parameters()).device
    total, done = 0.0, 0
    with eval_mode(model):
        for rows in windows.split(max(1, min(batch, TOKENS_PER_FORWARD // length))):
            total += _loss(model, rows.to(device))
            done += len(rows)
            if progress is not None:
                progress(f"{done} of {len(windows)} windows")
    mean = total / (len(windows) * (length - 1))
    return math.exp(mean) if mean < 700 else math.inf  # not a number compares false


def _windows(model: nn.Module, tokenizer: Any, text: str, length: int, tokens: int | None) -> torch.Tensor:
    if tokenizer is None:
        raise GraphPruneError("Perplexity of a text needs the model's tokenizer.")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:tokens], dtype=torch.long)
    windows = ids[: len(ids) // length * length].view(-1, length)
    if not len(windows):
        raise GraphPruneError(f"The text has {len(ids)} tokens, less than one window of {length}.")
    size = vocabulary_size(model)
    if size is not None and int(ids.max()) >= size:
        raise GraphPruneError(
            f"The tokenizer gives token {int(ids.max())}, the model knows {size}: it is not this model's tokenizer."
        )
    return windows


def _loss(model: nn.Module, rows: torch.Tensor) -> float:
    """Summed next-token loss, in nats, of windows (batch, length) of token ids."""
    targets = rows.roll(-1, 1)
    targets[:, -1] = _IGNORED
    logits = getattr(model(input_ids=rows, use_cache=False), "logits", None)
    if logits is None:
        raise GraphPruneError(f"{type(model).__name__} returns no logits: it predicts no next token.")
    total = 0.0
    parts = (logits.flatten(0, 1), targets.flatten())
    for some, right in zip(*(part.split(_POSITIONS_PER_LOSS) for part in parts), strict=True):
        total += float(nn.functional.cross_entropy(some.float(), right, ignore_index=_IGNORED, reduction="sum"))
    return total
