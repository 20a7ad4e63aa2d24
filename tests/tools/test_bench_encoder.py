"""The comparison for encoders runs, with a row for every method and kind of data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import save_words
from transformers import BertConfig, BertModel


def test_every_method_with_text_and_without(
    load_tool: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path / "model")
    save_words(tmp_path / "model", tmp_path / "data", 40)
    tool = load_tool("bench_encoder")
    assert tool.main([str(tmp_path / "model"), "--data", str(tmp_path / "data")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("text") >= 4
    assert shown.count("random (made)") == 4
    for method in tool.METHODS:
        assert method in shown


def test_the_nearest_is_another(load_tool: Callable[[str], ModuleType]) -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    assert load_tool("bench_encoder").nearest(vectors).tolist() == [1, 0, 1]
