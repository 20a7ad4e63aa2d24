"""Small random models, pruned freely, with other widths in every layer, or for stock transformers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from helpers import randomise
from torch import nn

import graphprune

WORDS = 96
TOKENS = torch.arange(34).reshape(2, 17) * 7 % WORDS
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": WORDS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IMAGE = {**_SIZES, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


def llama_config(**changes: Any) -> Any:
    return transformers.LlamaConfig(**{**_SIZES, "num_key_value_heads": 4, **changes})


def _dense(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        config.bos_token_id, config.eos_token_id = 1, 2
        return transformers.GPT2LMHeadModel(config)
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**_SIZES))
    if name == "vit":
        return transformers.ViTForImageClassification(transformers.ViTConfig(**_IMAGE, num_labels=3))
    if name == "classifier":
        return transformers.LlamaForSequenceClassification(llama_config(num_labels=3))
    return transformers.LlamaForCausalLM(llama_config())


_OPTIONS: dict[str, dict[str, Any]] = {
    # Heads and channels go from the last block alone, so that no two layers are alike.
    "free": {"skip_first": 1, "ratio": 0.25, "allocation": "global"},
    "stock": {"deploy": "transformers", "ratio": 0.2},
    "gpt2": {"skip_first": 1, "ratio": 0.15, "include": ["*.attn", "*.mlp"]},
    "classifier": {"skip_first": 1, "ratio": 0.2},
}
CAUSAL = ("free", "stock", "gpt2")
ALL = (*CAUSAL, "bert", "vit", "classifier")


@cache
def pruned(name: str) -> Any:
    """A pruned model in eval mode, made once: not to be changed by tests, :func:`fresh` is."""
    options = {"ratio": 0.2, **_OPTIONS.get(name, {})}
    model = randomise(_dense(name)).eval()
    return graphprune.compile(model, options.pop("ratio"), method="magnitude", verify=False, **options)


def fresh(name: str) -> Any:
    """A copy to change."""
    import copy

    return copy.deepcopy(pruned(name))


def example(name: str) -> dict[str, torch.Tensor]:
    return {"pixel_values": IMAGES} if name == "vit" else {"input_ids": TOKENS}


def logits(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**example(name)).logits
