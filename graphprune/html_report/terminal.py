"""The findings in a terminal; plain text when piped."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graphprune.folding import by_block, by_key, joined, places, starred
from graphprune.html_report.findings import Findings
from graphprune.html_report.tables import changes, evaluation, fields, scores, skipped, timings
from graphprune.recovery.report import stage_table


def show(findings: Findings, console: Console | None = None) -> None:
    """Print a table for everything that there is."""
    console = console or Console()
    console.print(escape(" · ".join(filter(None, (findings.title, findings.class_name)))))
    if findings.reports:
        _print(console, "size", ["", "before", "after", "change"], changes(findings.reports))
        for report in findings.reports:
            console.print(escape(str(report)))
        if rows := fields(findings.reports[-1]):
            _print(console, "fields of the config", ["field", "before", "after"], rows)
    if findings.widths:
        columns, blocks = by_block(findings.widths)
        _print(
            console, "widths", ["block", *columns], [[block, *map(_width, pairs)] for block, pairs in joined(blocks)]
        )
    found = findings.reports[-1].scores if findings.reports else {}
    for alike in by_key(found, starred):
        where, numbers = places(alike)
        head, rows = scores({str(n): found[name] for n, name in zip(numbers, alike, strict=True)})
        _print(console, f"scores of {starred(alike[0])}", [where, *head[1:]], rows)
    if findings.evaluations:
        _print(console, "evaluation", *evaluation(findings.evaluations))
    for stage in findings.stages:
        _print(console, f"recovery: {stage.name}, validation loss and share of the round", *stage_table(stage))
    if findings.knowledge is not None:
        console.print("knowledge distribution", style="italic")
        console.print(escape(str(findings.knowledge)))
    if rows := skipped(findings.reports):
        _print(console, "left alone", ["node group", "reason"], rows)
    if rows := timings(findings.reports):
        _print(console, "time", ["pass", "seconds"], rows)


def _print(console: Console, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=escape(title), title_justify="left")
    for number, name in enumerate(head):
        text = number == 0 or name == "reason"
        table.add_column(escape(name), justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _width(pair: tuple[int, int] | None) -> str:
    return "" if pair is None else f"{pair[0]}→{pair[1]} {_EIGHTHS[round(8 * pair[1] / pair[0])]}"


_EIGHTHS = " ▁▂▃▄▅▆▇█"
