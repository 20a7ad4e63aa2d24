"""What a compile did."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.ir.plan import Plan
from graphprune.ir.program import Program
from graphprune.trace.provenance import Attribute

REPORT_ATTRIBUTE = "_graphprune_report"
_BLOCK = re.compile(r"(.*?\d+)\.(.*)")  # up to the first number of the path is a block


@dataclass
class Report:
    """What was done to a pruned model.

    Attributes:
        parameters_before, parameters_after: number of parameters, tied ones once.
        bytes_before, bytes_after: what they take.
        ratio: parameters removed / parameters before.
        plan: what was kept; replay it with ``compile(model, plan=...)``.
        oracle_error: largest difference between the pruned model and the masked original, relative to the largest
            output; None if it was not verified.
        skipped: axis → why it was left alone.
        widths: pruned axis → (size before, size after).
        attributes: integer attribute → new value, over all prunings so far.
        seconds: pass → seconds.
        total_seconds: of the whole call.
        history: the reports of earlier prunings of the same model, oldest first.
        base_config: the Hugging Face config before the first pruning, or None.
        new_biases: linear layers that got a bias, by their paths, over all prunings so far.
        fields: with ``deploy``, config field → (before, after), of those that changed; before None where there was
            none. None for a model that its config does not describe.
        unsaid: share of the prunable groups that ``deploy`` left alone, since no field says their size alone.
        emitted: ``"module"`` (the same class) or ``"graph"`` (a torch.fx.GraphModule for the example shapes only).
    """

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    plan: Plan
    oracle_error: float | None
    skipped: dict[str, str]
    widths: dict[str, tuple[int, int]]
    attributes: dict[Attribute, int]
    seconds: dict[str, float]
    total_seconds: float
    history: list[Report]
    base_config: Any
    emitted: str = "module"
    new_biases: list[str] = field(default_factory=list)
    fields: dict[str, tuple[int | None, int]] | None = None
    unsaid: float = 0.0

    @property
    def ratio(self) -> float:
        return 1 - self.parameters_after / self.parameters_before

    def __str__(self) -> str:
        proof = "not verified" if self.oracle_error is None else f"oracle error {self.oracle_error:.1e}"
        ragged = f" ({len(self.plan.under)} ragged)" if self.plan.under else ""
        axes = f"{len(self.widths)} axes pruned{ragged}, {len(self.skipped)} left alone"
        return (
            f"{self.parameters_before:,} → {self.parameters_after:,} parameters (−{self.ratio:.2%}), "
            f"{axes}, {proof}, {self.total_seconds:.1f} s"
            + ("" if self.fields is None else f"; {self.deployed()}")
            + (", as a graph for the shapes of the example inputs only" if self.emitted == "graph" else "")
        )

    def deployed(self) -> str:
        """Which fields of the config changed, and how many groups stayed because none says their size."""
        changes = ", ".join(f"{name} {old} → {new}" for name, (old, new) in (self.fields or {}).items())
        return f"config: {changes or 'as it was'}; {self.unsaid:.0%} of the groups left alone for it"


def make_report(
    program: Program,
    before: tuple[int, int],
    after: tuple[int, int],
    seconds: dict[str, float],
    total_seconds: float,
    base_config: Any,
    earlier: Report | None,
) -> Report:
    """Collect the report of a finished program."""
    plan: Plan = program.need("plan")
    return Report(
        parameters_before=before[0],
        parameters_after=after[0],
        bytes_before=before[1],
        bytes_after=after[1],
        plan=plan,
        oracle_error=program.oracle_error,
        skipped=dict(program.need("skipped")),
        widths=plan.widths(),
        attributes={**(earlier.attributes if earlier else {}), **program.need("new_attributes")},
        seconds=seconds,
        total_seconds=total_seconds,
        history=[*earlier.history, earlier] if earlier else [],
        base_config=base_config,
        emitted=program.options.emit,
        new_biases=[*(earlier.new_biases if earlier else []), *program.new_biases],
        fields=None if program.stated is None else dict(program.stated.fields),
        unsaid=len(program.unsaid) / max(1, len(program.unsaid) + len(program.need("prunable"))),
    )


def report(model: nn.Module) -> Report:
    """What :func:`graphprune.compile` did to ``model``. Raises :class:`GraphPruneError` if it did nothing."""
    found = getattr(model, REPORT_ATTRIBUTE, None)
    if found is None:
        raise GraphPruneError(f"This {type(model).__name__} was not made by graphprune.compile or graphprune.load.")
    return found


def widths_by_block(widths: dict[str, tuple[int, int]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """``widths`` as a table: the axes that occur in a block as columns, and a row of ``1536→1126`` per block."""
    rows: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for name, (before, after) in widths.items():
        found = _BLOCK.match(name)
        block, axis = (found[1], found[2]) if found else ("", name)
        columns[axis] = None
        rows.setdefault(block, {})[axis] = f"{before}→{after}"
    return list(columns), [(block, [cells.get(c, "") for c in columns]) for block, cells in rows.items()]
