"""Calibration batches from what the user gives as ``data=``, or from nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from graphprune.data.columns import TOKENS, batches_of, is_dataset, tokens_of, used_columns
from graphprune.data.forward_arguments import (
    by_name,
    check_names,
    config_of,
    first_tensor,
    known_tokens,
    parameter_names,
)
from graphprune.data.made_inputs import (
    made_batches,
    random_batches,
    rows_wanted,
    sampled_batches,
    snippet_batches,
)
from graphprune.data.texts import MANY, is_path, read_texts, text_of, token_rows, windows
from graphprune.errors import GraphPruneError
from graphprune.ir.program import Program
from graphprune.trace.inputs import special_tokens
from graphprune.trace.quiet import seeded

__all__ = ["calibration_batches", "read_texts", "token_rows"]

Batch = dict[str, Any]
ROWS_AT_ONCE = 4
_TAKES = (
    "data= takes a list of texts, .txt or .jsonl paths, a datasets.Dataset, token tensors, a DataLoader or other "
    "batches of tensors, 'random', 'snippets', or 'sampled'"
)
MADE = {"random": random_batches, "snippets": snippet_batches, "sampled": sampled_batches}  # by the model itself


def calibration_batches(program: Program) -> list[Batch]:
    """Batches of keyword arguments for the model's forward, on its device; the same in every call for a program.

    What ``options.data`` may be, and what becomes of it, is said in :func:`graphprune.compile`. All draws are made
    with ``options.seed``; the generators of the user go on as if nothing was drawn.

    Raises :class:`GraphPruneError` for data of a wrong type, too little of it, empty rows, files or fields that are
    missing, texts without a tokenizer, tokens outside the model's vocabulary, and arguments that forward does not take.
    """
    if program.batches is None:
        with seeded(program.options.seed):  # a DataLoader may shuffle
            program.batches = _checked(program, _batches(program))
    return program.batches


def _batches(program: Program) -> Iterable[Batch]:
    data = program.options.data
    if data is None:
        return made_batches(program)
    if isinstance(data, str) and data in MADE:
        return MADE[data](program)
    if isinstance(data, torch.Tensor):
        return _of_stream(program, [data]) if _is_tokens(data) else _of_rows(program, data)
    if is_dataset(data):
        return _of_dataset(program, data)
    items = _gathered(program, [data] if isinstance(data, (str, Path, Mapping)) else data)
    return _of_items(program, items)


def _gathered(program: Program, data: Any) -> Sequence[Any]:
    """All of a list. Of anything else that can be iterated as much as ``samples`` items need."""
    if not isinstance(data, Iterable):
        raise GraphPruneError(f"{_TAKES}; not {type(data).__name__}.")
    items: list[Any] = []
    rows = 0
    try:
        for item in data:
            items.append(item)
            rows += _rows(item)
            if not isinstance(data, (list, tuple)) and (rows >= rows_wanted(program) or len(items) >= MANY):
                break
    except Exception as error:  # whatever the code of the user raises
        raise GraphPruneError(f"data= failed after {len(items)} items: {type(error).__name__}: {error}") from error
    if not items:
        raise GraphPruneError("data= is empty.")
    program.options.data = items  # an iterator gives its items once
    return items


def _rows(item: Any) -> int:
    """How many rows a batch has; a text is none."""
    values = item.values() if isinstance(item, Mapping) else item if isinstance(item, (list, tuple)) else [item]
    return next((len(v) for v in values if isinstance(v, torch.Tensor) and v.ndim > 1), 0)


def _of_items(program: Program, items: Sequence[Any]) -> Iterable[Batch]:
    if all(isinstance(item, (str, Path)) for item in items):
        return _of_texts(program, [text for item in items for text in _texts(item)])
    if all(isinstance(item, Mapping) for item in items):
        if any(is_dataset(value) for item in items for value in item.values()):
            raise GraphPruneError(f"data= holds several datasets: choose one, such as data[{next(iter(items[0]))!r}].")
        if all("text" in item for item in items):
            return _of_texts(program, [text for n, item in enumerate(items) for text in _column(item, n)])
        return [dict(item) for item in items]
    if all(_is_tokens(item) for item in items):
        return _of_stream(program, items)
    if all(isinstance(item, torch.Tensor) and item.ndim > 1 for item in items):
        return [batch for item in items for batch in _of_rows(program, item, len(item))]
    if all(isinstance(item, (tuple, list)) for item in items):
        return [_positional(program, item, n) for n, item in enumerate(items)]
    odd = next((n for n, item in enumerate(items) if type(item) is not type(items[0])), 0)
    raise GraphPruneError(f"{_TAKES}; item {odd} is {type(items[odd]).__name__}.")


def _texts(item: str | Path) -> list[str]:
    return read_texts([item]) if isinstance(item, Path) or is_path(item) else [item]


def _column(item: Mapping[str, Any], n: int) -> list[str]:
    """The texts of a row, or of a batch of rows."""
    return list(item["text"]) if isinstance(item["text"], (list, tuple)) else [text_of(item, f"Row {n} of data=")]


def _is_tokens(item: Any) -> bool:
    """Whether this is one row of tokens: a vector of integers."""
    if isinstance(item, torch.Tensor):
        return item.ndim == 1 and not item.is_floating_point() and not item.is_complex() and item.dtype != torch.bool
    return isinstance(item, (list, tuple)) and bool(item) and all(type(value) is int for value in item)


def _of_texts(program: Program, texts: Sequence[str]) -> Iterable[Batch]:
    options = program.options
    if options.tokenizer is None:
        raise GraphPruneError("data= holds texts: pass tokenizer= too.")
    rows = token_rows(texts, options.tokenizer, *_shape(program), program.say)
    return _of_rows(program, rows)


def _of_stream(program: Program, pieces: Sequence[Any]) -> Iterable[Batch]:
    empty = next((n for n, piece in enumerate(pieces) if not len(piece)), None)
    if empty is not None:
        raise GraphPruneError(f"Row {empty} of data= (counted from 0) is empty: leave it out.")
    return _of_rows(program, windows(pieces, len(pieces), *_shape(program)))


def _of_rows(program: Program, rows: torch.Tensor, at_once: int = ROWS_AT_ONCE) -> Iterable[Batch]:
    if rows.ndim < 2 or not rows.numel():
        what = "empty" if not rows.numel() else f"{rows.dtype} of shape {tuple(rows.shape)}"
        raise GraphPruneError(f"A tensor as data= has rows of tokens, or is a vector of integers; this one is {what}.")
    names = [TOKENS] if TOKENS in parameter_names(program.model) else [first_tensor(_example(program))]
    if names == [TOKENS] and "decoder_input_ids" in _example(program):  # it says again what it reads
        names.append("decoder_input_ids")
    return [{str(name): part for name in names} for part in rows.split(at_once)]


def _positional(program: Program, item: Sequence[Any], n: int) -> Batch:
    """What forward takes, in the order of the example inputs; what comes after that, such as labels, is left out."""
    names = [name for name, value in _example(program).items() if isinstance(value, torch.Tensor)]
    if len(item) < len(names) or not all(isinstance(value, torch.Tensor) for value in item[: len(names)]):
        given = ", ".join(type(value).__name__ for value in item)
        raise GraphPruneError(f"Batch {n} of data= has ({given}); forward takes tensors for {', '.join(names)}.")
    return dict(zip(names, item, strict=False))


def _of_dataset(program: Program, data: Any) -> Iterable[Batch]:
    options = program.options
    rows, columns = used_columns(data, parameter_names(program.model))
    if columns == ["text"]:
        return _of_texts(program, _Texts(rows))
    if TOKENS in columns and len(columns) == 1:
        return _of_rows(program, windows(tokens_of(rows, options.seed), len(rows), *_shape(program)))
    return batches_of(rows, columns, rows_wanted(program), options.seed, ROWS_AT_ONCE)


def _shape(program: Program) -> tuple[int, int, int]:
    return rows_wanted(program), program.options.length, program.options.seed


class _Texts(Sequence[str]):
    """The texts of a dataset, read when they are wanted."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return text_of(self.rows[index], f"Row {index} of the dataset")


def _example(program: Program) -> Batch:
    return by_name(program.model, program.inputs)


# ------------------------------------------------------------------------------------------------------------ checks


def _checked(program: Program, batches: Iterable[Batch]) -> list[Batch]:
    device = program.device
    caches = config_of(program.model) is not None and "use_cache" in parameter_names(program.model)
    checked = []
    for n, batch in enumerate(batches):
        check_names(program.model, batch, n)
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        if not tensors:
            kinds = ", ".join(f"{name}: {type(value).__name__}" for name, value in batch.items())
            raise GraphPruneError(f"Batch {n} of data= holds no tensor ({kinds}); return_tensors='pt' makes some.")
        for name, value in tensors.items():
            if not value.numel():
                raise GraphPruneError(f"Batch {n} of data= is empty: {name} has the shape {tuple(value.shape)}.")
        if TOKENS in tensors:
            _check_vocabulary(program, tensors[TOKENS], n)
        found = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), batch)
        checked.append({"use_cache": False, **found} if caches else found)  # nobody generates: keys need not be kept
    return checked


def _check_vocabulary(program: Program, ids: torch.Tensor, n: int) -> None:
    model = program.model
    if ids.is_floating_point() or ids.is_complex():
        raise GraphPruneError(f"Batch {n} of data=: tokens are integers, not {ids.dtype}.")
    size = known_tokens(model)
    if size is None:
        return
    config = config_of(model)
    special = torch.tensor(special_tokens(config) if config is not None else [], device=ids.device)
    wrong = ids[((ids < 0) | (ids >= size)) & ~torch.isin(ids, special)]  # an image's may be one more than there are
    if len(wrong):
        raise GraphPruneError(
            f"Token {int(wrong[0])} in batch {n} of data= is outside the vocabulary: the model knows 0 to {size - 1}. "
            "Perhaps the tokenizer is not this model's tokenizer."
        )
