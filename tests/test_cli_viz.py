"""The command ``graphprune viz``, and the tool that is the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune
from graphprune.cli import main

GATE = "model.layers.{}.mlp.gate_proj.weight[0]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("viz")
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=50, **sizes)).eval()
    model.save_pretrained(folder / "model")
    small = graphprune.compile(model, 0.2, method="magnitude", allocation="uniform")
    (folder / "plan.json").write_text(graphprune.report(small).plan.to_json())
    graphprune.save(small, folder / "small")
    return folder


def data_of(page: Path) -> dict:
    return json.loads(page.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0])


def kept(page: Path) -> dict[str, list[int]]:
    nodes = data_of(page)["nodes"].values()
    return {name: pair for node in nodes for name, *pair in node.get("kept", [])}


def test_a_plan_and_the_model_that_it_made_show_the_same(folder: Path, tmp_path: Path) -> None:
    plan, saved, both = tmp_path / "plan.html", tmp_path / "saved.html", tmp_path / "both.html"
    assert main(["viz", str(folder / "model"), "--plan", str(folder / "plan.json"), "-o", str(plan)]) == 0
    assert main(["viz", str(folder / "small"), "-o", str(saved)]) == 0
    config = ["viz", str(folder / "model"), "--config-only", "--plan", str(folder / "small")]
    assert main([*config, "-o", str(both)]) == 0
    widths = graphprune.report(graphprune.load(folder / "small")).widths
    assert kept(plan) == kept(saved) == kept(both) == {name: list(pair) for name, pair in widths.items()}
    assert GATE.format(1) in widths


def test_one_layer_and_one_group(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "part.html"
    command = ["viz", str(folder / "model"), "--config-only", "-o", str(out)]
    assert main([*command, "--layer", "1"]) == 0
    names = {node["name"] for node in data_of(out)["nodes"].values() if node["side"] == "tensor"}
    assert all(name.startswith("model.layers.1.") for name in names)
    assert main([*command, "--group", GATE.format("*")]) == 0
    assert {node["side"] for node in data_of(out)["nodes"].values()} == {"tensor", "group", "operator"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "graph.pdf"], "must end in"),
        (["-o", "graph.dot", "--layer", "7"], "There is no layer 7"),
        (["-o", "graph.dot", "--plan", "nowhere.json"], "nowhere.json cannot be read"),
        (["-o", "nowhere/graph.html"], "could not be written"),
    ],
)
def test_what_is_wrong_is_said(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["viz", str(folder / "model"), "--config-only", *options]) == 1
    assert message in capsys.readouterr().err
