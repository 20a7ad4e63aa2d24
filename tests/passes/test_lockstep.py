"""Runs that wait for each other."""

from __future__ import annotations

import threading

import pytest

from graphprune.passes.lockstep import Lockstep


def runs(points: dict[str, list[int]], fail: tuple[str, int] | None = None, meet_fails: int | None = None) -> list[str]:
    """What happens when every item waits at its points."""
    said: list[str] = []

    def work(item: str) -> None:
        for point in points[item]:
            said.append(f"{item}{point}")
            if fail == (item, point):
                raise ValueError(f"{item} fails")
            steps.wait(point)
        said.append(f"{item} ends")

    def meet(point: int) -> None:
        said.append(f"meet{point}")
        if point == meet_fails:
            raise ValueError("the meeting fails")

    steps = Lockstep(work, meet)
    before = threading.active_count()
    try:
        steps.run(list(points))
    except ValueError as error:
        said.append(str(error))
    assert threading.active_count() == before
    return said


def test_all_arrive_before_any_goes_on() -> None:
    assert runs({"a": [0, 1], "b": [0, 1]}) == [
        "a0", "b0", "meet0", "a1", "b1", "meet1", "a ends", "b ends"
    ]  # fmt: skip


def test_the_smallest_point_is_first_and_who_skips_it_waits() -> None:
    assert runs({"a": [1], "b": [0, 1], "c": []}) == [
        "a1", "b0", "c ends", "meet0", "b1", "meet1", "a ends", "b ends"
    ]  # fmt: skip


@pytest.mark.parametrize("who", ["a", "b"])
def test_a_failure_ends_all_and_is_raised(who: str) -> None:
    said = runs({"a": [0, 1], "b": [0, 1], "c": [0, 1]}, fail=(who, 1))
    assert said[-1] == f"{who} fails"
    assert "meet1" not in said
    assert not any("ends" in line for line in said)


def test_a_failure_at_the_start_or_of_the_meeting_is_raised() -> None:
    assert runs({"a": [0], "b": [0]}, fail=("a", 0)) == ["a0", "a fails"]
    assert runs({"a": [0], "b": [0]}, meet_fails=0) == ["a0", "b0", "meet0", "the meeting fails"]


def test_nothing_to_run_is_nothing() -> None:
    assert runs({}) == []
