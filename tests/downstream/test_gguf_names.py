"""Folders for stock transformers are what converters and loaders of GGUF (llama.cpp, vLLM) expect.

The converter here does what llama.cpp's does for these architectures: it reads config.json and the weight files, and
nothing else. Names come from the package gguf.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from deploy.models import CASES
from safetensors.torch import load_file
from torch import nn

import graphprune

gguf = pytest.importorskip("gguf")

TOKENS = torch.arange(34).reshape(2, 17) * 7 % 96


@dataclass(frozen=True)
class Format:
    """What a GGUF file of an architecture has otherwise than transformers.

    ``turned``: halves of heads of queries and keys are interleaved. ``more``: what is added to the weights of norms.
    ``says_heads``: whether transformers reads the width of a head from it.
    """

    arch: Any
    turned: bool = False
    more: float = 0.0
    says_heads: bool = False


FORMATS = {
    "llama": Format(gguf.MODEL_ARCH.LLAMA, turned=True, says_heads=True),
    "mistral": Format(gguf.MODEL_ARCH.LLAMA, turned=True, says_heads=True),
    "qwen2": Format(gguf.MODEL_ARCH.QWEN2),
    "qwen3": Format(gguf.MODEL_ARCH.QWEN3),
    "gemma2": Format(gguf.MODEL_ARCH.GEMMA2, more=1.0, says_heads=True),
    "gemma3": Format(gguf.MODEL_ARCH.GEMMA3, more=1.0, says_heads=True),
}


def convert(folder: Path, path: Path, form: Format) -> None:
    """Write a GGUF file of what is in a folder."""
    config = json.loads((folder / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[form.arch])
    writer.add_name("pruned")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    names = gguf.get_tensor_name_map(form.arch, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert to is not None, f"GGUF has no name for {name}"
        if form.turned and ".q_proj." in name:
            tensor = turned(tensor, heads)
        elif form.turned and ".k_proj." in name:
            tensor = turned(tensor, groups)
        writer.add_tensor(to, (tensor + form.more if name.endswith("norm.weight") else tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def turned(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """First and second halves of every head, one by one in turns."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape).contiguous()


def value(reader: Any, key: str) -> Any:
    return reader.fields[f"{reader.fields['general.architecture'].contents()}.{key}"].contents()


@pytest.fixture(scope="module")
def pruned() -> dict[str, Any]:
    """Not to be changed by tests."""
    made = {}
    for name in FORMATS:
        case = CASES[name]
        model = case.build()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("norm.weight"):  # so that adding one and taking it away again loses nothing
                    parameter.copy_((parameter * 1024).round() / 1024)
        options = {**case.options, "method": "magnitude", "deploy": "transformers", "verify": False}
        made[name] = graphprune.compile(model, case.ratio, **options)
    return made


@pytest.fixture(scope="module")
def folder(pruned: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model as a folder and as a GGUF file beside it."""
    folder = tmp_path_factory.mktemp("converted")
    for name, model in pruned.items():
        graphprune.save(model, folder / name)
        convert(folder / name, folder / f"{name}.gguf", FORMATS[name])
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_every_tensor_has_the_shape_that_the_metadata_say(folder: Path, name: str) -> None:
    """What llama.cpp checks when it loads a file. Sizes are the other way round there: those of the input first."""
    reader = gguf.GGUFReader(folder / f"{name}.gguf")
    wide, ffn = value(reader, "embedding_length"), value(reader, "feed_forward_length")
    heads = value(reader, "attention.head_count") * value(reader, "attention.key_length")
    groups = value(reader, "attention.head_count_kv") * value(reader, "attention.key_length")
    tokens = value(reader, "vocab_size")
    blocks: dict[str, list[int]] = {
        "attn_q.weight": [wide, heads],
        "attn_k.weight": [wide, groups],
        "attn_v.weight": [wide, groups],
        "attn_output.weight": [heads, wide],
        "ffn_gate.weight": [wide, ffn],
        "ffn_up.weight": [wide, ffn],
        "ffn_down.weight": [ffn, wide],
        "attn_norm.weight": [wide],
        "ffn_norm.weight": [wide],
    }
    extra = {"attn_q.bias": [heads], "attn_k.bias": [groups], "attn_v.bias": [groups]}
    key = [value(reader, "attention.key_length")]
    extra |= {"attn_q_norm.weight": key, "attn_k_norm.weight": key}
    extra |= {"post_attention_norm.weight": [wide], "post_ffw_norm.weight": [wide]}
    wanted = {"token_embd.weight": [wide, tokens], "output_norm.weight": [wide], "output.weight": [wide, tokens]}
    found = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    for number in range(value(reader, "block_count")):
        wanted |= {f"blk.{number}.{part}": shape for part, shape in {**blocks, **extra}.items()}
        assert {f"blk.{number}.{part}" for part in blocks} <= found.keys()
    assert {one: wanted.get(one) for one in found} == found
    config = json.loads((folder / name / "config.json").read_text())
    assert (value(reader, "feed_forward_length"), value(reader, "block_count")) == (config["intermediate_size"], 2)


@pytest.mark.parametrize("name", FORMATS)
def test_transformers_reads_the_same_back(pruned: dict[str, Any], folder: Path, name: str) -> None:
    """Bit by bit. Where its reader looks for no width of heads, it is told."""
    model = pruned[name]
    more = {} if FORMATS[name].says_heads else {"config": model.config}
    kind = type(model)
    read, info = kind.from_pretrained(
        folder, gguf_file=f"{name}.gguf", dtype=torch.float32, output_loading_info=True, **more
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    for field in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert getattr(read.config, field) == getattr(model.config, field), field
    expected = dict(model.named_parameters())
    for key, parameter in read.named_parameters():
        assert torch.equal(parameter, expected[key]), key
    with torch.no_grad():
        if name not in ("gemma2", "gemma3"):  # their scale of queries is in no GGUF file
            assert torch.equal(read(TOKENS).logits, model(TOKENS).logits)


def test_the_table_of_widths_per_head(pruned: dict[str, Any]) -> None:
    """Heads that are fewer but as wide as before: only a head_dim of its own says that."""
    config = pruned["qwen2"].config
    assert config.head_dim * config.num_attention_heads != config.hidden_size
    assert isinstance(pruned["qwen2"], transformers.PreTrainedModel)
