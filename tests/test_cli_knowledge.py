from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune
from graphprune.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_table_plot_and_json(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot, data = tmp_path / "plot.png", tmp_path / "found.json"
    command = ["knowledge", folder, "--data", "random", "--samples", "4", "--length", "16", "--ratios", "0.25", "0.5"]
    assert main([*command, "-o", str(plot), str(data)]) == 0
    printed = capsys.readouterr().out
    for word in ("perplexity of the dense model", "+ at 0.25", "+ at 0.5", "model.layers.1.mlp.gate_proj.weight[0]"):
        assert word in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = graphprune.Knowledge.from_json(data.read_text())
    assert len(found.groups) == 4
    assert found.rows == 4
    assert len(list((tmp_path / "cache" / "graphprune" / "knowledge").iterdir())) == 1

    assert main([*command, "--json", "--no-cache", "--device", "cpu", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(data.read_text())

    assert main([*command, "-o", str(plot)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "-o", str(tmp_path / "plot.nothing")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_prune_leaves_the_worst_whole(folder: str, tmp_path: Path) -> None:
    out = str(tmp_path / "small")
    options = ["--ratio", "0.1", "--method", "magnitude", "--data", "random", "--unprunable-ratio", "0.25", "-o", out]
    assert main(["prune", folder, *options]) == 0
    reasons = graphprune.report(graphprune.load(out)).skipped.values()
    assert sum(why.startswith("unprunable") for why in reasons) == 1
