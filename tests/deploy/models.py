"""Small random models of real architectures, whose configs say their sizes in as many ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from helpers import randomise
from torch import nn

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 4}
_WIDE = {**_GROUPED, "head_dim": 8}
_OLD = {key: value for key, value in _SIZES.items() if key != "max_position_embeddings"}


@dataclass
class Case:
    """A model, what loads it, and what pruning by ``ratio`` with ``options`` changes in its config."""

    model: str
    config: str
    settings: dict[str, Any]
    auto: str
    changes: dict[str, tuple[int | None, int]]
    ratio: float = 0.2
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        made: Callable[[Any], nn.Module] = getattr(transformers, self.model)
        return randomise(made(getattr(transformers, self.config)(**self.settings))).eval()

    @property
    def generates(self) -> bool:
        return self.auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


def _causal(name: str, settings: dict[str, Any], changes: Any, ratio: float = 0.2, **options: Any) -> Case:
    text = "Text" if name.endswith("3") and name.startswith("Gemma") else ""
    return Case(f"{name}ForCausalLM", f"{name}{text}Config", settings, "AutoModelForCausalLM", changes, ratio, options)


CASES: dict[str, Case] = {
    "llama": _causal("Llama", _GROUPED, {"intermediate_size": (48, 15)}, 0.3),
    "llama_width": _causal(
        "Llama",
        {**_GROUPED, "tie_word_embeddings": True},
        {
            "hidden_size": (32, 20),
            "intermediate_size": (48, 30),
            "num_attention_heads": (8, 4),
            "num_key_value_heads": (4, 2),
        },
        0.6,
        width=True,
    ),
    "llama_heads": _causal(
        "Llama", _GROUPED, {"num_attention_heads": (8, 4), "num_key_value_heads": (4, 2)}, 0.15, include="*.self_attn"
    ),
    "qwen2": _causal(
        "Qwen2",
        _GROUPED,
        {
            "head_dim": (None, 4),
            "intermediate_size": (48, 34),
            "num_attention_heads": (8, 6),
            "num_key_value_heads": (4, 3),
        },
    ),
    "qwen3": _causal(
        "Qwen3", _WIDE, {"intermediate_size": (48, 35), "num_attention_heads": (8, 6), "num_key_value_heads": (4, 3)}
    ),
    "mistral": _causal(
        "Mistral", _WIDE, {"intermediate_size": (48, 36), "num_attention_heads": (8, 6), "num_key_value_heads": (4, 3)}
    ),
    "gemma2": _causal("Gemma2", _WIDE, {"intermediate_size": (48, 23)}),
    "gemma3": _causal("Gemma3", _WIDE, {"intermediate_size": (48, 23)}),
    "phi3": _causal(
        "Phi3",
        _GROUPED,
        {
            "head_dim": (None, 4),
            "intermediate_size": (48, 34),
            "num_attention_heads": (8, 6),
            "num_key_value_heads": (4, 3),
        },
    ),
    "gpt2": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "vocab_size": 96,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "AutoModelForCausalLM",
        {"n_inner": (None, 81)},
    ),
    "gpt2_width": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 8,
            "n_positions": 64,
            "vocab_size": 96,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "AutoModelForCausalLM",
        {"n_inner": (None, 97), "n_embd": (32, 24), "n_head": (8, 6)},
        0.4,
        {"width": True},
    ),
    "gpt_neox": _causal("GPTNeoX", _SIZES, {"intermediate_size": (48, 16)}),
    "opt": _causal("OPT", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, {"ffn_dim": (48, 17)}),
    "falcon": _causal(
        "Falcon", {**_SIZES, "num_kv_heads": 2, "new_decoder_architecture": True}, {"ffn_hidden_size": (128, 90)}
    ),
    "mixtral": _causal(
        "Mixtral",
        {**_WIDE, "num_local_experts": 4},
        {"intermediate_size": (48, 40), "num_attention_heads": (8, 6), "num_key_value_heads": (4, 3)},
    ),
    "mixtral_experts": _causal(
        "Mixtral",
        {**_WIDE, "num_local_experts": 4},
        {
            "intermediate_size": (48, 44),
            "num_attention_heads": (8, 6),
            "num_key_value_heads": (4, 3),
            "num_local_experts": (4, 3),
        },
        0.3,
        experts=True,
    ),
    "bert": Case("BertForMaskedLM", "BertConfig", _SIZES, "AutoModelForMaskedLM", {"intermediate_size": (48, 15)}),
    "t5": Case(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 8,
            "vocab_size": 96,
            "decoder_start_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        "AutoModelForSeq2SeqLM",
        {"d_ff": (48, 22), "num_heads": (8, 7)},
    ),
    "vit": Case(
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        "AutoModelForImageClassification",
        {"head_dim": (None, 8), "intermediate_size": (48, 31), "num_attention_heads": (4, 3)},
    ),
}
