"""The comparison of training while pruning runs, and its figures are what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import save_words
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = 40


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    sizes = {"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, vocab_size=WORDS, **sizes)).save_pretrained(tmp_path / "model")
    save_words(tmp_path / "model", tmp_path / "data", WORDS)
    return [str(tmp_path / "model"), "--data", str(tmp_path / "data")]


@pytest.mark.slow
def test_the_whole_comparison_at_small_sizes(
    load_tool: Callable[[str], ModuleType],
    given: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    bench = load_tool("bench_lorashear")
    monkeypatch.setattr(bench, "LENGTH", 16)
    sizes = ["--tokens", "1300", "--text-tokens", "160", "--warm", "2"]
    assert bench.main([*given, *sizes, "--parts", "correlation", "quality"]) == 0
    shown = capsys.readouterr().out
    assert "mlp: mean" in shown
    assert "20 steps of 4 × 16 tokens" in shown
    rows = [line for line in shown.splitlines() if "removed" in line]
    assert len(rows) == 10
    assert all(float(line.split("%")[0].split()[-1]) > 15 for line in rows[1:])


@pytest.mark.slow
def test_memory_is_that_of_two_processes(
    load_tool: Callable[[str], ModuleType], given: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert load_tool("bench_lorashear").main([*given, "--parts", "memory"]) in (0, 1)  # that is a matter of sizes
    assert "LoRAPrune" in capsys.readouterr().out


def test_spearman(load_tool: Callable[[str], ModuleType]) -> None:
    spearman = load_tool("bench_lorashear").spearman
    values = torch.tensor([3.0, 1.0, 2.0, 10.0])
    assert spearman(values, values.exp()) == pytest.approx(1)
    assert spearman(values, -values) == pytest.approx(-1)
    assert spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 2, 4, 3])) == pytest.approx(0.8)
