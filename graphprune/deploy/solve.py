"""The config that says what a plan leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphprune.deploy.classes import Sizes
from graphprune.deploy.fields import Fields, name_of
from graphprune.deploy.stock import PER_LAYER, STOCK_REFUSALS, Path, Rows, Settings, at, changed, rows_of, trying
from graphprune.errors import GraphPruneError
from graphprune.ir.axes import Axis, find
from graphprune.ir.program import Program
from graphprune.trace.provenance import Attribute

_ROUNDS = 8


@dataclass
class Stated:
    """A config that describes a pruned model.

    ``config`` is what from_pretrained makes of ``settings``.
    ``fields`` has every field that changes: dotted name → (before, after), before None where there was none.
    """

    settings: Settings
    config: Any
    fields: dict[str, tuple[int | None, int]]


def solve_config(program: Program) -> Stated:
    """Find values of fields for which the class builds exactly the sizes that the plan leaves.

    Raises :class:`GraphPruneError` naming a tensor of which no field says the size.
    """
    fields: Fields = program.need("fields")
    selection = program.selection()

    def size(axis: Axis) -> int:
        kept = selection.get(find(axis))
        return axis.size if kept is None else kept.count

    return _solved(program, fields, _wanted(program, fields, size))


def can_say(program: Program, removed: dict[str, int]) -> bool:
    """Whether there is a config for what is left when so many indices of each group are gone."""
    fields: Fields = program.need("fields")
    gone = {find(group.axis): removed.get(group.name, 0) for group in program.need("prunable")}
    try:
        _solved(program, fields, _wanted(program, fields, lambda axis: axis.size - gone.get(find(axis), 0)))
    except GraphPruneError:
        return False
    return True


@trying()
def _solved(program: Program, fields: Fields, wanted: Rows) -> Stated:
    attributes = list(program.need("attributes"))
    old = {path: at(fields.settings, path) for path in _independent(fields)}
    values, rows, refusal = dict(old), fields.base, ""
    for _ in range(_ROUNDS):
        if rows == wanted:
            return _stated(fields, _moved(old, values), wanted, attributes)
        step = _step(fields, list(values), rows, wanted)
        moved = {path: max(1, round(value + step[n])) for n, (path, value) in enumerate(values.items())}
        if moved == values:
            break
        values = moved
        try:
            rows = rows_of(fields.stock.build(changed(fields.settings, values)), attributes)
        except STOCK_REFUSALS as error:
            refusal = str(error).strip().split("\n")[-1].strip()
            break
    raise _inexpressible(fields, _moved(old, values), rows, wanted, refusal)


def _moved(old: dict[Path, int], values: dict[Path, int]) -> dict[Path, int]:
    return {path: value for path, value in values.items() if value != old[path]}


def _wanted(program: Program, fields: Fields, size: Callable[[Axis], int]) -> Rows:
    """Every number as it must be after pruning, given the size of every leaf then."""
    sizes = Sizes.of_program(program).of
    return {
        row: sizes[row].value(size) if row in sizes and row.kind != "computed" else value
        for row, value in fields.base.items()
    }


def _independent(fields: Fields) -> list[Path]:
    """Fields that say something that those before them do not say."""
    chosen: list[Path] = []
    rows = list(fields.base)
    matrix = np.zeros((len(rows), 0))
    for path, slopes in fields.slopes.items():
        column = np.array([[slopes.get(row, 0.0)] for row in rows])
        more = np.hstack((matrix, column / np.linalg.norm(column)))
        if np.linalg.matrix_rank(more, tol=1e-7) > len(chosen):
            matrix, chosen = more, [*chosen, path]
    return chosen


def _step(fields: Fields, paths: list[Path], rows: Rows, wanted: Rows) -> np.ndarray:
    """How far to move every field, by their slopes."""
    scale = {row: max(abs(fields.slopes[path].get(row, 0.0)) for path in paths) for row in wanted}
    used = [row for row in wanted if scale[row]]
    slopes = np.array([[fields.slopes[path].get(row, 0.0) / scale[row] for path in paths] for row in used])
    missing = np.array([(wanted[row] - rows.get(row, 0)) / scale[row] for row in used])
    return np.linalg.lstsq(slopes, missing, rcond=None)[0]


def _stated(fields: Fields, values: dict[Path, int], wanted: Rows, attributes: list[Attribute]) -> Stated:
    """The config with the fewest additions: what its class computes itself need not be said."""
    said = {path: at(fields.settings, path) for path in fields.added} | values
    for path in fields.added:
        fewer = {other: value for other, value in said.items() if other != path}
        built = fields.stock.try_to_build(changed(fields.stock.settings, fewer))
        if built is not None and rows_of(built, attributes) == wanted:
            said = fewer
    before = fields.stock.settings
    # Of a field that layers differ in, every layer says its own.
    layers = {path: at(fields.settings, path) for path in fields.slopes if PER_LAYER in path and values}
    settings = changed(before, layers | said)
    return Stated(
        settings,
        fields.stock.config(settings),
        {
            name_of(path): (at(fields.settings if path in layers else before, path), value)
            for path, value in said.items()
        },
    )


def _inexpressible(fields: Fields, values: dict[Path, int], rows: Rows, wanted: Rows, refusal: str) -> GraphPruneError:
    kind = fields.stock.config_kind.__name__
    said = ", ".join(f"{name_of(path)}={value}" for path, value in values.items()) or "its present values"
    what = f" It refuses {said}: {refusal}"
    if not refusal:
        row = next(row for row in wanted if rows.get(row) != wanted[row])
        what = f" {row} is to be {_number(wanted[row])}, but {said} makes it {_number(rows.get(row))}."
    return GraphPruneError(
        f"No {kind} describes what the plan leaves, so stock from_pretrained could not load it.{what} Leave out "
        "deploy=, or give a plan made with it."
    )


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:g}"
