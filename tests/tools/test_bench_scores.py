"""The benchmark of scores runs, and names both ratios."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from transformers import LlamaConfig, LlamaForCausalLM


def test_the_whole_comparison_at_small_sizes(
    load_tool: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=101
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    code = load_tool("bench_scores").main([str(tmp_path), "--samples", "6", "--length", "8", "--repeats", "1"])
    assert code in (0, 1)  # that is a matter of the machine
    shown = capsys.readouterr().out
    for row in ("forward", "activation statistics", "forward and backward", "taylor-first"):
        assert row in shown
    assert "1.2" in shown
    assert "1.3" in shown
