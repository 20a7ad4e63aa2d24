"""Rows of a ``datasets.Dataset`` as texts, tokens or batches of tensors."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from graphprune.data.texts import MANY, order
from graphprune.errors import GraphPruneError

TOKENS = "input_ids"
# Columns that only go along with tokens, one number for each.
_BESIDE_TOKENS = {"attention_mask", "token_type_ids", "position_ids", "labels"}


def is_dataset(data: Any) -> bool:
    """Whether this is a dataset of the library ``datasets``, which is not imported for it."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(data, (library.Dataset, library.IterableDataset))


def used_columns(data: Any, arguments: Collection[str]) -> tuple[Sequence[dict[str, Any]], list[str]]:
    """The rows, and the names of the columns to use: ``input_ids``, ``text``, or those that forward takes.

    Of a stream of rows the first 4,096 are read.

    Raises :class:`GraphPruneError` for no rows, and naming the columns when none can be used.
    """
    rows = data if hasattr(data, "__len__") else list(islice(data, MANY))
    if not len(rows):
        raise GraphPruneError("data= is empty: the dataset has no rows.")
    columns = list(data.column_names or rows[0])
    taken = [name for name in columns if name in arguments]
    if TOKENS in taken and {*taken} <= {TOKENS, *_BESIDE_TOKENS}:
        return rows, [TOKENS]
    if TOKENS not in taken and "text" in columns:
        return rows, ["text"]
    if not taken:
        raise GraphPruneError(
            f"The dataset has the columns {', '.join(columns)}: neither 'text' nor one that the model's forward takes "
            f"({', '.join(arguments)}). data.rename_column(…) gives one another name."
        )
    return rows, taken


def tokens_of(rows: Sequence[dict[str, Any]], seed: int) -> Iterator[torch.Tensor]:
    """The tokens of each row, without padding."""
    for index in order(len(rows), seed):
        row = rows[index]
        ids = _tensor(row, TOKENS, index)
        if row.get("attention_mask") is not None:
            ids = ids[_tensor(row, "attention_mask", index).bool()]
        if not len(ids):
            raise GraphPruneError(f"Row {index} of the dataset (counted from 0) is empty: leave it out.")
        yield ids


def batches_of(
    rows: Sequence[dict[str, Any]], columns: list[str], samples: int, seed: int, at_once: int
) -> list[dict[str, torch.Tensor]]:
    """``samples`` random rows (or all, if there are fewer), neighbours of equal shapes stacked."""
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    items = [{name: _tensor(rows[index], name, index) for name in columns} for index in drawn]
    groups: list[list[dict[str, torch.Tensor]]] = []
    for item in items:
        if groups and len(groups[-1]) < at_once and _shapes(item) == _shapes(groups[-1][0]):
            groups[-1].append(item)
        else:
            groups.append([item])
    return [{name: torch.stack([item[name] for item in group]) for name in columns} for group in groups]


def _shapes(item: dict[str, torch.Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(value.shape, value.dtype) for value in item.values()]


def _tensor(row: dict[str, Any], name: str, index: int) -> torch.Tensor:
    try:
        return torch.as_tensor(row[name])
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise GraphPruneError(
            f"Row {index} of the dataset: {name} is {type(row.get(name)).__name__}, which is no tensor ({error})."
        ) from error
