"""Which rows a round trains on."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.recovery.mixture import MixedRows, Weights, by_degradation, rows_of, uniform, within

LOSSES = {"a": 3.0, "b": 2.5, "c": 2.0}
DENSE = {"a": 2.0, "b": 2.0, "c": 2.5}


def test_what_lost_more_gets_more() -> None:
    weights = by_degradation(LOSSES, DENSE, floor=0.3)
    assert weights == pytest.approx({"a": 0.1 + 0.7 * 2 / 3, "b": 0.1 + 0.7 / 3, "c": 0.1})
    assert by_degradation(LOSSES, DENSE, floor=1.0) == pytest.approx(uniform(["a", "b", "c"]))
    assert by_degradation(DENSE, DENSE, floor=0.3) == uniform(["a", "b", "c"])  # nothing was lost


def test_what_a_small_source_cannot_take_goes_to_the_others() -> None:
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    assert within(weights, {"a": 1.0, "b": 1.0, "c": 1.0}) == pytest.approx(weights)
    assert within(weights, {"a": 0.1, "b": 9.0, "c": 9.0}) == pytest.approx({"a": 0.1, "b": 0.54, "c": 0.36})
    assert within(weights, {"a": 0.1, "b": 0.4, "c": 9.0}) == pytest.approx({"a": 0.1, "b": 0.4, "c": 0.5})
    # Nothing but what is full had any weight, so that the others share evenly.
    assert within({"a": 1.0, "b": 0.0, "c": 0.0}, {"a": 0.6, "b": 1.0, "c": 1.0}) == pytest.approx(
        {"a": 0.6, "b": 0.2, "c": 0.2}
    )
    # All are seen more often than that: in proportion to their rows.
    assert within(weights, {"a": 0.1, "b": 0.1, "c": 0.2}) == pytest.approx({"a": 0.25, "b": 0.25, "c": 0.5})


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 2)), min_size=1, max_size=6))
def test_shares_are_within_what_may_be_taken(found: list[tuple[float, float]]) -> None:
    total = sum(weight for weight, _ in found)
    weights = {str(n): weight / total if total else 1 / len(found) for n, (weight, _) in enumerate(found)}
    most = {str(n): limit for n, (_, limit) in enumerate(found)}
    shares = within(weights, most)
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares) == list(weights)
    if sum(most.values()) > 1:
        assert all(shares[name] <= most[name] + 1e-9 for name in most)
        assert all(shares[name] >= weights[name] - 1e-9 for name in most if shares[name] < most[name] - 1e-9)


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
