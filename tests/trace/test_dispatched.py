"""Models that accelerate has spread over devices, memory and disk: the same plan and result as in one place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune
from graphprune import GraphPruneError
from graphprune.trace.dispatched import gathered, is_dispatched, main_device
from graphprune.trace.skeleton import names

IDS = torch.randint(0, 40, (6, 12), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": batch} for batch in IDS.split(2)]


def llama(tie: bool = True) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=3, vocab_size=40, tie_word_embeddings=tie, **sizes)
    return LlamaForCausalLM(config).eval()


def in_memory(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, torch.device("cpu"))


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, folder, torch.device("cpu"))


def buffers_too(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)


def by_map(model: nn.Module, folder: Path) -> nn.Module:
    layers: dict[str, Any] = {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    rest: dict[str, Any] = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    return accelerate.dispatch_model(model, {**layers, **rest}, offload_dir=folder, force_hooks=True)


Spread = Callable[[nn.Module, Path], nn.Module]
spreads = pytest.mark.parametrize("spread", [in_memory, on_disk, buffers_too, by_map])


@spreads
@pytest.mark.parametrize("method", ["slimgpt", "ppm", "llm-pruner", "magnitude"])
def test_the_same_plan_as_in_one_place(spread: Spread, method: str, tmp_path: Path) -> None:
    data: dict[str, Any] = {"data": BATCHES, "allocation": "uniform"}
    wanted = graphprune.compile(llama(), 0.3, method=method, **data)
    model = spread(llama(), tmp_path)
    with torch.no_grad():
        before = model(IDS).logits
    small = graphprune.compile(model, 0.3, method=method, **data)
    assert graphprune.report(small).plan == graphprune.report(wanted).plan
    assert graphprune.report(small).oracle_error < 1e-5
    assert not is_dispatched(small)
    with torch.no_grad():
        assert torch.equal(small(IDS).logits, wanted(IDS).logits)
        assert torch.equal(model(IDS).logits, before)
    assert small.lm_head.weight is small.model.embed_tokens.weight  # type: ignore[union-attr]


@spreads
def test_gathering_shares_memory_and_changes_nothing(spread: Spread, tmp_path: Path) -> None:
    model, dense = spread(llama(tie=False), tmp_path), llama(tie=False)
    places = {name: tensor.device for name, tensor in model.state_dict().items()}
    found = gathered(model)
    assert names(found).keys() == names(dense).keys()
    assert all(torch.equal(tensor, names(dense)[name]) for name, tensor in names(found).items())
    assert {name: tensor.device for name, tensor in model.state_dict().items()} == places
    assert is_dispatched(model)
    assert not is_dispatched(found)
    assert all("forward" not in vars(module) for module in found.modules())
    if spread is in_memory:
        again = gathered(model)
        pairs = zip(found.parameters(), again.parameters(), strict=True)
        assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)


def test_what_it_cannot_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match="inplace"):
        graphprune.compile(in_memory(llama(), tmp_path), 0.3, method="magnitude", inplace=True)
    with pytest.raises(GraphPruneError, match="cannot be used here"):
        graphprune.compile(llama(), 0.3, device="nowhere")
    with pytest.raises(GraphPruneError, match="trains where the model is"):
        graphprune.compile(llama(), 0.3, method="loraprune", data=BATCHES, device="cpu")


def test_the_main_device() -> None:
    model = llama()
    assert main_device(model) == torch.device("cpu")
    model.hf_device_map = {"a": "disk", "b": "cpu", "c": "cuda:1", "d": "cuda:0"}  # type: ignore[assignment]
    assert main_device(model) == torch.device("cuda", 1)


def test_inspecting() -> None:
    assert str(graphprune.inspect(accelerate.cpu_offload(llama(), torch.device("cpu")))) == str(
        graphprune.inspect(llama())
    )
