"""What a run did and what came of it, to read: ``report.md`` with ``mixing.png`` beside it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphprune.io.atomic import replace_file
from graphprune.recovery.recover import Stage

PLOT = "mixing.png"


def write_report(folder: Path, settings: dict[str, Any], stages: list[Stage], evaluations: dict[str, Any]) -> None:
    """Write both; the plot only where matplotlib is installed. ``evaluations`` are those of ``Evaluation.to_dict``."""
    lines = [f"# {settings['ratio']:.0%} of all parameters removed by {settings['method']}, and trained back", ""]
    lines += _table(["", *evaluations], [[title, *cells] for title, cells in _measured(evaluations)])
    for stage in stages:
        lines += ["", f"## Recovery: {stage.name}", "", _summary(stage), ""]
        lines += _table(*stage_table(stage))
    if stages and importlib.util.find_spec("matplotlib") is not None:
        plot_mixing(stages, folder / PLOT)
        lines += ["", f"![shares and losses of every source by round]({PLOT})"]
    lines += ["", "## Settings", "", "```json", json.dumps(settings, default=str, indent=1), "```"]
    replace_file(folder / "report.md", "\n".join(lines) + "\n")


def _summary(stage: Stage) -> str:
    kept = f"that after round {stage.best} was kept" if stage.best else "none was better than before, so none was kept"
    return (
        f"{len(stage.rounds)} rounds, {len(stage.steps)} steps; {kept}. Validation loss in nats per token after every "
        "round, with the share of the round that the source had."
    )


def stage_table(stage: Stage) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the validation loss of every source after every round, with its share of the round."""
    rows = [["before", *_losses(stage.start)]]
    for number, one in enumerate(stage.rounds, 1):
        kept = " (kept)" if number == stage.best else ""
        rows.append([f"round {number}{kept}", *_losses(one.losses, one.weights)])
    if stage.dense is not None:
        rows.append(["full model", *_losses(stage.dense)])
    return ["", *stage.start, "mean"], rows


def _losses(losses: Mapping[str, float], weights: Mapping[str, float] | None = None) -> list[str]:
    shares = {name: f" ({weight:.0%})" for name, weight in (weights or {}).items()}
    found = [f"{loss:.4f}{shares.get(name, '')}" for name, loss in losses.items()]
    return [*found, f"{sum(losses.values()) / len(losses):.4f}"]


def _measured(evaluations: dict[str, Any]) -> list[tuple[str, list[str]]]:
    def of(key: str) -> list[Any]:
        return [one.get(key) for one in evaluations.values()]

    rows = [("parameters", [f"{value:,}" for value in of("parameters")])]
    rows += [("MACs per token", [f"{value:,}" for value in of("macs")])]
    for length in dict.fromkeys(length for one in of("perplexity") for length in one):
        rows.append((f"perplexity @{length}", [_number(one.get(length)) for one in of("perplexity")]))
    if any(value is not None for value in of("task_average")):
        rows.append(("average of tasks", [_number(value) for value in of("task_average")]))
    return rows


def _number(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def plot_mixing(stages: list[Stage], path: Path) -> None:
    """Two panels per stage: the share of every source in every round, and its loss above the full model's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 3.8 * len(stages)), layout="constrained")
    FigureCanvasAgg(figure)
    for row, (shares, losses) in zip(stages, figure.subplots(len(stages), 2, squeeze=False), strict=True):
        names, rounds = list(row.start), range(1, len(row.rounds) + 1)
        for name in names:
            shares.plot(rounds, [one.weights[name] for one in row.rounds], "o-", markersize=4, label=name)
            base = 0.0 if row.dense is None else row.dense[name]
            found = [row.start[name], *(one.losses[name] for one in row.rounds)]
            losses.plot(range(len(found)), [loss - base for loss in found], "o-", markersize=4, label=name)
        losses.axvline(row.best, color="grey", linestyle=":", label="kept")
        shares.set(title=f"{row.name}: share of the round", xlabel="round", ylim=(0, None))
        above = "" if row.dense is None else "above the full model's, "
        losses.set(title=f"{row.name}: validation loss", xlabel="after round", ylabel=f"{above}nats per token")
        for axes in (shares, losses):
            axes.grid(alpha=0.3)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        losses.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)
