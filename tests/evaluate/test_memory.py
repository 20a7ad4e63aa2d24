from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from graphprune import GraphPruneError
from graphprune.evaluate import memory, parameter_bytes, peak_memory, peak_memory_of


def test_weights_and_cache_are_in_the_peak(tmp_path):
    """43 MB of weights; 64 rows of 256 tokens have 67 MB of keys and values in two layers."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=40_000,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    small = peak_memory_of(str(tmp_path / "model"), prompt=8)
    large = peak_memory_of(str(tmp_path / "model"), batch=64, prompt=256)
    cache = 2 * 2 * 64 * 256 * 256 * 4
    assert parameter_bytes(model) < small < 1.5 * parameter_bytes(model)  # the libraries alone are ten times that
    assert cache < large - small < 8 * cache


def test_errors(model, tmp_path, monkeypatch):
    with pytest.raises(GraphPruneError, match=r"could not be measured: .*missing"):
        peak_memory_of(str(tmp_path / "missing"))
    with pytest.raises(GraphPruneError, match="on cpu, where no peak is counted"):
        peak_memory(model)
    with pytest.raises(GraphPruneError, match="at most 512 tokens"):
        peak_memory(model, prompt=513)
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "proc")
    with pytest.raises(GraphPruneError, match="this system does not have"):
        peak_memory_of("model")
