"""Plots of results, with matplotlib where that is installed."""

from __future__ import annotations

import math
import re
import statistics
from os import PathLike
from pathlib import Path

from graphprune.errors import GraphPruneError
from graphprune.ir.knowledge import MEASURES, Knowledge

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")  # of a block
_PANELS = 6


def plot_knowledge(knowledge: Knowledge, path: str | PathLike[str]) -> None:
    """The deviation of every node group over its place in the model, a line per ratio.

    Groups that differ only in the number of their block share a panel. See :meth:`Knowledge.plot`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise GraphPruneError("The plot needs matplotlib: pip install 'graphprune[plot]'.") from None
    if not knowledge.groups:
        raise GraphPruneError("There is nothing to draw: no node group could be masked alone.")
    panels: dict[str, list[int]] = {}
    for place, group in enumerate(knowledge.groups):
        panels.setdefault(_NUMBER.sub("*", group.name), []).append(place)
    if len(panels) > _PANELS:
        panels = {"all node groups": list(range(len(knowledge.groups)))}
    figure = Figure(figsize=(9, 1.5 + 2.5 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    shown = [knowledge.shown(group) for group in knowledge.groups]
    typical = statistics.median(abs(rise) for one in shown for rise in one)  # linear up to there, logarithmic beyond
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, places) in zip(all_axes, panels.items(), strict=True):
        for n, ratio in reversed(list(enumerate(knowledge.ratios))):
            points = [(place, shown[place][n]) for place in places if math.isfinite(shown[place][n])]
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=f"{ratio:.0%} masked")
        axes.set_yscale("symlog", linthresh=max(typical, 1e-9))
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    all_axes[0].legend()
    all_axes[-1].set_xlabel("node group, in the order of the model")
    figure.supylabel(f"{MEASURES[knowledge.measure]} above the dense model's")
    try:
        figure.savefig(Path(path), dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a format that it does not know
        raise GraphPruneError(f"{path} cannot be written: {error}") from error
