"""Perplexity by the protocol of the pruning papers: the text in consecutive windows, each scored by itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.trace.quiet import eval_mode


def perplexity(
    model: nn.Module, tokenizer: Any, text: str, *, length: int = 128, tokens: int | None = None, batch: int = 8
) -> float:
    """exp of the mean next-token loss of ``model`` on ``text``.

    Args:
        length: tokens per window; windows do not overlap and do not see each other.
        tokens: use only the first so many tokens of the text.
        batch: windows per forward.

    Raises:
        GraphPruneError: when the text is shorter than one window.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:tokens], dtype=torch.long)
    windows = ids[: len(ids) // length * length].view(-1, length)
    if not len(windows):
        raise GraphPruneError(f"The text has {len(ids)} tokens, less than one window of {length}.")
    device = next(model.parameters()).device
    total = 0.0
    with eval_mode(model):
        for rows in windows.split(batch):
            rows = rows.to(device)
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
    mean = total / (len(windows) * (length - 1))
    return math.exp(mean) if mean < 700 else math.inf
