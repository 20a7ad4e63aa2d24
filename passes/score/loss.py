"""The loss whose gradient says what matters, for any model and data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad
from torch.utils._pytree import tree_leaves

from graphprune.errors import GraphPruneError
from graphprune.trace.inputs import forward_parameters

_IGNORE = -100


def calibration_loss(model: nn.Module, batch: dict[str, Any], seed: int) -> torch.Tensor:
    """The sum over the samples of a batch of each one's loss: a float scalar, at least in float32.

    - A batch with ``labels`` for a model that returns a ``loss``: that, times the number of samples.
    - A model that takes ``labels`` and gives a distribution over the vocabulary for every token it read: the mean
      negative log-likelihood of a sample's own tokens; of the next one, or in place for masked language models. Tokens
      that ``attention_mask`` hides do not count.
    - Any other: each output of a sample times a random direction of unit variance, over the root of its size. This
      asks how much the outputs move at all. It takes them for nothing in particular (logits, boxes, features), and
      does not vanish where the model is sure or was trained to a minimum, as a likelihood of its own predictions does.
      All samples share one direction, drawn with ``seed``.
    """
    output = model(**batch)
    own = own_loss(model, batch, output)
    return _along_a_direction(output, seed) if own is None else own[0]


def own_loss(model: nn.Module, batch: dict[str, Any], output: Any) -> tuple[torch.Tensor, bool] | None:
    """The first two losses of :func:`calibration_loss`, of what ``model`` returned for ``batch``; None without either.

    Also whether it is the negative log-likelihood of tokens.
    """
    if "labels" in batch and isinstance(getattr(output, "loss", None), torch.Tensor):
        return output.loss.float() * count_samples(batch), False
    logits = getattr(output, "logits", None)
    prefix = "decoder_" if "decoder_input_ids" in batch else ""
    tokens, mask = batch.get(f"{prefix}input_ids"), batch.get(f"{prefix}attention_mask")
    if (
        "labels" in forward_parameters(model)
        and isinstance(tokens, torch.Tensor)
        and isinstance(logits, torch.Tensor)
        and logits.shape[:-1] == tokens.shape
        and logits.shape[-1] > int(tokens.max())
    ):
        targets = tokens if mask is None or mask.shape != tokens.shape else tokens.masked_fill(mask == 0, _IGNORE)
        in_place = getattr(model, "loss_type", None) == "ForMaskedLM"
        return _token_loss(logits, targets if in_place else pad(targets[:, 1:], (0, 1), value=_IGNORE)), True
    return None


def _token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over rows of the mean over the row's targets. ``(rows, length, vocabulary)`` and ``(rows, length)``."""
    targets = targets.to(logits.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = cross_entropy(
        logits.flatten(0, 1).to(dtype), targets.flatten(), ignore_index=_IGNORE, reduction="none"
    ).view(targets.shape)
    return (losses.sum(1) / (targets != _IGNORE).sum(1).clamp(min=1)).sum()


def _along_a_direction(output: Any, seed: int) -> torch.Tensor:
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    if not found:
        raise GraphPruneError(
            "The model returns no floating-point tensor to take a gradient of: give data= as dicts with labels, for a "
            "model that returns a loss, or use a criterion without gradients."
        )
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for tensor in found:
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        direction = torch.randn(tensor.shape[1:], generator=generator, dtype=torch.float32).to(tensor.device, dtype)
        along = (tensor.to(dtype) * direction).sum() / math.sqrt(max(1, direction.numel()))
        total = total.to(along.device) + along
    return total


def count_samples(batch: dict[str, Any]) -> int:
    """How many samples a batch has: the first dimension of its first tensor."""
    sizes = [value.shape[0] for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim]
    return sizes[0] if sizes else 1


def single_samples(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """A batch as batches of one sample each.

    Raises :class:`GraphPruneError` when its tensors do not have one sample per index of their first dimension.
    """
    count = count_samples(batch)
    if count == 1:
        return [batch]
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    odd = [name for name, value in tensors.items() if not value.ndim or value.shape[0] != count]
    if odd:
        raise GraphPruneError(
            f"A second-order score needs the gradient of every sample, and a batch of data= cannot be split into "
            f"samples: {odd[0]} does not have {count} rows. Give batches of one sample each."
        )
    return [{**batch, **{name: value[i : i + 1] for name, value in tensors.items()}} for i in range(count)]
