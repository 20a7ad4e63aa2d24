"""Real architectures with small random configs: nothing in the package is written for any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import check_every_axis, look, numel, quick, randomise, snapshot
from torch import nn

import graphprune

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 211,
}


def _hf(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return make


class ConvNet(nn.Module):
    """Batch norm, groups, a residual, and a linear behind flattened channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.grouped = nn.Conv2d(32, 48, 3, padding=1, groups=4)
        self.norm2 = nn.BatchNorm2d(48)
        self.back = nn.Conv2d(48, 32, 1)
        self.down = nn.Conv2d(32, 40, 3, stride=2)
        self.head = nn.Sequential(nn.Linear(40 * 4, 60), nn.ReLU(), nn.Linear(60, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.back(F.relu(self.norm2(self.grouped(x))))
        x = F.adaptive_avg_pool2d(F.relu(self.down(x)), 2)
        return self.head(x.flatten(1))


CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "gpt2": _hf("GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=2, n_head=4, vocab_size=211, n_positions=64),
    "opt": _hf(
        "OPTForCausalLM",
        "OPTConfig",
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=211,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
    ),
    "bloom": _hf("BloomForCausalLM", "BloomConfig", hidden_size=64, n_layer=2, n_head=4, vocab_size=211),
    "falcon_multi_query": _hf(
        "FalconForCausalLM",
        "FalconConfig",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=211,
        max_position_embeddings=64,
    ),
    "falcon_new_decoder": _hf(
        "FalconForCausalLM",
        "FalconConfig",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_kv_heads=2,
        new_decoder_architecture=True,
        vocab_size=211,
        max_position_embeddings=64,
    ),
    "falcon_alibi": _hf(
        "FalconForCausalLM",
        "FalconConfig",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=True,
        multi_query=False,
        vocab_size=211,
    ),
    "gpt_neox": _hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **_SIZES),
    "phi3": _hf("Phi3ForCausalLM", "Phi3Config", num_key_value_heads=4, pad_token_id=0, **_SIZES),
    "qwen3": _hf("Qwen3ForCausalLM", "Qwen3Config", num_key_value_heads=4, head_dim=16, **_SIZES),
    "gemma3": _hf("Gemma3ForCausalLM", "Gemma3TextConfig", num_key_value_heads=4, head_dim=16, **_SIZES),
    "llama_grouped_query": _hf("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=4, **_SIZES),
    "llama_tied": _hf("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=8, tie_word_embeddings=True, **_SIZES),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "bert": _hf("BertForMaskedLM", "BertConfig", **_SIZES),
    "vit": _hf(
        "ViTForImageClassification",
        "ViTConfig",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    ),
    "t5": _hf(
        "T5ForConditionalGeneration",
        "T5Config",
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        vocab_size=211,
        decoder_start_token_id=0,
    ),
    "convnet": ConvNet,
}
ALL = CAUSAL | OTHERS
# Of every kind: how q, k and v lie in their weights, gates or none, tied or not, encoders, images.
FEW_CAUSAL = {"gpt2", "falcon_multi_query", "gpt_neox", "phi3", "gemma3", "llama_tied"}
FEW = FEW_CAUSAL | {"t5", "vit", "convnet"}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(ALL[name]()).eval()


def example(name: str) -> Any:
    """Inputs to give; None where they are found by themselves."""
    return torch.randn(3, 3, 12, 12) if name == "convnet" else None


def run(name: str, model: nn.Module) -> torch.Tensor:
    """A forward in the model's present mode, reduced to one number with a gradient."""
    if name == "convnet":
        return model(torch.randn(3, 3, 12, 12)).pow(2).mean()
    if name == "vit":
        return model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss
    ids = torch.randint(0, 211, (2, 9))
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("name", quick(ALL, FEW), ids=str)
def test_compile(name: str) -> None:
    model = build(name)
    unchanged = snapshot(model)
    pruned = graphprune.compile(model, 0.25, method="magnitude", example_inputs=example(name))
    unchanged()
    report = graphprune.report(pruned)
    assert type(pruned) is type(model)
    assert report.oracle_error is not None
    assert report.oracle_error <= 1e-4
    assert report.ratio == pytest.approx(0.25, abs=0.01)
    assert numel(pruned) == report.parameters_after == numel(model) - round(report.ratio * numel(model))
    assert not any(parameter.is_meta for parameter in pruned.parameters())
    loss = run(name, pruned.train())
    loss.backward()
    assert torch.isfinite(loss)
    used = [p for p in pruned.parameters() if p.grad is not None]
    assert all(p.grad.shape == p.shape for p in used)
    assert len(used) == len([p for p in _with_gradients(name, model) if p is not None])


def _with_gradients(name: str, model: nn.Module) -> list[torch.Tensor | None]:
    run(name, model.train()).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("name", quick(CAUSAL, FEW_CAUSAL), ids=str)
def test_generate_with_cache_equals_without(name: str) -> None:
    pruned = graphprune.compile(build(name), 0.25, method="magnitude")
    ids = torch.randint(3, 200, (2, 7))
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    cached = pruned.generate(ids, use_cache=True, **options)
    plain = pruned.generate(ids, use_cache=False, **options)
    assert cached.shape == (2, 15)
    assert torch.equal(cached, plain)


# What must be found prunable in block 1, from the graph alone: shares of the name and the size of the axis.
EXPECTED: dict[str, list[tuple[str, int]]] = {
    "gpt2": [("c_attn", 4), ("c_fc", 96 + 160)],
    "opt": [("fc1", 96)],
    "bloom": [("dense_h_to_4h", 256)],
    "falcon_multi_query": [("dense_h_to_4h", 256)],
    "falcon_new_decoder": [("dense_h_to_4h", 256)],
    "falcon_alibi": [("dense_h_to_4h", 256)],
    "gpt_neox": [("query_key_value", 8), ("dense_h_to_4h", 96)],
    "phi3": [("qkv_proj", 4), ("gate_up_proj", 96)],
    "qwen3": [("q_proj", 4), ("gate_proj", 96)],
    "gemma3": [("q_proj", 4), ("gate_proj", 96)],
    "llama_grouped_query": [("q_proj", 4), ("gate_proj", 96)],
    "llama_tied": [("q_proj", 8), ("gate_proj", 96)],
    "bert": [("query", 8), ("intermediate", 96)],
    "vit": [("q_proj", 4), ("fc1", 96)],
    "t5": [("wi", 96)],
    "convnet": [("stem", 4), ("grouped", 12), ("down", 40), ("head", 60)],
}


@pytest.mark.parametrize("name", quick(ALL, FEW), ids=str)
def test_every_axis_by_itself(name: str) -> None:
    model = build(name)
    found = look(model, example(name))
    checked = check_every_axis(model, example(name))
    assert checked == [group.name for group in found.prunable]
    assert not found.unruled
    for part, size in EXPECTED[name]:
        assert any(part in str(m) and g.size == size for g in found.prunable for m in g.members), (part, size)


def test_query_heads_of_a_key_value_group_stay_together() -> None:
    pruned = graphprune.compile(build("llama_grouped_query"), 0.25, method="magnitude")
    for layer in pruned.model.layers:
        attention = layer.self_attn
        kv = attention.k_proj.out_features // 8
        assert 1 <= kv < 4
        assert attention.q_proj.out_features == 2 * kv * 8
        assert attention.num_key_value_groups == 2
