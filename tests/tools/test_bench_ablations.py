"""The ablations run, each with one thing changed."""

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
def bench(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("bench_ablations")


def test_every_comparison_is_of_variants_that_differ_in_one_thing(bench: ModuleType) -> None:
    for better, worse in bench.COMPARED:
        a, b = bench.VARIANTS[better], bench.VARIANTS[worse]
        assert {k: v for k, v in a.items() if k != "passes"} == {k: v for k, v in b.items() if k != "passes"}


def test_the_whole_table_at_small_sizes(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=12, num_attention_heads=8, vocab_size=WORDS
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    save_words(tmp_path, tmp_path, WORDS)
    code = bench.main([str(tmp_path), "--data", str(tmp_path), "--samples", "4", "--length", "16", "--tokens", "256"])
    assert code in (0, 1)  # random weights have no side
    captured = capsys.readouterr()
    for variant in bench.VARIANTS:
        assert f"{variant}: " in captured.err
    assert "better" in captured.out
