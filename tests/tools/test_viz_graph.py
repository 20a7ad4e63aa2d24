"""The picture of node groups: complete, foldable, and DOT that parses."""

from __future__ import annotations

import functools
import stat
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pydot
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune
from graphprune import GraphPruneError
from graphprune.drawing import Graph, build_graph, to_pydot, write
from graphprune.folding import fold_groups, starred
from graphprune.inspection import Inspection

Load = Callable[[str], ModuleType]


def llama(layers: int = 2, **changes: object) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, vocab_size=50, **{**sizes, **changes})).eval()


class Net(nn.Module):
    """A stem of numbered layers and a grouped convolution with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.BatchNorm2d(16),
        )
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + torch.relu(self.grouped(x))).mean((2, 3)))


@functools.cache
def inspections() -> list[Inspection]:
    return [
        graphprune.inspect(llama()),
        graphprune.inspect(llama(tie_word_embeddings=True)),
        graphprune.inspect(Net().eval(), example_inputs=torch.randn(5, 3, 8, 8)),
    ]


def groups_of(graph: Graph) -> list[dict]:
    return [about for _, about in graph.nodes(data=True) if about["side"] == "group"]


def tensors_of(graph: Graph) -> list[dict]:
    return [about for _, about in graph.nodes(data=True) if about["side"] == "tensor"]


def all_nodes(dot: pydot.Graph) -> list[pydot.Node]:
    """Nodes at every depth, without the defaults that DOT writes as nodes named ``node`` and ``edge``."""
    own = [node for node in dot.get_nodes() if node.get_name()[1:].isdigit()]
    return own + [node for inner in dot.get_subgraphs() for node in all_nodes(inner)]


@pytest.mark.parametrize("which", range(3))
def test_the_graph_holds_every_member_of_every_group(which: int) -> None:
    inspection = inspections()[which]
    graph = build_graph(inspection)
    kinds = {"prunable": 0, "pinned": 0, "inner": 0, "left alone": 0}
    for about in groups_of(graph):
        kinds[about["kind"]] += about["count"]
        assert (about["reason"] == "") == (about["kind"] == "prunable")
    assert kinds["prunable"] == len(inspection.prunable)
    assert sum(kinds.values()) == len(inspection.groups)
    assert kinds["pinned"] == sum(bool(group.pins) for group in inspection.groups)
    # An edge stands for as many members as the tensors of one kind have.
    drawn = sum(graph.nodes[tensor]["count"] for tensor, _ in graph.edges())
    assert drawn == sum(len({*group.members}) for group in inspection.groups)
    consuming = sum(graph.nodes[t]["count"] for t, _, about in graph.edges(data=True) if about["consumes"])
    assert consuming == sum(len({m for m in group.members if m.consumes}) for group in inspection.groups)


@pytest.mark.parametrize("which", range(3))
def test_the_dot_parses_and_says_what_the_graph_says(which: int, tmp_path: Path) -> None:
    graph = build_graph(inspections()[which])
    write(graph, tmp_path / "graph.dot")
    (dot,) = pydot.graph_from_dot_data((tmp_path / "graph.dot").read_text(encoding="utf-8"))
    labels = {node.get_name(): node.get("label") for node in all_nodes(dot)}
    assert labels.keys() == set(graph.nodes)
    for node, about in graph.nodes(data=True):
        assert about["name"] in labels[node]
        assert (f"×{about['count']}" in labels[node]) == (about["count"] > 1)
        if about.get("kind") == "pinned":
            first_words = about["reason"].removeprefix("pinned: ").split()[:2]
            assert " ".join(first_words) in labels[node].replace("\\n", " ")
    edges = {(e.get_source(), e.get_destination(), e.get("label"), e.get("style")) for e in dot.get_edges()}
    styles = {True: "dashed", False: "solid"}
    assert edges == {(t, g, f'"dim {a["dim"]}"', styles[a["consumes"]]) for t, g, a in graph.edges(data=True)}
    fills = {node.get_name(): node.get("fillcolor") for node in all_nodes(dot)}
    green = {node for node, about in graph.nodes(data=True) if about["kind"] == "prunable"}
    (colour,) = {fills[node] for node in green}
    assert {node for node, fill in fills.items() if fill == colour} == green


def test_modules_are_boxes_within_boxes() -> None:
    dot = to_pydot(build_graph(graphprune.inspect(llama())))
    (model,) = dot.get_subgraphs()
    (layers,) = model.get_subgraphs()
    assert [model.get("label"), layers.get("label")] == ['"model"', '"layers.*"']
    assert {box.get("label") for box in layers.get_subgraphs()} == {'"self_attn"', '"mlp"'}
    (mlp,) = (box for box in layers.get_subgraphs() if box.get("label") == '"mlp"')
    names = "".join(node.get("label") for node in mlp.get_nodes())
    assert all(name in names for name in ("gate_proj.weight ", "up_proj.weight ", "down_proj.weight ", "prunable"))


def test_depth_changes_only_the_counts() -> None:
    shallow, deep = (build_graph(graphprune.inspect(llama(layers))) for layers in (2, 5))
    assert sorted(deep.edges(data="dim")) == sorted(shallow.edges(data="dim"))
    keys = {"side", "name", "path", "shape", "kind", "tied", "dims", "parameters", "size", "reason", "elsewhere"}
    for node, about in shallow.nodes(data=True):
        other = dict(deep.nodes[node])
        assert other["count"] == {1: 1, 2: 5}[about["count"]]
        assert {key: other[key] for key in keys & about.keys()} == {key: about[key] for key in keys & about.keys()}


def test_a_layer_of_another_width_is_not_folded_with_the_rest() -> None:
    model = llama(3)
    model.model.layers[1].mlp = llama(1, intermediate_size=20).model.layers[0].mlp
    graph = build_graph(graphprune.inspect(model))
    found = {(a["name"], a["size"], a["count"]) for a in groups_of(graph) if "mlp" in a["name"]}
    assert found == {
        ("model.layers.*.mlp.gate_proj.weight[0]", 44, 2),
        ("model.layers.1.mlp.gate_proj.weight[0]", 20, 1),
    }
    ups = {(a["name"], a["shape"]) for a in tensors_of(graph) if "up_proj" in a["name"]}
    assert ups == {("model.layers.*.mlp.up_proj.weight", (44, 32)), ("model.layers.1.mlp.up_proj.weight", (20, 32))}


def test_numbered_layers_of_other_classes_are_not_folded() -> None:
    graph = build_graph(inspections()[2])
    biases = {(a["name"], a["count"]) for a in tensors_of(graph) if a["name"].endswith("bias")}
    assert {name for name, count in biases if name.startswith("stem") and count == 1} == {
        "stem.0.bias",
        "stem.1.bias",
        "stem.3.bias",
        "stem.4.bias",
    }
    assert {a["name"] for a in tensors_of(graph) if a["kind"] == "buffer"} >= {"stem.1.running_mean"}


def test_tied_names_and_awkward_names_are_written() -> None:
    graph = build_graph(inspections()[1])
    (embedding,) = (a for a in tensors_of(graph) if a["tied"])
    assert embedding["tied"] == ["lm_head.weight"]
    graph.nodes["g0"]["name"] = awkward = 'a "b"\\n·[0].{1}'
    (dot,) = pydot.graph_from_dot_data(to_pydot(graph).to_string())
    (label,) = (node.get("label") for node in all_nodes(dot) if node.get_name() == "g0")
    assert label.startswith('"' + awkward.replace("\\", "\\\\").replace('"', '\\"'))


def test_folding_names() -> None:
    assert starred("model.layers.12.mlp.up.weight[0]") == "model.layers.*.mlp.up.weight[0]"
    assert starred("0.weight[0].1") == "*.weight[0].1"
    assert starred("conv1.weight") == "conv1.weight"
    inspection = inspections()[0]
    folds = fold_groups(inspection.prunable, lambda group: "")
    assert [(fold.name, fold.size, len(fold.groups)) for fold in folds] == [
        ("model.layers.*.self_attn.q_proj.weight[0].0", 2, 2),
        ("model.layers.*.mlp.gate_proj.weight[0]", 44, 2),
    ]
    assert folds[1].members == [f"model.layers.*.mlp.{name}" for name in _MLP_MEMBERS]


_MLP_MEMBERS = ("gate_proj.weight[0]", "up_proj.weight[0]", "down_proj.weight[1]")


def test_another_extension_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match=r"graph\.pdf must end in \.dot, \.svg, \.png, \.html"):
        write(build_graph(inspections()[0]), tmp_path / "graph.pdf")
    assert not list(tmp_path.iterdir())


def test_a_picture_without_graphviz_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GraphPruneError, match="apt install graphviz"):
        write(build_graph(inspections()[0]), tmp_path / "graph.svg")
    assert not list(tmp_path.iterdir())


def stand_in_for_dot(folder: Path, script: str) -> None:
    program = folder / "dot"
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_graphviz_gets_the_dot_and_its_answer_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    stand_in_for_dot(tmp_path / "bin", 'echo "$1"; while read -r line; do echo "$line"; done\n')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    write(build_graph(inspections()[0]), tmp_path / "graph.svg")
    text = (tmp_path / "graph.svg").read_text(encoding="utf-8")
    assert text.startswith("-Tsvg\ndigraph")
    assert "gate_proj" in text


def test_what_graphviz_complains_about_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    stand_in_for_dot(tmp_path / "bin", "echo no fonts >&2; exit 3\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(GraphPruneError, match="could not draw the graph: no fonts"):
        write(build_graph(inspections()[0]), tmp_path / "graph.png")
    assert not (tmp_path / "graph.png").exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match="could not be written: No such file"):
        write(build_graph(inspections()[0]), tmp_path / "nowhere" / "graph.dot")


def test_the_tool_draws_a_saved_model(load_tool: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "model")
    out = tmp_path / "graph.dot"
    assert load_tool("viz_graph").main([str(tmp_path / "model"), "-o", str(out)]) == 0
    assert "9 kinds of node groups" in capsys.readouterr().out
    assert "gate_proj.weight[0]  ×2" in out.read_text(encoding="utf-8")


def test_the_tool_draws_a_config_alone(load_tool: Load, tmp_path: Path) -> None:
    main = load_tool("viz_graph").main
    llama().save_pretrained(tmp_path / "model")
    llama().config.save_pretrained(tmp_path / "config")
    arguments = {"model": [], "config": ["--config-only"]}
    for name, options in arguments.items():
        assert main([str(tmp_path / name), "-o", str(tmp_path / f"{name}.dot"), *options]) == 0
    assert (tmp_path / "model.dot").read_bytes() == (tmp_path / "config.dot").read_bytes()


@pytest.mark.parametrize("options", [[], ["--config-only"]])
def test_the_tool_says_what_is_wrong(
    load_tool: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert load_tool("viz_graph").main([str(tmp_path / "empty"), "-o", str(tmp_path / "graph.dot"), *options]) == 1
    assert "\ngraphprune: " in capsys.readouterr().err
    assert not (tmp_path / "graph.dot").exists()
