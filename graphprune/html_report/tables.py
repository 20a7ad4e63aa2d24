"""What the page and the terminal say alike, as rows of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from graphprune.evaluate.evaluation import Evaluation
from graphprune.evaluate.table import compared
from graphprune.folding import starred
from graphprune.ir.score_spread import QUANTILES, ScoreSpread
from graphprune.reporting import Report


def changes(reports: Sequence[Report]) -> list[list[str]]:
    """Parameters and bytes before the first pruning and after the last."""
    first, last = reports[0], reports[-1]
    pairs = {
        "parameters": (first.parameters_before, last.parameters_after),
        "bytes": (first.bytes_before, last.bytes_after),
    }
    return [[name, f"{a:,}", f"{b:,}", f"{b / a - 1:+.2%}"] for name, (a, b) in pairs.items()]


def fields(report: Report) -> list[list[str]]:
    """Fields of the config that changed."""
    changed = report.fields or {}
    return [[name, "" if before is None else f"{before:,}", f"{after:,}"] for name, (before, after) in changed.items()]


def skipped(reports: Sequence[Report]) -> list[list[str]]:
    """What the last pruning left alone and why, those that differ in their block's number once."""
    found = Counter(
        (starred(name), starred(reason)) for name, reason in (reports[-1].skipped if reports else {}).items()
    )
    return [[f"{name}  ×{count}" if count > 1 else name, reason] for (name, reason), count in found.items()]


# Title → of what was kept or removed, at which quantile.
SHOWN = {
    "kept, 90%": ("kept", 0.9),
    "kept, half": ("kept", 0.5),
    "kept, least": ("kept", 0.0),
    "removed, most": ("removed", 1.0),
    "removed, half": ("removed", 0.5),
}


def shown_scores(spread: ScoreSpread) -> dict[str, float]:
    """Title → score, of what there is."""
    found = {title: (getattr(spread, which), QUANTILES.index(share)) for title, (which, share) in SHOWN.items()}
    return {title: values[place] for title, (values, place) in found.items() if values}


def scores(spreads: Mapping[str, ScoreSpread]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the scores of every node group."""
    shown = {name: shown_scores(spread) for name, spread in spreads.items()}
    rows = [[name, *(f"{of[title]:.4g}" if title in of else "" for title in SHOWN)] for name, of in shown.items()]
    return ["node group", *SHOWN], rows


def timings(reports: Sequence[Report]) -> list[list[str]]:
    """Seconds of every pass of the last pruning, the longest first, and of all of it."""
    if not reports:
        return []
    longest = sorted(reports[-1].seconds.items(), key=lambda item: -item[1])
    return [[name, f"{seconds:.2f}"] for name, seconds in [*longest, ("in all", reports[-1].total_seconds)]]


def evaluation(evaluations: Mapping[str, Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: every model, and the change of all after the first."""
    head = [""]
    for number, name in enumerate(evaluations):
        head += [name, "change"] if number else [name]
    return head, [[title, *cells] for title, cells in compared(evaluations)]
