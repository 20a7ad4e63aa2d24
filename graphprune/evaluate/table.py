"""Evaluations side by side: the first is what the others are compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from graphprune.evaluate.evaluation import Evaluation


def comparison(evaluations: Mapping[str, Evaluation]) -> Any:
    """A rich table: a row for everything that any model was measured for, a column for every model.

    ``evaluations`` has the name of every model → what was measured. Models after the first have their relative change
    beside every value.
    """
    from rich.table import Table

    table = Table("", show_edge=True)
    for number, name in enumerate(evaluations):
        table.add_column(name, justify="right", overflow="fold")
        if number:
            table.add_column("change", justify="right")
    for title, cells in compared(evaluations):
        table.add_row(title, *cells)
    return table


def compared(evaluations: Mapping[str, Evaluation]) -> list[tuple[str, list[str]]]:
    """The rows of that table as text: a title, and the value of every model with its change after the first."""
    rows = []
    columns = [dict(rows_of(evaluation)) for evaluation in evaluations.values()]
    for title in dict.fromkeys(title for column in columns for title in column):
        cells = []
        for number, column in enumerate(columns):
            text, value = column.get(title, ("", None))
            cells.append(text)
            if number:
                cells.append(_change(columns[0].get(title, ("", None))[1], value))
        rows.append((title, cells))
    return rows


def rows_of(one: Evaluation) -> Iterator[tuple[str, tuple[str, float | None]]]:
    """Title, what is shown, and the number that is compared."""
    for title, count in (
        ("parameters", one.parameters),
        ("MACs per token", one.macs),
        ("bytes in memory", one.parameter_bytes),
        ("bytes on disk", one.checkpoint_bytes),
        ("peak memory, bytes", one.peak_memory_bytes),
    ):
        if count is not None:
            yield title, (f"{count:,}", count)
    for length, value in one.perplexity.items():
        yield f"perplexity @{length}", (_perplexity(value), value)
    for timed in one.latency:
        of = f"batch {timed.batch}, {timed.prompt} tokens"
        yield f"prefill ms, {of}", (f"{timed.prefill_ms:,.2f}", timed.prefill_ms)
        yield f"prefill tokens/s, {of}", _rate(timed.prefill_tokens_per_second)
        if timed.decode_ms is not None and timed.decode_tokens_per_second is not None:
            yield f"decode ms, {of}", (f"{timed.decode_ms:,.2f}", timed.decode_ms)
            yield f"decode tokens/s, {of}", _rate(timed.decode_tokens_per_second)
    for task, metrics in one.tasks.items():
        for metric, value in metrics.items():
            if "stderr" not in metric:
                error = metrics.get(_stderr_of(metric))
                spread = "" if error is None else f" ±{error:.4f}"
                yield f"{task} {metric}", (f"{value:.4f}{spread}", value)
    if one.task_average is not None:
        yield "average of the tasks", (f"{one.task_average:.4f}", one.task_average)


def _stderr_of(metric: str) -> str:
    name, *of_filter = metric.split(",")
    return ",".join((f"{name}_stderr", *of_filter))


def _perplexity(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def _rate(value: float) -> tuple[str, float]:
    return f"{value:,.1f}", value


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None or not before or not (math.isfinite(before) and math.isfinite(after)):
        return ""
    change = after / before - 1
    return f"{change:+.2%}" if change < 10 else f"×{after / before:,.0f}"
