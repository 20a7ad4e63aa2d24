"""Sorting scores, and the longest prefix of many sorted runs, against the plain way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from graphprune.ir import order
from graphprune.ir.order import in_order, longest_prefix


@pytest.mark.parametrize(
    "scores",
    [
        torch.randn(1000, generator=torch.Generator().manual_seed(0)),
        torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).round(),
        torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 0.0, -0.0]),
        torch.zeros(5),
        torch.empty(0),
        torch.tensor([3.0, 1.0, 2.0, 1.0], dtype=torch.float64),
        torch.tensor([3, 1, 2, 1]),
    ],
    ids=["normal", "ragged", "extremes", "equal", "empty", "double", "whole"],
)
def test_scores_are_sorted_stably(scores: torch.Tensor) -> None:
    values, indices = in_order(scores)
    expected = scores.double().sort(dim=-1, stable=True)
    assert values.dtype == torch.float64
    assert torch.equal(values, expected.values)
    assert torch.equal(indices, expected.indices)


def _plain(runs: Sequence[np.ndarray], most: float, costs: Sequence[int]) -> list[int]:
    queue = sorted((value, i) for i, run in enumerate(runs) for value in run)
    counts = [0] * len(runs)
    for _, i in queue:
        counts[i] += 1
        if sum(n * c for n, c in zip(counts, costs, strict=True)) > most:
            counts[i] -= 1
            break
    return counts


@pytest.mark.parametrize("few", [1, 7, 1 << 12])
@pytest.mark.parametrize("kind", ["random", "alike", "rounded", "apart"])
def test_the_longest_prefix_of_all_runs(few: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_FEW", few)
    random = np.random.default_rng(0)
    sizes = [0, 1, 40, 40, 7, 33]
    runs = {
        "random": [np.sort(random.random(n)) for n in sizes],
        "alike": [(np.arange(n) + 0.5) / n for n in sizes],
        "rounded": [np.sort(random.integers(0, 4, n)).astype(float) for n in sizes],
        "apart": [i + np.sort(random.random(n)) for i, n in enumerate(sizes)],
    }[kind]
    costs = [3, 1, 2, 5, 1, 4]
    everything = sum(n * c for n, c in zip(sizes, costs, strict=True))
    for most in (0, 1, 5, 17, everything // 3, everything // 2, everything - 1, everything):

        def fits(counts: Sequence[int], most: int = most) -> bool:
            assert any(counts)
            return sum(n * c for n, c in zip(counts, costs, strict=True)) <= most

        assert longest_prefix(runs, fits) == _plain(runs, most, costs)
