"""Small random checkpoints on disk, as transformers writes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**changes: Any) -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes}))


def tied() -> transformers.PreTrainedModel:
    return llama(tie_word_embeddings=True)


def qwen2() -> transformers.PreTrainedModel:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES))


def gpt2() -> transformers.PreTrainedModel:
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))


def mixtral() -> transformers.PreTrainedModel:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))


def checkpoint(folder: Path, model: transformers.PreTrainedModel, shard: str = "5GB") -> Path:
    """``model`` in ``folder``, in bfloat16 with weights that are all different."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.1)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Every file of a folder by its content, graphprune.json without times and what was proven."""
    found = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        if path.name == "graphprune.json":
            data = json.loads(content)
            del data["sha256"]
            for report in data["reports"]:
                for key in ("seconds", "total_seconds", "oracle_error"):
                    del report[key]
            content = json.dumps(data).encode()
        found[path.name] = hashlib.sha256(content).hexdigest()
    return found
