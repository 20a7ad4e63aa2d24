"""Repeated blocks shown once: node groups that differ only in their block numbers, with a count."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from graphprune.ir.program import NodeGroup

_NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")
_BLOCK = re.compile(r"(.*?\d+)\.(.*)")  # up to the first number of the path is a block
_NUMBERED = re.compile(r"(.*?)(\d+)")
_T = TypeVar("_T")


def starred(text: str) -> str:
    """``text`` with the numbers inside module paths replaced: ``layers.3.mlp`` and ``layers.4.mlp`` are one."""
    return _NUMBER.sub("*", text)


def places(alike: list[str]) -> tuple[str, list[int]]:
    """Where names that differ only in numbers stand: at their blocks (3 of ``layers.3.mlp``), or in a row where they
    have no number or a block has several; and which of both it is.
    """
    found = [_NUMBER.search(name) for name in alike]
    blocks = [int(match[0]) for match in found if match]
    return ("block", blocks) if len(set(blocks)) == len(alike) else ("group", list(range(len(alike))))


def by_key(items: Iterable[_T], key: Callable[[_T], Hashable]) -> list[list[_T]]:
    """``items`` in lists of equal key, in order of first appearance."""
    found: dict[Hashable, list[_T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


def in_blocks(items: Iterable[_T], name: Callable[[_T], str]) -> tuple[list[list[_T]], list[_T]]:
    """Lists of items whose names differ only in their block numbers, and the items that no other is like."""
    found = by_key(items, lambda item: starred(name(item)))
    return [alike for alike in found if len(alike) > 1], [alike[0] for alike in found if len(alike) == 1]


def by_block(values: Mapping[str, _T]) -> tuple[list[str], list[tuple[str, list[_T | None]]]]:
    """Numbered blocks as a table: what they have as columns, and rows of a block and its value in every column.

    What is in no block is in a row named ``""``.
    """
    rows: dict[str, dict[str, _T]] = {}
    columns: dict[str, None] = {}
    for name, value in values.items():
        found = _BLOCK.match(name)
        block, axis = (found[1], found[2]) if found else ("", name)
        columns[axis] = None
        rows.setdefault(block, {})[axis] = value
    return list(columns), [(block, [cells.get(c) for c in columns]) for block, cells in rows.items()]


def joined(rows: list[tuple[str, list[_T]]]) -> list[tuple[str, list[_T]]]:
    """Rows of :func:`by_block` in which blocks that follow one another and are alike share one: ``layers.3–20``."""
    found: list[tuple[list[str], list[_T]]] = []
    for block, cells in rows:
        if found and found[-1][1] == cells and _follows(found[-1][0][-1], block):
            found[-1][0].append(block)
        else:
            found.append(([block], cells))
    return [(_span(blocks), cells) for blocks, cells in found]


def _follows(before: str, block: str) -> bool:
    one, other = _NUMBERED.fullmatch(before), _NUMBERED.fullmatch(block)
    return one is not None and other is not None and (one[1], int(one[2]) + 1) == (other[1], int(other[2]))


def _span(blocks: list[str]) -> str:
    return blocks[0] if len(blocks) == 1 else f"{blocks[0]}–{blocks[-1].rpartition('.')[2]}"


def common_name(names: list[str]) -> str:
    """The name of one thing as it is, of several with stars for their block numbers."""
    return names[0] if len(names) == 1 else starred(names[0])


@dataclass(frozen=True)
class Fold:
    """Node groups that are the same but for their block numbers.

    ``members`` are the parameter dimensions of all of them, as text, each kind once. ``reason`` is why they are left
    alone, empty when they are not.
    """

    groups: list[NodeGroup]
    reason: str
    members: list[str]

    @property
    def name(self) -> str:
        return common_name([group.name for group in self.groups])

    @property
    def size(self) -> int:
        return self.groups[0].size


def fold_groups(groups: Iterable[NodeGroup], reason: Callable[[NodeGroup], str]) -> list[Fold]:
    """Fold ``groups`` that have the same size, reason and members but for the numbers in module paths."""

    def key(group: NodeGroup) -> Hashable:
        members = dict.fromkeys(starred(str(member)) for member in group.members)
        return starred(group.name), group.size, starred(reason(group)), tuple(members)

    return [_fold(same, reason) for same in by_key(groups, key)]


def _fold(same: list[NodeGroup], reason: Callable[[NodeGroup], str]) -> Fold:
    members = list(dict.fromkeys(str(member) for group in same for member in group.members))
    why = common_name([reason(group) for group in same])
    return Fold(same, why, [common_name(alike) for alike in by_key(members, starred)])
