"""Which fields of a config say which sizes: found by changing one at a time and looking at what the class builds.

No field and no model is known by name. A field's *slope* in a number of the built model is how fast that number grows
with the field, at the values that both have now. It is exact for numbers that are affine in the field or a power of it,
which is what sizes, and scales such as ``head_dim ** -0.5``, are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from graphprune.deploy.stock import PER_LAYER, Path, Rows, Settings, Stock, at, changed, rows_of, trying
from graphprune.trace.provenance import Attribute

Law = Callable[[int], float]

_PROBES = 4
_GUESSES = (16, 32, 24, 48)
_CLOSE = 1e-6


@dataclass
class Fields:
    """What the fields of a config say.

    Attributes:
        settings: of the model as it is, with a value for every field that its class computes from others when there
            is none (``head_dim``), and for every layer where layers may differ.
        added: the fields that only have a value here.
        base: every number of the model as it is.
        slopes: field → number → slope, of every field that says any number and does not change what tensors there are.
    """

    stock: Stock
    settings: Settings
    added: list[Path]
    base: Rows
    slopes: dict[Path, Rows] = field(default_factory=dict)


@trying()
def find_fields(stock: Stock, attributes: list[Attribute]) -> Fields:
    """Probe every integer field of the config of ``stock``; ``attributes`` are what forward uses as sizes."""
    settings = stock.settings
    base = rows_of(stock.build(settings), attributes)
    added = []
    for path in dict.fromkeys((*stock.unset(settings), *stock.missing(settings))):
        value = _implied(stock, settings, path, base, attributes)
        if value is not None:
            settings = changed(settings, {path: value})
            added.append(path)
    found = Fields(stock, settings, added, base)
    for path in stock.integers(settings):
        slopes = _slopes(stock, settings, path, base, attributes)
        if slopes:
            found.slopes[path] = slopes
    for path in list(found.slopes):
        _split_by_layer(found, path, attributes)
    return found


def _split_by_layer(found: Fields, path: Path, attributes: list[Attribute]) -> None:
    """Where the class lets a field have other values in other layers, a field for every layer takes its place.

    A class that reads the field of the whole config refuses: nearly all do.
    """
    *inside, name = path
    value, stock = at(found.settings, path), found.stock
    if isinstance(name, int) or PER_LAYER in inside:
        return
    places: list[Path] = [
        (*inside, PER_LAYER, str(layer), name) for layer in range(stock.layers(found.settings, tuple(inside)))
    ]
    now = {place: at(found.settings, place) or value for place in places}
    tried = (changed(found.settings, dict.fromkeys(places, other)) for other in _others(value))
    if not places or all(_probe(stock, settings, attributes) is None for settings in tried):
        return
    settings = changed(found.settings, now)
    by_layer = {place: _slopes(stock, settings, place, found.base, attributes) for place in places}
    if any(by_layer.values()) and _probe(stock, settings, attributes) == found.base:
        found.settings = settings
        by_layer[path] = _slopes(stock, settings, path, found.base, attributes)
        found.slopes = {key: slopes for key, slopes in (found.slopes | by_layer).items() if slopes}


def _implied(stock: Stock, settings: Settings, path: Path, base: Rows, attributes: list[Attribute]) -> int | None:
    """The value that a field without one amounts to: that which, said aloud, changes nothing."""
    probes: list[tuple[int, Rows]] = []
    for guess in _GUESSES:
        rows = _probe(stock, changed(settings, {path: guess}), attributes)
        if rows is None:
            continue
        if rows == base and not probes:
            return None if _probe(stock, changed(settings, {path: 2 * guess}), attributes) == base else guess
        probes.append((guess, rows))
        if len(probes) == 2:
            break
    if len(probes) < 2:
        return None
    (a, first), (b, second) = probes
    moving = [row for row in first if second.get(row, first[row]) != first[row] and row in base]
    tried = set()
    for row in moving:
        value = a + (base[row] - first[row]) * (b - a) / (second[row] - first[row])
        if value != int(value) or value < 1 or value in tried:
            continue
        tried.add(value)
        if _probe(stock, changed(settings, {path: int(value)}), attributes) == base:
            return int(value)
    return None


def _slopes(stock: Stock, settings: Settings, path: Path, base: Rows, attributes: list[Attribute]) -> Rows:
    value = at(settings, path)
    probes: list[tuple[int, Rows]] = []
    for other in _others(value):
        rows = _probe(stock, changed(settings, {path: other}), attributes)
        if rows is None:
            continue
        if rows == base and not probes:
            return {}
        if rows.keys() != base.keys():
            return {}  # it says how many tensors there are
        probes.append((other, rows))
        if len(probes) == _PROBES:
            break
    slopes: Rows = {}
    for row, now in base.items():
        seen = [(other, rows[row]) for other, rows in probes]
        if all(then == now for _, then in seen):
            continue
        slope = _slope(value, now, seen)
        if slope is not None:
            slopes[row] = slope
        elif row.kind != "size":
            return {}  # what it says of this number is no size
    return slopes


def _probe(stock: Stock, settings: Settings, attributes: list[Attribute]) -> Rows | None:
    built = stock.try_to_build(settings)
    return None if built is None else rows_of(built, attributes)


def _others(value: int) -> list[int]:
    """Values to try: multiples and parts first, since sizes divide one another."""
    scaled = (2 * value, value / 2, 4 * value, value / 4, 3 * value, value / 3, value + 1, value + 2)
    return [int(n) for n in dict.fromkeys(scaled) if n == int(n)]


def _slope(value: int, now: float, seen: list[tuple[int, float]]) -> float | None:
    """The derivative at ``value`` by the law that most probes agree on, two at least.

    The others may have been rounded down on the way: a part of a size that is no multiple. Rounding makes lines, so one
    that not all lie on is believed less than a power.
    """
    best, most = None, 1
    laws = [_line(value, now, other, then) for other, then in seen]
    powers = [_power(value, now, other, then) for other, then in seen if now > 0 and then > 0]
    for slope, law in (*powers, *laws):
        agreeing = sum(math.isclose(law(other), then, rel_tol=_CLOSE, abs_tol=_CLOSE) for other, then in seen)
        if slope and (agreeing > most or agreeing == len(seen)):
            best, most = slope, agreeing
    return best


def _line(value: int, now: float, other: int, then: float) -> tuple[float, Law]:
    slope = (then - now) / (other - value)
    return slope, lambda n: now + slope * (n - value)


def _power(value: int, now: float, other: int, then: float) -> tuple[float, Law]:
    power = math.log(then / now) / math.log(other / value)
    return power * now / value, lambda n: now * (n / value) ** power


def name_of(path: Path) -> str:
    """``vision_config.hidden_size``."""
    return ".".join(str(key) for key in path)
