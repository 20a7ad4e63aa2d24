"""Which rows a round trains on."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.recovery.mixture import MixedRows, Weights, by_degradation, rows_of, uniform

LOSSES = {"a": 3.0, "b": 2.5, "c": 2.0}
DENSE = {"a": 2.0, "b": 2.0, "c": 2.5}


def test_what_lost_more_gets_more() -> None:
    weights = by_degradation(LOSSES, DENSE, floor=0.3)
    assert weights == pytest.approx({"a": 0.1 + 0.7 * 2 / 3, "b": 0.1 + 0.7 / 3, "c": 0.1})
    assert by_degradation(LOSSES, DENSE, floor=1.0) == pytest.approx(uniform(["a", "b", "c"]))
    assert by_degradation(DENSE, DENSE, floor=0.3) == uniform(["a", "b", "c"])  # nothing was lost


@given(
    st.dictionaries(st.text("abcdef", min_size=1), st.floats(0.01, 1), min_size=1, max_size=6),
    st.integers(1, 500),
)
def test_rows_are_whole_and_near_their_share(found: dict[str, float], rows: int) -> None:
    weights = {name: value / sum(found.values()) for name, value in found.items()}
    counts = rows_of(weights, rows)
    assert sum(counts.values()) == rows
    assert all(abs(counts[name] - weight * rows) < 1 + 1e-9 for name, weight in weights.items())


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.integers(1, 30),
    st.integers(1, 6),
    st.lists(st.floats(0.05, 1), min_size=4, max_size=4),
)
def test_no_row_comes_again_before_all_have_come(sizes: list[int], rows: int, rounds: int, shares: list[float]) -> None:
    by_name = {str(n): size for n, size in enumerate(sizes)}
    total = sum(shares[: len(sizes)])
    weights: Weights = {str(n): shares[n] / total for n in range(len(sizes))}
    history: list[Weights] = []
    sampler = MixedRows(by_name, rows, 0, lambda: history)
    seen: Counter[int] = Counter()
    for number in range(rounds):
        history.append(weights if number % 2 else uniform(list(by_name)))
        found = list(sampler)
        assert len(found) == len(sampler) == rows
        assert list(sampler) == found
        seen.update(found)
    start = 0
    for size in sizes:
        counts = [seen[row] for row in range(start, start + size)]
        assert max(counts) - min(counts) <= 1
        start += size
    assert set(seen) <= set(range(start))


def test_the_order_is_that_of_the_seed() -> None:
    history = [{"a": 1.0}]
    first, same, other = (list(MixedRows({"a": 50}, 20, seed, lambda: history)) for seed in (1, 1, 2))
    assert first == same != other
    history.append({"a": 1.0})
    assert not {*first} & {*list(MixedRows({"a": 50}, 20, 1, lambda: history))}
