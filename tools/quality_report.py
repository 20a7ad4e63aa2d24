"""The Markdown tables and the plot of what ``bench_quality`` measured."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench_quality import Cell, Scoreboard

_PACKAGES = ("torch", "transformers", "lm_eval", "torch-pruning", "optipfair")


def write_report(board: Scoreboard, command: str, path: Path) -> None:
    """Write ``path`` and the plot beside it, of whatever is measured so far."""
    picture = path.with_suffix(".png")
    plot(board, picture)
    path.write_text("\n".join(_lines(board, command, picture.name)) + "\n", encoding="utf-8")


def _lines(board: Scoreboard, command: str, picture: str) -> Iterator[str]:
    a = board.arguments
    title = f"after recovery on {a.recover:,} tokens" if a.recover else "without tuning"
    yield from (f"# Quality {title}", "", f"    {command}", "")
    dense = board.best("dense", 0.0)
    measured = ", ".join(f"{_number(v)} at {n}" for n, v in dense[1]["perplexity"].items()) if dense else "not measured"
    text = f"the first {a.tokens:,} tokens of WikiText-2" if a.tokens else "WikiText-2"
    trained = f"then trains on {a.recover:,} tokens, each as its paper does" if a.recover else "nothing is trained"
    shown = f"For every method the best of its settings, by perplexity at {a.lengths[0]}; the last table has them all."
    if a.recover:
        shown = "Shown is the mean of all seeds, with the least and the most of several; the last table has each."
    yield (
        f"{Path(a.model).name} in float32, on {', '.join(_devices(board)) or '–'}. Perplexity of {text} (raw test), "
        f"dense {measured}. Everyone removes the same share of all parameters and calibrates on the same {a.samples} × "
        f"{a.length} tokens of C4; {trained}. {shown} {_versions()}."
    )
    yield from ("", f"![Perplexity over the share of parameters removed]({picture})")
    for length in a.lengths:
        yield from ("", f"## Perplexity, windows of {length} tokens", "")
        yield from _table(board, lambda method, ratio, n=str(length): _perplexity(board, method, ratio, n), min)
    if a.tasks:
        yield from _tasks(board)
    yield from ("", "## Every cell", "")
    yield from _every_cell(board)


def _table(
    board: Scoreboard, values: Callable[[str, float], list[float] | str], better: Callable[..., float]
) -> Iterator[str]:
    """Methods down, ratios across, the best of each ratio in bold. ``values``: of every seed, or what to write."""
    ratios, methods = board.arguments.ratios, board.arguments.methods
    yield "| method | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |"
    yield "|---|" + "--:|" * len(ratios)
    found = {ratio: {method: values(method, ratio) for method in methods} for ratio in ratios}
    best = {
        ratio: better((fmean(v) for v in column.values() if not isinstance(v, str)), default=None)
        for ratio, column in found.items()
    }
    for method in methods:
        cells = []
        for ratio in ratios:
            of = found[ratio][method]
            cells.append(f"**{_text(of)}**" if not isinstance(of, str) and fmean(of) == best[ratio] else _text(of))
        yield f"| {method} | " + " | ".join(cells) + " |"


def _perplexity(board: Scoreboard, method: str, ratio: float, length: str) -> list[float] | str:
    results = [result for result in board.shown(method, ratio) if "failed" not in result]
    return [float(result["perplexity"][length]) for result in results] or _why_not(board, method, ratio)


def _why_not(board: Scoreboard, method: str, ratio: float) -> str:
    """A method without any result at a ratio either failed in every setting, or is still to be measured."""
    results = [board.kept.result(board.cell(method, setting, ratio)) for setting in board.settings(method)]
    return "FAILED" if all(results) else "not measured"


def _tasks(board: Scoreboard) -> Iterator[str]:
    """The average of the tasks, and for each ratio every task."""

    def averages(method: str, ratio: float) -> list[float] | str:
        results = board.shown(method, ratio, tasks=True)
        if not results:
            return "not measured" if board.best(method, ratio) else _why_not(board, method, ratio)
        done = [result["average"] for result in results if "failed" not in result]
        if not done:
            return "FAILED"
        return "–" if None in done else [100 * average for average in done]

    dense = averages("dense", 0.0)
    yield from ("", "## Tasks, average accuracy in %", "")
    rows = f"the first {board.arguments.limit} rows of each" if board.arguments.limit else "all rows"
    yield f"acc_norm, or acc where a task has no other, over {rows}. Dense: {_text(dense)}."
    yield ""
    yield from _table(board, averages, max)
    everyone = ["dense", *board.arguments.methods]
    for ratio in board.arguments.ratios:
        found = {method: board.shown(method, 0.0 if method == "dense" else ratio, tasks=True) for method in everyone}
        scores = {method: [one["tasks"] for one in results if "tasks" in one] for method, results in found.items()}
        names = list(dict.fromkeys(name for several in scores.values() for tasks in several for name in tasks))
        yield from ("", f"### {ratio:.0%}", "", "| method | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names))
        for method, several in scores.items():
            if several:
                of = [[100 * _accuracy(tasks[name]) for tasks in several if name in tasks] for name in names]
                yield f"| {method} | " + " | ".join(f"{fmean(values):.2f}" if values else "–" for values in of) + " |"


def _accuracy(metrics: dict[str, float]) -> float:
    return metrics.get("acc_norm", metrics.get("acc", float("nan")))


def _every_cell(board: Scoreboard) -> Iterator[str]:
    lengths = [str(length) for length in board.arguments.lengths]
    yield "| method | setting | ratio | removed | " + " | ".join(f"@{n}" for n in lengths) + " | pruning, s |"
    yield "|---|---|--:|--:|" + "--:|" * len(lengths) + "--:|"
    for cell in board.perplexity_cells():
        result = board.kept.result(cell)
        about = f"| {cell.method} | {_setting(cell)} | {cell.ratio:.0%} | "
        if result is None or "failed" in result:
            why = "not measured" if result is None else f"FAILED: {_escaped(result['failed'])}"
            yield about + " | ".join(["", why, *[""] * len(lengths)]) + " |"
        else:
            shown = [_number(float(result["perplexity"][n])) for n in lengths]
            yield about + " | ".join([f"{result['removed']:.2%}", *shown, f"{result['prune_seconds']:.1f}"]) + " |"
    for cell in board.task_cells():
        result = board.kept.result(cell)
        if result is not None and "failed" in result:
            why = f"FAILED: {_escaped(result['failed'])}"
            yield f"| {cell.method} | {_setting(cell)}, tasks | {cell.ratio:.0%} |  | {why} |"


def _setting(cell: Cell) -> str:
    return _escaped(", ".join(f"{key}={json.dumps(value)}" for key, value in cell.setting.items())) or "defaults"


def _escaped(text: str) -> str:
    for character in "\\|*_<`":
        text = text.replace(character, "\\" + character)
    return text


def _text(values: list[float] | str) -> str:
    """The mean, with the least and the most of several."""
    if isinstance(values, str):
        return values
    spread = f" ({_number(min(values))}–{_number(max(values))})" if len(values) > 1 else ""
    return _number(fmean(values)) + spread


def _number(value: float | str) -> str:
    value = float(value)
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.3g}"


def _devices(board: Scoreboard) -> list[str]:
    results = [board.kept.result(cell) for cell in [*board.perplexity_cells(), *board.task_cells()]]
    return sorted({result["device"] for result in results if result and "device" in result})


def _versions() -> str:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def plot(board: Scoreboard, path: Path) -> None:
    """Perplexity at the first length over the share of parameters removed; other packages are dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from quality_peers import PEERS

    length = str(board.arguments.lengths[0])
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    dense = board.best("dense", 0.0)
    start: list[tuple[float, Any]] = [(0.0, dense[1]["perplexity"][length])] if dense else []
    for method in board.arguments.methods:
        found = [(ratio, _perplexity(board, method, ratio, length)) for ratio in sorted(board.arguments.ratios)]
        points = start + [(ratio, fmean(values)) for ratio, values in found if not isinstance(values, str)]
        finite = [(ratio, float(value)) for ratio, value in points if float(value) < float("inf")]
        if len(finite) > len(start):
            style = "--" if method in PEERS else "-"
            axes.plot(*zip(*finite, strict=True), style, marker="o", markersize=4, label=method)
    axes.set(
        yscale="log",
        xlabel="share of all parameters removed",
        ylabel=f"WikiText-2 perplexity, {length} tokens",
        title=f"{Path(board.arguments.model).name} {'after recovery' if board.arguments.recover else 'without tuning'}",
    )
    axes.grid(which="both", alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=150)
