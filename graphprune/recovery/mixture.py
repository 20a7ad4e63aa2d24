"""Which rows the next round trains on: of which source how many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import log

import torch
from torch.utils.data import Sampler

Losses = Mapping[str, float]  # source → mean validation loss, nats per token
Weights = dict[str, float]  # source → share of a round; they sum to 1


def uniform(names: Sequence[str]) -> Weights:
    """All sources alike."""
    return dict.fromkeys(names, 1 / len(names))


def by_degradation(losses: Losses, dense: Losses, floor: float) -> Weights:
    """``floor`` spread evenly, and the rest by ``max(0, loss − dense loss)``; evenly too where nothing is worse."""
    return _over_floor({name: max(0.0, loss - dense[name]) for name, loss in losses.items()}, floor)


def by_returns(rounds: Sequence[Losses], dense: Losses, floor: float) -> list[Weights]:
    """Of every round: ``floor`` spread evenly, and the rest by what the next row of a source is expected to give back.

    ``rounds`` are the losses before the first round and after each since. What a source has lost, g, is taken to fall
    as exp(−k·n) with the rows n that it was given, so that the next row gives back k·g: a source that has lost most
    gets little when its rows do not bring it back. Before anything is known of k, sources share by what they have lost.
    """
    lost = [{name: max(0.0, loss - dense[name]) for name, loss in losses.items()} for losses in rounds]
    weights = [by_degradation(rounds[0], dense, floor)]
    given = dict.fromkeys(weights[0], 0.0)
    for now in lost[1:]:
        given = {name: given[name] + share for name, share in weights[-1].items()}
        returns = {name: _return(lost[0][name], left, given[name]) for name, left in now.items()}
        weights.append(_over_floor(returns, floor))
    return weights


def _return(before: float, left: float, given: float) -> float:
    """k·g, where g fell from ``before`` to ``left`` over what was ``given``; 0 where nothing is left to gain."""
    return log(before / left) / given * left if before > left > 0 and given > 0 else 0.0


def _over_floor(amounts: Weights, floor: float) -> Weights:
    """``floor`` spread evenly, and the rest in proportion to ``amounts``; evenly too where these are all 0."""
    total = sum(amounts.values())
    if total == 0:
        return uniform(list(amounts))
    return {name: floor / len(amounts) + (1 - floor) * amount / total for name, amount in amounts.items()}


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
