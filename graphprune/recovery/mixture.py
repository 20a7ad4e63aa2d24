"""Which rows the next round trains on: sources in proportion to what the pruned model lost on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch.utils.data import Sampler

Losses = Mapping[str, float]  # source → mean validation loss, nats per token
Weights = dict[str, float]  # source → share of a round; they sum to 1


def uniform(names: Sequence[str]) -> Weights:
    """All sources alike."""
    return dict.fromkeys(names, 1 / len(names))


def by_degradation(losses: Losses, dense: Losses, floor: float) -> Weights:
    """``floor`` spread evenly, and the rest by ``max(0, loss − dense loss)``; evenly too where nothing is worse."""
    worse = {name: max(0.0, loss - dense[name]) for name, loss in losses.items()}
    total = sum(worse.values())
    if total == 0:
        return uniform(list(losses))
    return {name: floor / len(worse) + (1 - floor) * lost / total for name, lost in worse.items()}


def within(weights: Weights, most: Mapping[str, float]) -> Weights:
    """No source with more than its ``most``: what it has too much the others share, each in proportion to its weight.

    Where all may have less than everything together, they get more than their ``most``, in proportion to it.
    """
    if sum(most.values()) <= 1 + 1e-9:  # rounding apart, all are full then
        return {name: most[name] / sum(most.values()) for name in weights}
    full: Weights = {}
    while True:
        free = {name: weight for name, weight in weights.items() if name not in full}
        if not any(free.values()):
            free = uniform(list(free))
        scale = (1 - sum(full.values())) / sum(free.values())
        found = full | {name: weight * scale for name, weight in free.items()}
        over = [name for name in free if found[name] > most[name]]
        if not over:
            return {name: found[name] for name in weights}
        full |= {name: most[name] for name in over}


def rows_of(weights: Weights, rows: int) -> dict[str, int]:
    """Whole rows of every source that sum to ``rows``, each less than one off its share (largest remainders)."""
    counts = {name: int(weight * rows) for name, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda name: counts[name] - weights[name] * rows)
    for name in by_remainder[: rows - sum(counts.values())]:
        counts[name] += 1
    return counts


class MixedRows(Sampler[int]):
    """Numbers of rows of all sources one behind the other, in the order to train on them.

    Every iteration is the round after those of which ``weights`` tells: it is called for the weights of all rounds so
    far and of the one that begins. Rows of a source come in a random order, none twice before all have come once, and
    rounds go on where the one before stopped. It is a function of ``seed`` and these weights, so that an interrupted
    run goes on with the same rows.
    """

    def __init__(self, sizes: Mapping[str, int], rows: int, seed: int, weights: Callable[[], list[Weights]]):
        self._sizes, self._rows, self._seed, self._weights = dict(sizes), rows, seed, weights

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        *before, now = self._weights()
        used = dict.fromkeys(self._sizes, 0)
        for weights in before:
            for name, count in rows_of(weights, self._rows).items():
                used[name] += count
        chosen: list[int] = []
        start = 0
        for number, (name, size) in enumerate(self._sizes.items()):
            count = rows_of(now, self._rows)[name]
            chosen += [start + row for row in _in_order(size, used[name], count, self._seed + 1000 * number)]
            start += size
        mixed = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(self._seed + 7919 * len(before)))
        return iter([chosen[place] for place in mixed.tolist()])


def _in_order(size: int, first: int, count: int, seed: int) -> list[int]:
    """``count`` of ``size`` rows from the ``first``-th on, every time through all in another random order."""
    found: list[int] = []
    while len(found) < count:
        turn, place = divmod(first + len(found), size)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + 104729 * turn)).tolist()
        found += order[place : place + count - len(found)]
    return found
