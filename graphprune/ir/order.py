"""Putting millions of structures in order, and taking the first of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

_FEW = 1 << 12  # numbers that are put in order sooner than thought about


def in_order(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finite scores sorted along the last dimension, ascending, float64, and their indices, int64; ties keep theirs."""
    if scores.dtype != torch.float32:
        found = scores.double().sort(dim=-1, stable=True)
        return found.values, found.indices
    # The bits of a float as an integer, and behind them the index: all different, which NumPy sorts ten times sooner
    # than torch sorts floats stably. The bits of a negative number fall as it grows; adding 0 makes 0 of -0.
    scores = scores.detach().cpu() + 0.0
    bits = scores.numpy().view(np.int32).astype(np.int64)
    bits ^= (bits >> 31) & 0x7FFF_FFFF
    keys = (bits << 32) | np.arange(scores.shape[-1])
    keys.sort(axis=-1)
    indices = torch.from_numpy(keys & 0xFFFF_FFFF)
    return scores.gather(-1, indices).double(), indices


def longest_prefix(runs: Sequence[np.ndarray], fits: Callable[[Sequence[int]], bool]) -> list[int]:
    """How many of each run are among the first of all, for the most that ``fits`` allows.

    ``runs`` are sorted, float64. All their numbers are thought of in one order in which ties keep the order of the
    runs, and ``fits``, given how many of each run, says yes up to some place in it; to none of all it is not asked.
    They are never put in that order but for the few around that place.
    """
    low, high = [0] * len(runs), [len(run) for run in runs]
    if fits(high):
        return high
    while sum(high) - sum(low) > _FEW:
        between = _weighted_median(runs, low, high)
        middle = [int(run.searchsorted(between, "right")) for run in runs]
        if fits(middle):
            low = middle
        elif middle != high:
            high = middle
        else:
            break  # what is left is equal
    numbers = np.repeat(np.arange(len(runs)), np.subtract(high, low))
    values = np.concatenate([run[a:b] for run, a, b in zip(runs, low, high, strict=True)])
    queue = numbers[values.argsort(kind="stable")]
    first, last = 0, len(queue) - 1  # so many of the queue fit; one more than so many do not
    while first < last:
        length = (first + last + 1) // 2
        if fits(_with(low, queue[:length])):
            first = length
        else:
            last = length - 1
    return _with(low, queue[:first])


def _with(counts: list[int], more: np.ndarray) -> list[int]:
    return (counts + np.bincount(more, minlength=len(counts))).tolist()


def _weighted_median(runs: Sequence[np.ndarray], low: list[int], high: list[int]) -> float:
    """A number of the runs between their places ``low`` and ``high``: at least a quarter of all there is on each side.

    It is the median of the medians, each counted as often as its run is long.
    """
    left = [(run[(a + b) // 2], b - a) for run, a, b in zip(runs, low, high, strict=True) if a < b]
    medians, sizes = np.array(left).T
    order = medians.argsort()
    half = sizes[order].cumsum().searchsorted(sizes.sum() / 2)
    return float(medians[order[half]])
