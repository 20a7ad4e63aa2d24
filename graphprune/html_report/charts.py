"""Charts as inline SVG: text stays text, colours are those of the page, and a narrow window scrolls them sideways."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

WIDTH, HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 40
_COLOURS = 8
_DASHES = ("", "6 3", "2 3", "8 3 2 3")

Points = Sequence[tuple[float, float]]


def lines(
    series: Mapping[str, Points],
    *,
    across: str,
    up: str,
    number: Callable[[float], str] = "{:g}".format,
    mark: float | None = None,
) -> str:
    """A line for every series, told apart by colour and by dashes, with a key below. ``mark`` is where a line stands.

    Points that are not finite are left out. ``number`` writes the numbers beside the vertical axis.
    """
    shown = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    everything = [point for points in shown.values() for point in points]
    if not everything:
        return ""
    low_x, high_x = _around([x for x, _ in everything])
    ticks = _ticks(*_around([y for _, y in everything]))

    def place_x(x: float) -> float:
        return _LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - _LEFT - _RIGHT)

    def place_y(y: float) -> float:
        return HEIGHT - _BOTTOM - (y - ticks[0]) / (ticks[-1] - ticks[0]) * (HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{place_y(y):.1f}" y2="{place_y(y):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{place_y(y) + 4:.1f}" text-anchor="end">{html.escape(number(y))}</text>'
        for y in ticks
    ]
    whole = [x for x in _ticks(low_x, high_x) if low_x <= x <= high_x and x == int(x)]
    parts += [f'<text x="{place_x(x):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{x:g}</text>' for x in whole]
    parts.append(
        f'<text x="{(WIDTH + _LEFT) / 2:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{html.escape(across)}</text>'
    )
    if mark is not None:
        parts.append(
            f'<line class="mark" x1="{place_x(mark):.1f}" x2="{place_x(mark):.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
        )
    for place, points in enumerate(shown.values()):
        where = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="{_look(place)}" points="{where}"{_dashes(place)}/>')
        if len(points) <= 40:
            parts += [
                f'<circle class="{_look(place)}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="2.5"/>'
                for x, y in points
            ]
    return _figure("".join(parts), f"{up} over {across}", up, list(shown))


def _figure(inside: str, label: str, up: str, names: list[str]) -> str:
    key = "".join(
        f'<li><svg width="26" height="10" aria-hidden="true"><line class="{_look(n)}" x1="0" x2="26" y1="5" y2="5"{_dashes(n)}/></svg> '
        f"{html.escape(name)}</li>"
        for n, name in enumerate(names)
    )
    return (
        f'<figure><figcaption>{html.escape(up)}</figcaption><div class="scroll" tabindex="0" role="group" '
        f'aria-label="{html.escape(label)}"><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(label)}">{inside}</svg></div><ul class="key">{key}</ul></figure>'
    )


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
    return [round(n * step, 12) for n in range(first, last + 1)]


def heat_map(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[str, float] | None]]]) -> str:
    """A table whose cells are the darker the nearer their number is to 1; ``(text, number)``, or None where is none."""
    head = "".join(f'<th scope="col">{_breakable(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{html.escape(name) or "(no block)"}</th>{"".join(map(_cell, cells))}</tr>'
        for name, cells in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{html.escape(title)}"><table class="heat"><thead><tr>'
        f"<td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(cell: tuple[str, float] | None) -> str:
    if cell is None:
        return "<td></td>"
    text, share = cell
    return f'<td class="h{round(10 * min(1.0, max(0.0, share)))}">{html.escape(text)}</td>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> str:
    """A table of text, the first column naming its rows."""
    top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{html.escape(title)}"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _breakable(name: str) -> str:
    return html.escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>")
