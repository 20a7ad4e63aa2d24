"""Charts as inline SVG: text stays text, colours are those of the page, and a narrow window scrolls them sideways."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

WIDTH, HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 40
_COLOURS = 8
_DOTTED = 40  # points of a line that are drawn as points too
_DASHES = ("", "6 3", "2 3", "8 3 2 3")

Points = Sequence[tuple[float, float]]


def lines(
    series: Mapping[str, Points],
    *,
    across: str,
    up: str,
    number: Callable[[float], str] = "{:g}".format,
    mark: float | None = None,
    linear_to: float | None = None,
) -> str:
    """A line for every series, told apart by colour and by dashes, with a key below.

    Points that are not finite are left out. ``number`` writes the numbers beside the vertical axis, ``mark`` is where
    an upright line stands. With ``linear_to`` the vertical axis is logarithmic beyond that size.
    """
    shown = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    everything = [point for points in shown.values() for point in points]
    if not everything:
        return ""
    low_x, high_x = _around([x for x, _ in everything])
    bounds = _around([y for _, y in everything])
    ticks = _ticks(*bounds) if linear_to is None else _decades(*bounds, linear_to)
    bent = (lambda y: y) if linear_to is None else (lambda y: math.asinh(y / linear_to))
    bottom, top = (bent(y) for y in (min(ticks[0], bounds[0]), max(ticks[-1], bounds[1])))

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - _LEFT - _RIGHT)
        return across, HEIGHT - _BOTTOM - (bent(y) - bottom) / (top - bottom) * (HEIGHT - _TOP - _BOTTOM)

    parts = [_across_at(place(low_x, y)[1], number(y)) for y in ticks]
    whole = [x for x in _ticks(low_x, high_x) if low_x <= x <= high_x and x == int(x)]
    parts += [_text(place(x, bounds[0])[0], HEIGHT - 22, f"{x:g}") for x in whole]
    parts.append(_text((WIDTH + _LEFT) / 2, HEIGHT - 5, across))
    if mark is not None:
        x = f"{place(mark, bounds[0])[0]:.1f}"
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
    for n, points in enumerate(shown.values()):
        where = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in where)
        parts.append(f'<polyline class="{_look(n)}" points="{path}"{_dashes(n)}/>')
        if len(where) <= _DOTTED:
            parts += [f'<circle class="{_look(n)}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in where]
    return _figure("".join(parts), f"{up} over {across}", up, list(shown))


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _across_at(y: float, number: str) -> str:
    line = f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _text(_LEFT - 6, y + 4, number, "end")


def _figure(inside: str, label: str, up: str, names: list[str]) -> str:
    key = "".join(
        f'<li><svg width="26" height="10" aria-hidden="true"><line class="{_look(n)}" x1="0" x2="26" y1="5" y2="5"'
        f"{_dashes(n)}/></svg> {html.escape(name)}</li>"
        for n, name in enumerate(names)
    )
    chart = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">{inside}</svg>'
    )
    inner = f'{_scrolled(chart, label)}<ul class="key">{key}</ul>'
    return f"<figure><figcaption>{html.escape(up)}</figcaption>{inner}</figure>"


def _scrolled(inside: str, label: str) -> str:
    """What may be wider than the window, in a region that scrolls by itself, with the keyboard too."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{html.escape(label)}">{inside}</div>'


def _look(place: int) -> str:
    return f"s{place % _COLOURS}"


def _dashes(place: int) -> str:
    dashes = _DASHES[place // 2 % len(_DASHES)]
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def _around(values: Sequence[float]) -> tuple[float, float]:
    """The least and the largest of ``values``, apart by more than nothing."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``."""
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def _decades(low: float, high: float, linear_to: float) -> list[float]:
    """Powers of ten from ``linear_to`` on, on both sides of 0, up to the bounds; few enough to be read."""
    first = math.floor(math.log10(linear_to))
    last = math.ceil(math.log10(max(abs(low), abs(high), linear_to)))
    step = max(1, math.ceil((last - first) / 4))
    powers = [10.0**n for n in range(first, last + 1, step)]
    return [*(-p for p in reversed(powers) if -p >= low), 0.0, *(p for p in powers if p <= high)]


def heat_map(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[str, float] | None]]]) -> str:
    """A table whose cells are the darker the nearer their number is to 1; ``(text, number)``, or None where is none."""
    head = "".join(f'<th scope="col">{_breakable(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{html.escape(name) or "(no block)"}</th>{"".join(map(_cell, cells))}</tr>'
        for name, cells in rows
    )
    return _scrolled(f'<table class="heat"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>', title)


def _cell(cell: tuple[str, float] | None) -> str:
    if cell is None:
        return "<td></td>"
    text, share = cell
    return f'<td class="h{round(10 * min(1.0, max(0.0, share)))}">{html.escape(text)}</td>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str, *, prose: bool = False) -> str:
    """A table of numbers, or of ``prose``, which breaks into lines; the first column names its rows."""
    top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    body = "".join(map(_row, rows))
    kind = ' class="text"' if prose else ""
    return _scrolled(f"<table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>", title)


def _row(cells: Sequence[str]) -> str:
    name, *rest = map(html.escape, cells)
    return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'


def _breakable(name: str) -> str:
    return html.escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>")
