"""Calibration batches from what the user gives as ``data=``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from graphprune.errors import GraphPruneError
from graphprune.ir.program import Program


def calibration_batches(program: Program) -> list[dict[str, Any]]:
    """Batches of keyword arguments for the model's forward.

    ``data`` is a list of texts (with ``tokenizer``), cut into ``samples`` rows of ``length`` tokens drawn with
    ``seed``; or a list of dicts of tensors, used as they are.

    Raises :class:`GraphPruneError` when there is no data, too little of it, no tokenizer for texts, or a token
    outside the model's vocabulary.
    """
    options = program.options
    data = options.data
    if data is None:
        raise GraphPruneError(f"Method {options.method!r} looks at activations: pass data=, a list of texts.")
    if isinstance(data, str):
        data = [data]
    data = list(data)
    if not data:
        raise GraphPruneError("data= is empty.")
    if all(isinstance(item, dict) for item in data):
        return data
    if not all(isinstance(item, str) for item in data):
        raise GraphPruneError("data= takes a list of texts, or a list of dicts of tensors for the model's forward.")
    if options.tokenizer is None:
        raise GraphPruneError("data= holds texts: pass tokenizer= too.")
    ids = token_rows(data, options.tokenizer, options.samples, options.length, options.seed)
    device = next(program.model.parameters()).device
    _check_vocabulary(program.model, ids)
    return [{"input_ids": rows.to(device)} for rows in ids.split(4)]


def token_rows(texts: list[str], tokenizer: Any, samples: int, length: int, seed: int) -> torch.Tensor:
    """``samples`` rows of ``length`` consecutive tokens, int64, from random places of the joined texts."""
    stream = torch.cat([torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long) for text in texts])
    if len(stream) < 2 * length:
        raise GraphPruneError(
            f"The calibration texts have {len(stream)} tokens; at least {2 * length} are needed for rows of {length}."
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(stream) - length + 1, (samples,), generator=generator)
    return torch.stack([stream[start : start + length] for start in starts.tolist()])


def _check_vocabulary(model: Any, ids: torch.Tensor) -> None:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    size = getattr(embedding, "num_embeddings", None)
    if size is not None and int(ids.max()) >= size:
        raise GraphPruneError(
            f"The tokenizer gives token {int(ids.max())}, the model knows {size}: it is not this model's tokenizer."
        )


def read_texts(paths: Sequence[str]) -> list[str]:
    """The texts of ``.txt`` files (one each) and ``.jsonl`` files (the field ``text`` of every row).

    Raises :class:`GraphPruneError` naming the file, and the row, that cannot be read.
    """
    texts = []
    for path in map(Path, paths):
        try:
            content = path.read_text(encoding="utf-8")
            if path.suffix == ".jsonl":
                texts += [str(json.loads(line)["text"]) for line in content.splitlines() if line.strip()]
            else:
                texts.append(content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GraphPruneError(f"{path} cannot be read as calibration text: {error!r}") from error
    return texts
