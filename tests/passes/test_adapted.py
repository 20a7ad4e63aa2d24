"""The trainable view: parts, gates, and LoRAPrune's scores against Eq. 9 and 10 written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import graphprune
from graphprune.compiler import _program
from graphprune.ir.program import Options, Program
from graphprune.passes import pipelines, run_passes
from graphprune.passes.adapted import Adapted
from graphprune.passes.guided_scores import guided_scores
from graphprune.passes.score.loss import calibration_loss
from tests.helpers import plan_removing, randomise

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(1))


def plain(kind: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = AutoConfig.for_model("gpt2", vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    else:
        config = AutoConfig.for_model("llama", **SIZES, intermediate_size=48, num_key_value_heads=2)
    return randomise(AutoModelForCausalLM.from_config(config).eval())


def adapted(kind: str = "llama", **options: Any) -> tuple[Program, Adapted]:
    settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "init_lora_weights": False, **options}
    model = get_peft_model(plain(kind), LoraConfig(**settings)).eval()
    program = _program(model, Options(), None)
    run_passes(program, pipelines.ANALYSE)
    return program, Adapted(program)


def with_gradients(view: Adapted) -> None:
    calibration_loss(view.model, {"input_ids": TOKENS}, 0).backward()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_are_equations_9_and_10(kind: str) -> None:
    program, view = adapted(kind)
    with_gradients(view)
    found = guided_scores(view)
    assert set(found) == {group.name for group in program.need("prunable")}
    for name, parts in view.parts.items():
        expected = torch.zeros(len(found[name]))
        for part in parts:
            layer = part.layer
            a, b, s = layer.reader.weight.detach(), layer.writer.weight.detach(), 5 / 3
            of_a, of_b = layer.reader.weight.grad, layer.writer.weight.grad
            weight = layer.base.weight.detach().T if kind == "gpt2" else layer.base.weight.detach()
            gradient = s * (of_b @ a + b @ of_a - of_b @ of_a)
            importance = (gradient * (weight + s * b @ a)) ** 2
            one = torch.zeros(len(expected))
            for index, owned in enumerate(part.blocks.tolist()):
                one[index] = importance[:, owned].sum() if part.reads else importance[owned].sum()
            expected += one / one.norm()
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


def test_every_structure_knows_its_trainable_rows_and_columns() -> None:
    _, view = adapted()
    parts = {(p.layer.path.rsplit(".", 1)[1], p.reads) for p in view.parts["model.layers.0.mlp.gate_proj.weight[0]"]}
    assert parts == {("gate_proj", False), ("up_proj", False), ("down_proj", True)}
    heads = view.parts["model.layers.0.self_attn.q_proj.weight[0].0"]
    blocks = {p.layer.path.rsplit(".", 1)[1]: p.blocks for p in heads}
    assert blocks["k_proj"].tolist() == [list(range(8)), list(range(8, 16))]
    assert blocks["q_proj"].tolist() == [list(range(16)), list(range(16, 32))]  # both query heads of a key head


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_gate_of_zero_removes_the_structure(kind: str) -> None:
    program, view = adapted(kind)
    model = program.model
    gone = {name: (len(gates), [1]) for name, gates in view.gates.items()}
    for gates in view.gates.values():
        gates[1] = 0
    pruned = graphprune.compile(model, plan=plan_removing(gone))
    with torch.no_grad():
        found, expected = pruned(input_ids=TOKENS).logits, view.model(input_ids=TOKENS).logits
        dense = model(input_ids=TOKENS).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - dense).abs().max() > 1e-2 * expected.abs().max()


def test_only_adapters_train_and_they_are_copies() -> None:
    program, view = adapted()
    held = dict(program.model.named_parameters())
    assert {name for name in held if "lora_" in name} == set(view.trainable())
    for name, parameter in view.model.named_parameters():
        shared = parameter.data_ptr() == held[name].data_ptr()
        assert shared != parameter.requires_grad
    next(iter(view.trainable().values())).data.zero_()
    view.hand_over()
    name = next(iter(view.trainable()))
    assert program.weight(held[name]).abs().max() == 0
    assert held[name].abs().max() > 0


def test_no_gradient_of_a_frozen_weight_is_made() -> None:
    _, view = adapted()
    with_gradients(view)
    assert all(p.grad is None for p in view.model.parameters() if not p.requires_grad)


def test_a_model_without_layers_to_adapt_is_refused() -> None:
    program = _program(nn.Sequential(nn.Conv1d(3, 8, 1), nn.Conv1d(8, 2, 1)), Options(), (torch.randn(2, 3, 5),))
    run_passes(program, (*pipelines.ANALYSE,))
    with pytest.raises(graphprune.GraphPruneError, match="no LoRA layers to train"):
        Adapted(program)
