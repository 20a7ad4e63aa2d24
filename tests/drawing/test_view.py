"""One layer, one group, operators, and what a plan keeps."""

from __future__ import annotations

from typing import Any

import pydot
import pytest
from drawing_models import HEADS, MLP, traced

from graphprune import GraphPruneError
from graphprune.drawing import Graph, View, build_graph, to_pydot


def of(graph: Graph, side: str) -> dict[str, dict[str, Any]]:
    return {about["name"]: about for _, about in graph.nodes(data=True) if about["side"] == side}


def test_a_layer_is_not_folded_and_has_the_groups_that_it_is_in() -> None:
    graph = build_graph(traced(), View(layer=2))
    tensors, groups = of(graph, "tensor"), of(graph, "group")
    assert len(tensors) == 9
    assert all(name.startswith("model.layers.2.") and about["count"] == 1 for name, about in tensors.items())
    mlp = groups["model.layers.2.mlp.gate_proj.weight[0]"]
    assert (mlp["count"], mlp["elsewhere"]) == (1, 0)
    assert {one["where"].split()[-1] for one in mlp["operators"]} >= {"model.layers.2.mlp.up_proj"}
    # The residual width has 9 dimensions in every layer, and those of embedding, last norm and head.
    residual = groups["model.embed_tokens.weight[1]"]
    assert (residual["slices"], residual["elsewhere"]) == (4 * 9 + 3, 3 * 9 + 3)


@pytest.mark.parametrize("name", [MLP, "*.mlp.*", "model.layers.2.mlp.gate_proj.weight[0]"])
def test_a_group_is_drawn_with_its_neighbours_and_operators(name: str) -> None:
    graph = build_graph(traced(), View(group=name))
    assert of(graph, "group").keys() >= {"model.embed_tokens.weight[1]"}
    assert {tensor.split(".")[-2] for tensor in of(graph, "tensor")} == {"gate_proj", "up_proj", "down_proj"}
    drawn = [(about["name"], about["where"].split()[-1].split(".")[-1]) for about in of_operators(graph)]
    assert sorted(drawn) == [("linear", "gate_proj"), ("linear", "up_proj"), ("mul", "mlp"), ("silu", "act_fn")]


def of_operators(graph: Graph) -> list[dict[str, Any]]:
    return [about for _, about in graph.nodes(data=True) if about["side"] == "operator"]


def test_an_operator_of_two_groups_is_in_both() -> None:
    graph = build_graph(traced(), View(operators=True))
    names = {node: about["name"] for node, about in graph.nodes(data=True)}
    values = next(
        node
        for node, about in graph.nodes(data=True)
        if about["side"] == "operator" and about["name"] == "linear" and about["where"].endswith("v_proj")
    )
    groups = {names[group] for group in graph.successors(values)}
    assert groups == {HEADS, "model.layers.*.self_attn.v_proj.weight[0].1"}
    for group in graph.successors(values):
        listed = [one for one in graph.nodes[group]["operators"] if one["where"].endswith("v_proj")]
        assert any(set(one["groups"]) == set(graph.successors(values)) and one["count"] == 4 for one in listed)


def test_structures_are_counted() -> None:
    groups = of(build_graph(traced()), "group")
    # A row of gate and up and a column of down, 32 wide each; a key head has 2 query heads of 8 and a value of 8.
    assert groups[MLP]["structure"] == [3 * 32]
    assert groups[MLP]["slices"] == 3
    assert groups[HEADS]["structure"] == [(2 * 8 + 8 + 8 + 2 * 8) * 32]


def test_a_plan_shows_what_is_kept() -> None:
    widths = {f"model.layers.{n}.mlp.gate_proj.weight[0]": (44, 11 * (n + 1)) for n in range(3)}
    graph = build_graph(traced(), View(widths=widths))
    about = of(graph, "group")[MLP]
    assert about["kept"] == [(name, *pair) for name, pair in widths.items()]
    (dot,) = pydot.graph_from_dot_data(to_pydot(graph).to_string())
    assert "size 44 → 11–33, 50% kept" in dot.to_string()
    assert "#a8dba8;0.5000:" in dot.to_string()


def test_a_pruned_model_shows_what_was_removed_from_it() -> None:
    widths = {f"model.layers.{n}.mlp.gate_proj.weight[0]": (88, 44) for n in range(4)}
    assert of(build_graph(traced(), View(widths=widths)), "group")[MLP]["kept"][0][1:] == (88, 44)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View(layer=9), "There is no layer 9. They have the numbers 0 to 3"),
        (View(group="nothing"), "No node group is called 'nothing'. There are: model.embed_tokens"),
        (View(layer=1, group="lm_head.weight[0]"), "has nothing in layer 1"),
        (View(widths={"model.layers.0.mlp.gate_proj.weight[0]": (50, 40)}), "keeps 40 of 50 .* which has 44"),
        (View(widths={"other[0]": (5, 4)}), r"another model, which has no node group other\[0\]"),
    ],
)
def test_what_cannot_be_shown_is_said(view: View, message: str) -> None:
    with pytest.raises(GraphPruneError, match=message):
        build_graph(traced(), view)
