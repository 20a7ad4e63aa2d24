"""What a compile did."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.folding import by_block, joined
from graphprune.ir.plan import Plan
from graphprune.ir.program import Program
from graphprune.ir.score_spread import ScoreSpread, score_spreads
from graphprune.trace.provenance import Attribute

REPORT_ATTRIBUTE = "_graphprune_report"


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
        settings: the arguments of :func:`graphprune.compile` that were not left at their defaults, as plain data;
            of ``data`` only what is a name, and ``"given"`` otherwise.
        calibration: (rows, tokens per row or None) that ran through the model; None if none did.
        base_model: the name on the hub of the model that was pruned first, if it came from there.
        training: what was trained after pruning, a sentence for each.
        scores: node group → how the scores of what was kept and of what was removed lie. Empty for a replayed plan.
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
    settings: dict[str, Any] = field(default_factory=dict)
    calibration: tuple[int, int | None] | None = None
    base_model: str | None = None
    training: list[str] = field(default_factory=list)
    scores: dict[str, ScoreSpread] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return 1 - self.parameters_after / self.parameters_before

    def __str__(self) -> str:
        proof = "not verified" if self.oracle_error is None else f"oracle error {self.oracle_error:.1e}"
        ragged = f" ({len(self.plan.under)} ragged)" if self.plan.under else ""
        change = f"{-self.ratio:+.2%}".replace("-", "−")  # adapters that are not merged can make it grow
        axes = f"{len(self.widths)} axes pruned{ragged}, {len(self.skipped)} left alone"
        return (
            f"{self.parameters_before:,} → {self.parameters_after:,} parameters ({change}), "
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
        calibration=calibration_size(program.batches),
        base_model=earlier.base_model if earlier else name_on_the_hub(base_config),
        scores=score_spreads(program),
    )


def calibration_size(batches: list[dict[str, Any]] | None) -> tuple[int, int | None] | None:
    """(rows, tokens per row or None) of calibration data."""
    if not batches:
        return None
    first = [next((v for v in batch.values() if isinstance(v, torch.Tensor)), None) for batch in batches]
    tokens = batches[0].get("input_ids")
    length = tokens.shape[1] if isinstance(tokens, torch.Tensor) and tokens.dim() == 2 else None
    return sum(len(tensor) for tensor in first if tensor is not None and tensor.dim()), length


def name_on_the_hub(config: Any) -> str | None:
    """``owner/name`` that a config was loaded from; None for a folder, and where nothing says it."""
    name = getattr(config, "_name_or_path", None)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) or os.path.exists(name):
        return None
    return None if name.startswith(".") else name


def report(model: nn.Module) -> Report:
    """What :func:`graphprune.compile` did to ``model``. Raises :class:`GraphPruneError` if it did nothing."""
    found = getattr(model, REPORT_ATTRIBUTE, None)
    if found is None:
        raise GraphPruneError(f"This {type(model).__name__} was not made by graphprune.compile or graphprune.load.")
    return found


def widths_over_all(report: Report) -> dict[str, tuple[int, int]]:
    """Pruned axis → (size before the first pruning, size after the last), over all prunings of a model."""
    found: dict[str, tuple[int, int]] = {}
    for one in (*report.history, report):
        for name, (before, after) in one.widths.items():
            found[name] = (found[name][0] if name in found else before, after)
    return found


def widths_by_block(widths: dict[str, tuple[int, int]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """``widths`` as a table: the axes that occur in a block as columns, rows of ``1536→1126`` for blocks."""
    columns, rows = by_block({name: f"{before}→{after}" for name, (before, after) in widths.items()})
    return columns, [(blocks, [cell or "" for cell in cells]) for blocks, cells in joined(rows)]
