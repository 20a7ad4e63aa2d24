"""Numbers of axes as a table: a row for every block, a column for every axis that blocks have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

_BLOCK = re.compile(r"(.*?\d+)\.(.*)")  # up to the first number of the path is a block
_T = TypeVar("_T")


def by_block(values: Mapping[str, _T]) -> tuple[list[str], list[tuple[str, list[_T | None]]]]:
    """Columns, and rows of a block and its value in every column; what is in no block has the block ``""``."""
    rows: dict[str, dict[str, _T]] = {}
    columns: dict[str, None] = {}
    for name, value in values.items():
        found = _BLOCK.match(name)
        block, axis = (found[1], found[2]) if found else ("", name)
        columns[axis] = None
        rows.setdefault(block, {})[axis] = value
    return list(columns), [(block, [cells.get(c) for c in columns]) for block, cells in rows.items()]
