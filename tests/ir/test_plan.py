"""Plans are plain data: round trips, and one clear error for everything else."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune import GraphPruneError, Plan

names = st.text(min_size=1, max_size=12)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    sizes = draw(st.dictionaries(names, st.integers(1, 12), max_size=4))
    keep = {name: sorted(draw(st.sets(st.integers(0, size - 1), min_size=1))) for name, size in sizes.items()}
    under = {}
    for name in draw(st.sets(st.sampled_from(sorted(sizes)))) if sizes else ():
        under[name] = draw(names.filter(lambda other, name=name: other != name))
        kept, rows = len(keep[name]), draw(st.integers(1, 3))
        keep[name] = [sorted(draw(st.permutations(range(sizes[name])))[:kept]) for _ in range(rows)]
    skipped = draw(st.dictionaries(names, st.text(max_size=20), max_size=3))
    method, width = draw(st.text(max_size=8)), draw(st.booleans())
    return Plan(draw(st.floats(0, 0.99)), keep, sizes, skipped, method, width, under)


@given(plans())
def test_json_round_trip(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()


def good() -> dict:
    return json.loads(Plan(0.5, {"a": [0, 2]}, {"a": 4}, {"b": "pinned"}, "l2").to_json())


def test_what_a_plan_looks_like() -> None:
    assert good() == {
        "format": 1,
        "method": "l2",
        "ratio": 0.5,
        "axes": {"a": {"size": 4, "keep": [0, 2]}},
        "skipped": {"b": "pinned"},
    }


def test_what_a_ragged_plan_looks_like() -> None:
    plan = Plan(0.5, {"a": [[0, 2], [1, 2]]}, {"a": 4}, under={"a": "heads"})
    assert json.loads(plan.to_json())["axes"] == {"a": {"size": 4, "under": "heads", "keep": [[0, 2], [1, 2]]}}
    assert plan.widths() == {"a": (4, 2)}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"width": 1},
        {"experts": "yes"},
        {"axes": None},
        {"axes": []},
        {"axes": {"a": {"size": 4}}},
        {"axes": {"a": {"keep": [0]}}},
        {"axes": {"a": {"size": 4, "keep": []}}},
        {"axes": {"a": {"size": 4, "keep": [2, 0]}}},
        {"axes": {"a": {"size": 4, "keep": [1, 1]}}},
        {"axes": {"a": {"size": 4, "keep": [4]}}},
        {"axes": {"a": {"size": 4, "keep": [-1, 0]}}},
        {"axes": {"a": {"size": 4, "keep": [0.5]}}},
        {"axes": {"a": {"size": 4, "keep": [True]}}},
        {"axes": {"a": {"size": 4, "keep": "01"}}},
        {"axes": {"a": {"size": "4", "keep": [0]}}},
        {"axes": {"a": None}},
        {"axes": {"a": {"size": 4, "keep": [[0], [1]]}}},
        {"axes": {"a": {"size": 4, "keep": [0, 1], "under": "b"}}},
        {"axes": {"a": {"size": 4, "keep": [], "under": "b"}}},
        {"axes": {"a": {"size": 4, "keep": [[], []], "under": "b"}}},
        {"axes": {"a": {"size": 4, "keep": [[0], 1], "under": "b"}}},
        {"axes": {"a": {"size": 4, "keep": [[0], [1, 2]], "under": "b"}}},
        {"axes": {"a": {"size": 4, "keep": [[0], [4]], "under": "b"}}},
        {"axes": {"a": {"size": 4, "keep": [[1, 0], [0, 1]], "under": "b"}}},
        {"axes": {"a": {"size": 4, "keep": [[[0]], [[1]]], "under": "b"}}},
        {"axes": {"a": {"size": 4, "keep": [[0], [1]], "under": "a"}}},
        {"axes": {"a": {"size": 4, "keep": [[0], [1]], "under": None}}},
        {"ratio": "much"},
        {"ratio": None},
        {"skipped": [1]},
        {"skipped": None},
    ],
    ids=json.dumps,
)
def test_a_damaged_plan_is_refused(change: dict) -> None:
    with pytest.raises(GraphPruneError, match=r"[Pp]lan"):
        Plan.from_json(json.dumps(good() | change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '"plan"', "{}", "\x00"])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(GraphPruneError, match="no plan"):
        Plan.from_json(text)


@pytest.mark.parametrize("key", ["axes", "ratio", "format"])
def test_a_missing_field_is_refused(key: str) -> None:
    data = good()
    del data[key]
    with pytest.raises(GraphPruneError, match=r"[Pp]lan"):
        Plan.from_dict(data)


def test_a_plan_made_by_hand_is_checked_too() -> None:
    with pytest.raises(GraphPruneError, match="does not say its size"):
        Plan(0.1, {"a": [0]}, {})
    with pytest.raises(GraphPruneError, match="sorted, non-empty"):
        Plan(0.1, {"a": [3]}, {"a": 3})


@pytest.mark.parametrize("ratio", [float("nan"), -0.1, 1.0, 7.0])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(GraphPruneError, match="ratio"):
        Plan.from_dict(good() | {"ratio": ratio})
