"""Configs that say a size for every layer: in a list, or in ``per_layer_config``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import randomise
from stock_loading import TOKENS, reloaded
from torch import nn

import graphprune
from graphprune.deploy.stock import at, changed, settings_of

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "vocab_size": 96,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}


def step() -> Any:
    """A model that asks the config of its layer for its heads."""
    experts = {"moe_intermediate_size": 16, "share_expert_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    config = transformers.Step3p7TextConfig(
        **SIZES, intermediate_size=48, mlp_layer_types=["dense"] * 3, num_sliding_attention_heads=12, **experts
    )
    return randomise(transformers.Step3p7TextModel(config)).eval()


def gemma() -> Any:
    """A model with a list of widths."""
    config = transformers.Gemma3nTextConfig(
        **{**SIZES, "num_key_value_heads": 8},
        intermediate_size=[40, 48, 56],
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=96,
        laurel_rank=4,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * 3,
    )
    return randomise(transformers.Gemma3nForCausalLM(config)).eval()


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS)[0]


def test_heads_of_every_layer(tmp_path: Path) -> None:
    pruned = graphprune.compile(
        step(), 0.1, method="magnitude", allocation="global", deploy="transformers", include="*.self_attn"
    )
    fields = graphprune.report(pruned).fields or {}
    assert fields
    assert all(name.startswith("per_layer_config.") for name in fields)
    after = [layer.self_attn.k_proj.out_features // SIZES["head_dim"] for layer in pruned.layers]
    assert len(set(after)) > 1
    for number, layer in enumerate(pruned.config.per_layer_config):
        assert layer.num_key_value_heads == after[number]
        assert layer.num_attention_heads == after[number] * (3 if number % 2 else 2)
    assert all(before in (4, 8, 12) for before, _ in fields.values())
    loaded = reloaded(pruned, tmp_path / "model")
    assert torch.equal(output(loaded), output(pruned))
    assert torch.equal(output(graphprune.load(tmp_path / "model")), output(pruned))
    cache = loaded(TOKENS, use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == after


def test_widths_in_a_list(tmp_path: Path) -> None:
    pruned: Any = graphprune.compile(
        gemma(), 0.1, method="magnitude", allocation="global", deploy="transformers", include="*.mlp"
    )
    fields = graphprune.report(pruned).fields or {}
    assert {"intermediate_size.0", "intermediate_size.2"} < fields.keys()
    assert pruned.config.intermediate_size == [layer.mlp.up_proj.out_features for layer in pruned.model.layers]
    assert len(set(pruned.config.intermediate_size)) > 2
    loaded = reloaded(pruned, tmp_path / "model")
    assert torch.equal(output(loaded), output(pruned))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(TOKENS, **options), pruned.generate(TOKENS, **options))


def test_layers_are_numbered_without_zeros() -> None:
    config = transformers.Gemma3nTextConfig(**{**SIZES, "num_hidden_layers": 12, "layer_types": None})
    config.per_layer_config = {11: {"num_key_value_heads": 2}, 3: {"num_key_value_heads": 1}}
    settings = settings_of(config)
    assert at(settings, ("per_layer_config", "3", "num_key_value_heads")) == 1
    assert at(settings, ("per_layer_config", "4", "num_key_value_heads")) is None


@pytest.mark.parametrize("path", [("a", 1), ("per_layer_config", "2", "a"), ("inner", "a")])
def test_changed_settings(path: Any) -> None:
    before = {"a": [1, 2], "inner": {"a": 3}}
    after = changed(before, {path: 7})
    assert at(after, path) == 7
    assert before == {"a": [1, 2], "inner": {"a": 3}}
