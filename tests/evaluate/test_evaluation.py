from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import numel, snapshot
from rich.console import Console
from torch import nn

import graphprune
from graphprune import GraphPruneError
from graphprune.evaluate import Evaluation, Latency, checkpoint_bytes, comparison, evaluate, parameter_bytes, perplexity


def test_everything_at_once(model, tokenizer, text, task_folder, tmp_path):
    pruned = graphprune.compile(model, 0.2, allocation="global")
    graphprune.save(pruned, tmp_path / "pruned", tokenizer=tokenizer)
    pruned.train()
    check, steps = snapshot(pruned), []
    found = evaluate(
        pruned,
        tokenizer,
        text=text,
        lengths=(16, 64),
        tasks=["tiny_both"],
        include_path=task_folder,
        batch_sizes=(1, 2),
        prompt=8,
        folder=tmp_path / "pruned",
        progress=steps.append,
    )
    check()
    assert found.parameters == numel(pruned)
    assert found.parameter_bytes == 4 * numel(pruned)
    assert found.checkpoint_bytes == sum(f.stat().st_size for f in (tmp_path / "pruned").glob("*.safetensors"))
    assert found.perplexity == {n: perplexity(pruned, tokenizer, text, length=n) for n in (16, 64)}
    assert list(found.tasks) == ["tiny", "tiny_norm"]
    assert found.task_average == (found.tasks["tiny"]["acc"] + found.tasks["tiny_norm"]["acc_norm"]) / 2
    assert [(one.batch, one.prompt) for one in found.latency] == [(1, 8), (2, 8)]
    assert any("64 tokens" in step for step in steps)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["perplexity"]["16"] == found.perplexity[16]
    assert data["tasks"] == found.tasks
    assert data["latency"][1]["decode_tokens_per_second"] > 0


def test_macs_are_per_token(model):
    """Every weight of a linear layer is used once per token; attention over a few tokens comes on top."""
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert weights <= evaluate(model).macs <= 1.05 * weights


def test_a_model_that_reads_no_tokens():
    found = evaluate(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), example_inputs=torch.zeros(5, 4))
    assert (found.parameters, found.macs) == (67, 4 * 8 + 8 * 3)
    assert found.perplexity == {}
    assert found.checkpoint_bytes is None


def test_several_texts_are_joined_by_empty_lines(model, tokenizer):
    calls = []

    def watching(text, **options):
        calls.append(text)
        return tokenizer(text, **options)

    evaluate(model, watching, text=["w5 w6 w7", "", "w8"], lengths=[2])
    assert calls == ["w5 w6 w7\n\n\n\nw8"]


def test_errors(model, tokenizer, text):
    with pytest.raises(GraphPruneError, match="has no parameters"):
        evaluate(nn.ReLU(), example_inputs=torch.zeros(1))
    with pytest.raises(GraphPruneError, match="give folder="):
        evaluate(model, memory=True)
    with pytest.raises(GraphPruneError, match="at most 512 tokens, not 2048"):
        evaluate(model, tokenizer, text=text)


def test_sizes(model, tmp_path):
    half = model.half()
    assert parameter_bytes(half) == 2 * numel(half)
    half.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 1
    assert checkpoint_bytes(tmp_path / "shards") == sum(file.stat().st_size for file in files)
    assert checkpoint_bytes(files[0]) == files[0].stat().st_size
    assert checkpoint_bytes("some-org/some-model") is None
    assert checkpoint_bytes(tmp_path) is None


def render(evaluations: dict[str, Evaluation]) -> dict[str, list[str]]:
    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison(evaluations))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()]
    return {cells[0]: cells[1:] for cells in lines if cells}


def test_the_table():
    dense = Evaluation(1000, 4000, 900, 5000, {128: 50.0, 2048: 20.0}, {"a": {"acc": 0.5, "acc_stderr": 0.0123}})
    dense.latency = [Latency(1, 128, 10.0, 2.0)]
    pruned = Evaluation(800, 3200, 630, None, {128: math.inf, 64: 5.0}, {"a": {"acc": 0.4, "acc_stderr": 0.02}})
    pruned.latency = [Latency(1, 128, 8.0, None)]
    dead = Evaluation(500, 2000, 450, perplexity={128: 863_897.0, 2048: 1.5e9})
    assert render({"dense": dense, "pruned": pruned, "dead": dead}) == {
        "parameters": ["1,000", "800", "-20.00%", "500", "-50.00%"],
        "MACs per token": ["900", "630", "-30.00%", "450", "-50.00%"],
        "bytes in memory": ["4,000", "3,200", "-20.00%", "2,000", "-50.00%"],
        "bytes on disk": ["5,000", "", "", "", ""],
        "perplexity @128": ["50.00", "inf", "", "863,897.00", "×17,278"],
        "perplexity @2048": ["20.00", "", "", "1.5e+09", "×75,000,000"],
        "perplexity @64": ["", "5.00", "", "", ""],
        "prefill ms, batch 1, 128 tokens": ["10.00", "8.00", "-20.00%", "", ""],
        "prefill tokens/s, batch 1, 128 tokens": ["12,800.0", "16,000.0", "+25.00%", "", ""],
        "decode ms, batch 1, 128 tokens": ["2.00", "", "", "", ""],
        "decode tokens/s, batch 1, 128 tokens": ["500.0", "", "", "", ""],
        "a acc": ["0.5000 ±0.0123", "0.4000 ±0.0200", "-20.00%", "", ""],
    }


def test_what_json_has_no_number_for():
    data = Evaluation(1, 4, 1, perplexity={8: math.inf}, tasks={"a": {"acc": math.nan}}).to_dict()
    assert json.loads(json.dumps(data, allow_nan=False))["perplexity"] == {"8": "inf"}
    assert data["tasks"] == {"a": {"acc": "nan"}}
