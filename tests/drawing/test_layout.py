"""Nothing on the page covers anything else."""

from __future__ import annotations

import itertools

import pytest
from drawing_models import traced
from hypothesis import given
from hypothesis import strategies as st

from graphprune.drawing import View, build_graph
from graphprune.drawing.layout import NARROW, WIDE, Place, Sizes, _apart, lay_out


def overlap(a: Place, b: Place) -> bool:
    return a.x < b.x + b.width and b.x < a.x + a.width and a.y < b.y + b.height and b.y < a.y + a.height


@pytest.mark.parametrize("sizes", [WIDE, NARROW])
@pytest.mark.parametrize("view", [View(), View(layer=1, operators=True)])
def test_everything_has_a_place_of_its_own(view: View, sizes: Sizes) -> None:
    graph = build_graph(traced(), view)
    layout = lay_out(graph, sizes)
    assert layout.nodes.keys() == set(graph.nodes)
    assert not [pair for pair in itertools.combinations(layout.nodes.values(), 2) if overlap(*pair)]
    for (one, _, _), (other, _, _) in itertools.combinations(layout.frames, 2):
        low, high = sorted((one, other), key=lambda place: place.width)
        inside = high.y <= low.y and low.y + low.height <= high.y + high.height
        assert inside or not overlap(one, other)
    assert len(layout.edges) == graph.number_of_edges()
    assert all(place.x >= 0 and place.y >= 0 for place in layout.nodes.values())


def test_a_telephone_has_room_for_tensors_and_groups() -> None:
    assert lay_out(build_graph(traced()), NARROW).width <= 390 - 2 * 8


def test_tensors_are_in_the_order_of_the_model() -> None:
    graph = build_graph(traced())
    layout = lay_out(graph, WIDE)
    y = {graph.nodes[node]["name"]: place.y for node, place in layout.nodes.items()}
    names = ["model.embed_tokens", *(f"model.layers.*.{n}" for n in ("self_attn.q_proj", "mlp.up_proj")), "lm_head"]
    heights = [y[f"{name}.weight"] for name in names]
    assert heights == sorted(heights)


@given(st.lists(st.floats(0, 1000), max_size=12))
def test_apart(wanted: list[float]) -> None:
    found = _apart(sorted(wanted), 50)
    assert all(b - a >= 50 - 1e-6 for a, b in itertools.pairwise(found))
    assert all(value >= 0 for value in found)
    if all(b - a >= 50 for a, b in itertools.pairwise(sorted(wanted))):
        assert found == pytest.approx(sorted(wanted))


def test_what_wants_one_place_is_around_it() -> None:
    assert _apart([100, 100, 100], 50) == [50, 100, 150]
    assert _apart([0, 0, 300], 50) == [0, 50, 300]
