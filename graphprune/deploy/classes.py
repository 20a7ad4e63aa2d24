"""Which node groups must shrink together so that a config can say what is left.

All is linear where the model is now: pruning groups at rates ``w`` makes the numbers of the model change at ``G w``,
changing fields at rates ``y`` makes them change at ``J y``. What a config can say is every ``w`` for which there is a
``y`` with ``G w = J y``. A basis of these, with as many zeros in it as can be, is the *classes*: the feed-forward
widths of all layers, the key heads of all layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from graphprune.deploy.fields import Fields, name_of
from graphprune.deploy.stock import Path, Row
from graphprune.ir.axes import Axis, find
from graphprune.ir.program import NodeGroup, Program
from graphprune.ir.sizes import Polynomial

_ZERO = 1e-7
_LARGEST_STEP = 64


@dataclass
class Sizes:
    """How the numbers of a model follow from the sizes of its leaves; those that do not follow stay as they are."""

    of: dict[Row, Polynomial]

    @classmethod
    def of_program(cls, program: Program) -> Sizes:
        axes = program.need("axes")
        found: dict[Row, Polynomial] = {}
        for name, canonical in axes.canonical.items():
            for dim, axis in enumerate(axes.tensors[canonical]):
                found[Row("tensor", name, dim)] = Polynomial.of(axis)
        for attribute, size in program.need("attributes").items():
            found[Row("size", str(attribute))] = size
        return cls(found)


def find_classes(program: Program, fields: Fields) -> tuple[list[dict[str, int]], dict[str, str]]:
    """The classes among the prunable groups: name → indices that go in one step; and why the others are in none."""
    groups: list[NodeGroup] = program.need("prunable")
    matrix = _Matrix(program, fields, groups)
    classes, left = [], {group.name for group in groups}
    for rates in matrix.expressible():
        named = {group.name: rate for group, rate in zip(groups, rates, strict=True) if abs(rate) > _ZERO}
        steps = _whole(named)
        if steps is not None and steps.keys() <= left:
            classes.append(steps)
            left -= steps.keys()
    order = {group.name: place for place, group in enumerate(groups)}
    classes.sort(key=lambda steps: min(order[name] for name in steps))
    return classes, {group.name: matrix.why_not(group) for group in groups if group.name in left}


def _whole(rates: dict[str, float]) -> dict[str, int] | None:
    """Rates in whole numbers, as small as can be; None where some would grow while others shrink."""
    if not rates or min(rates.values()) <= 0:
        return None
    exact = {name: Fraction(rate).limit_denominator(_LARGEST_STEP) for name, rate in rates.items()}
    if any(abs(float(exact[name]) - rate) > _ZERO * max(1.0, rate) for name, rate in rates.items()):
        return None
    common = math.lcm(*(rate.denominator for rate in exact.values()))
    whole = {name: int(rate * common) for name, rate in exact.items()}
    shared = math.gcd(*whole.values())
    return {name: rate // shared for name, rate in whole.items()}


class _Matrix:
    def __init__(self, program: Program, fields: Fields, groups: list[NodeGroup]):
        self._program, self._fields, self._groups = program, fields, groups
        place: dict[Axis, int] = {find(group.axis): n for n, group in enumerate(groups)}
        self._of_group: dict[str, dict[Row, int]] = {group.name: {} for group in groups}
        for row, size in Sizes.of_program(program).of.items():
            if row in fields.base:
                for leaf, slope in size.slopes().items():
                    if leaf in place:
                        self._of_group[groups[place[leaf]].name][row] = slope

    def expressible(self) -> np.ndarray:
        """A basis of the rates that fields can say, in reduced form: shape (classes, groups)."""
        groups = [self._of_group[group.name] for group in self._groups]
        fields = list(self._fields.slopes.values())
        rows = list(dict.fromkeys((*(row for one in groups for row in one), *(row for one in fields for row in one))))
        if not rows or not groups:
            return np.zeros((0, len(groups)))
        pruned = np.array([[one.get(row, 0) for one in groups] for row in rows], dtype=float)
        said = np.array([[one.get(row, 0.0) for one in fields] for row in rows]).reshape(len(rows), -1)
        scale = np.abs(np.hstack((pruned, said))).max(axis=1, keepdims=True)
        pruned, said = pruned / scale, said / scale
        unit = np.linalg.norm(pruned, axis=0)
        unit[unit == 0] = 1
        rest = pruned / unit
        span = _orthonormal(said)
        rest = rest - span @ (span.T @ rest)
        _, values, vectors = np.linalg.svd(rest)
        kernel = vectors[int((values > _ZERO).sum()) :]
        return _reduced(kernel / unit)

    def why_not(self, group: NodeGroup) -> str:
        """What is missing for a config to say how large this group is."""
        kind = self._fields.stock.config_kind.__name__
        mine = self._of_group[group.name]
        touching = [path for path, slopes in self._fields.slopes.items() if mine.keys() & slopes.keys()]
        if not touching:
            return f"no field of {kind} says this size (deploy='transformers')"
        path = min(touching, key=lambda one: len(self._fields.slopes[one].keys() - mine.keys()))
        row = self._other(path, mine)
        if row is None:
            return f"no field of {kind} says this size alone (deploy='transformers')"
        return (
            f"no field of {kind} says this size alone: {name_of(path)} also says {row}{self._left_alone(row)} "
            "(deploy='transformers')"
        )

    def _other(self, path: Path, mine: dict[Row, int]) -> Row | None:
        """Another number that a field says: one that no group can follow, if there is one."""
        others = [row for row in self._fields.slopes[path] if row not in mine]
        follow = {row for rows in self._of_group.values() for row in rows}
        return min(others, key=lambda row: (row in follow, row.kind != "tensor"), default=None)

    def _left_alone(self, row: Row) -> str:
        canonical = self._program.need("axes").canonical
        skipped: dict[str, str] = self._program.need("skipped")
        for group in self._program.need("groups"):
            if group.name in skipped and any(
                row.kind == "tensor" and m.tensor == canonical.get(row.name) and m.dim == row.place
                for m in group.members
            ):
                return f", which is left alone: {skipped[group.name]}"
        return ""


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the space that the columns span."""
    norms = np.linalg.norm(columns, axis=0)
    columns = columns[:, norms > 0] / norms[norms > 0]
    if not columns.size:
        return np.zeros((len(columns), 0))
    vectors, values, _ = np.linalg.svd(columns, full_matrices=False)
    return vectors[:, values > _ZERO]


def _reduced(rows: np.ndarray) -> np.ndarray:
    """The reduced row echelon form."""
    rows = rows.copy()
    done = 0
    for column in range(rows.shape[1]):
        if done == len(rows):
            break
        largest = done + int(np.abs(rows[done:, column]).argmax())
        if abs(rows[largest, column]) < _ZERO:
            continue
        rows[[done, largest]] = rows[[largest, done]]
        rows[done] /= rows[done, column]
        for other in range(len(rows)):
            if other != done:
                rows[other] -= rows[other, column] * rows[done]
        done += 1
    rows[np.abs(rows) < _ZERO] = 0
    return rows[:done]
