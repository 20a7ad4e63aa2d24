"""The findings as one HTML page without scripts; a section for everything that there is."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Iterator

from graphprune.folding import by_block, in_blocks, places, starred
from graphprune.html_report.charts import heat_map, lines, table
from graphprune.html_report.findings import Findings
from graphprune.html_report.tables import SHOWN, changes, evaluation, fields, scores, shown_scores, skipped, timings
from graphprune.ir.knowledge import MEASURES, Knowledge
from graphprune.pages.document import document, resource
from graphprune.recovery.recover import Stage
from graphprune.recovery.report import stage_table


def to_html(findings: Findings) -> str:
    """The whole page: one file that needs nothing but a browser."""
    sections = [(title, body) for title, body in _sections(findings) if body]
    contents = "".join(f'<li><a href="#s{n}">{html.escape(title)}</a></li>' for n, (title, _) in enumerate(sections))
    written = ", ".join(f"{name} {version}" for name, version in findings.versions.items())
    about = " · ".join(filter(None, (findings.class_name, f"written by {written}" if written else "")))
    body = (
        f"<header><h1>{html.escape(findings.title)}</h1><p>{html.escape(about)}</p>"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav></header><main>'
        + "".join(
            f'<section id="s{n}"><h2>{html.escape(title)}</h2>{one}</section>'
            for n, (title, one) in enumerate(sections)
        )
        + "</main>"
    )
    return document(f"{findings.title}: report", body, resource("graphprune.html_report", "report.css"))


def _sections(findings: Findings) -> Iterator[tuple[str, str]]:
    yield "Size", _sizes(findings)
    yield "Widths", _widths(findings)
    yield "Scores", _scores(findings)
    yield "Evaluation", _evaluations(findings)
    for stage in findings.stages:
        yield f"Recovery: {stage.name}", _stage(stage)
    if findings.knowledge is not None:
        yield "Knowledge distribution", _knowledge(findings.knowledge)
    yield "Left alone", _skipped(findings)
    yield "Time", _seconds(findings)


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _sizes(findings: Findings) -> str:
    if not findings.reports:
        return ""
    parts = [table(["", "before", "after", "change"], changes(findings.reports), "sizes before and after")]
    for number, report in enumerate(findings.reports, 1):
        which = f"Pruning {number}: " if len(findings.reports) > 1 else ""
        parts.append(_paragraph(f"{which}{report} (method {report.plan.method or 'not recorded'})"))
    rows = fields(findings.reports[-1])
    if rows:
        parts += ["<h3>Fields of the config</h3>", table(["field", "before", "after"], rows, "fields of the config")]
    return "".join(parts)


def _widths(findings: Findings) -> str:
    if not findings.widths:
        return ""
    columns, rows = by_block(findings.widths)
    cells = [
        (block, [None if pair is None else (f"{pair[0]:,} → {pair[1]:,}", pair[1] / pair[0]) for pair in pairs])
        for block, pairs in rows
    ]
    return _paragraph("Before → after; the darker, the more of it is kept.") + heat_map(
        "widths by block", columns, cells
    )


def _scores(findings: Findings) -> str:
    """Of the last pruning: a chart for groups that differ only in their block's number, a table of all others."""
    found = findings.reports[-1].scores if findings.reports else {}
    parts = []
    repeated, alone = in_blocks(found, str)
    for alike in repeated:
        series: dict[str, list[tuple[float, float]]] = {name: [] for name in SHOWN}
        across, numbers = places(alike)
        for place, name in zip(numbers, alike, strict=True):
            for title, value in shown_scores(found[name]).items():
                series[title].append((place, value))
        drawn = {title: points for title, points in series.items() if points}
        sizes = [abs(value) for points in drawn.values() for _, value in points if value]
        chart = lines(drawn, across=across, up="score of a structure", linear_to=min(sizes, default=1.0))
        parts += [f"<h3>{html.escape(starred(alike[0]))}</h3>", chart]
    if alone:
        parts.append(
            table(*scores({name: found[name] for name in alone}), "scores of groups that are in one block only")
        )
    if not parts:
        return ""
    return _paragraph("What was removed beside what was kept. Scores of different groups need not compare.") + "".join(
        parts
    )


def _evaluations(findings: Findings) -> str:
    if not findings.evaluations:
        return ""
    return table(*evaluation(findings.evaluations), "evaluation")


def _stage(stage: Stage) -> str:
    names = list(stage.start)
    base = dict.fromkeys(names, 0.0) if stage.dense is None else stage.dense
    above = "" if stage.dense is None else ", above the full model's"
    found = [stage.start, *(one.losses for one in stage.rounds)]
    losses = {name: [(n, one[name] - base[name]) for n, one in enumerate(found)] for name in names}
    shares = {name: [(n, one.weights[name]) for n, one in enumerate(stage.rounds, 1)] for name in names}
    kept = f"Round {stage.best} was kept." if stage.best else "No round was better than before: none was kept."
    parts = [_paragraph(f"{len(stage.rounds)} rounds, {len(stage.steps)} steps. {kept}")]
    parts.append(
        lines(
            losses, across="after round", up=f"validation loss{above}, nats per token", mark=float(stage.best) or None
        )
    )
    parts.append(lines(shares, across="round", up="share of the round that every source had", number="{:.0%}".format))
    parts.append(lines({"training loss": stage.steps}, across="step", up="training loss, nats per token"))
    parts.append(table(*stage_table(stage), f"losses and shares of {stage.name}"))
    return "".join(parts)


def _knowledge(knowledge: Knowledge) -> str:
    """A chart for groups that differ only in their block's number, and one for all others."""
    above = f"{MEASURES[knowledge.measure]} above the dense model's, when the group alone is masked"
    rises = [abs(rise) for group in knowledge.groups for rise in knowledge.shown(group) if rise]
    typical = statistics.median(rises) if rises else 1.0  # linear up to there, logarithmic beyond
    parts = []
    repeated, alone = in_blocks(knowledge.groups, lambda group: group.name)
    for alike in repeated:
        across, numbers = places([group.name for group in alike])
        shown = list(zip(numbers, map(knowledge.shown, alike), strict=True))
        series = {
            f"{ratio:.0%} masked": [(where, one[place]) for where, one in shown]
            for place, ratio in enumerate(knowledge.ratios)
        }
        chart = lines(series, across=across, up=above, linear_to=typical if math.isfinite(typical) else 1.0)
        parts += [f"<h3>{html.escape(starred(alike[0].name))}</h3>", chart]
    if alone:
        rows = [[group.name, *(f"{rise:,.4g}" for rise in knowledge.shown(group))] for group in alone]
        head = ["node group", *(f"+ at {ratio:.0%}" for ratio in knowledge.ratios)]
        parts.append(table(head, rows, "groups that are in one block only"))
    return _paragraph(f"{knowledge.rows} rows of data.") + "".join(parts)


def _skipped(findings: Findings) -> str:
    rows = skipped(findings.reports)
    return table(["node group", "reason"], rows, "left alone", prose=True) if rows else ""


def _seconds(findings: Findings) -> str:
    rows = timings(findings.reports)
    return table(["pass", "seconds"], rows, "seconds of every pass") if rows else ""
