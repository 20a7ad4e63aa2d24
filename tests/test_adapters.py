"""Models with adapters of peft: pruned then merged must be merged then pruned, whatever the adapter and the model."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import graphprune
from graphprune.ir.plan import Plan
from graphprune.trace.skeleton import names
from tests.helpers import numel, quick, randomise, snapshot

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "bert": {**SMALL, "intermediate_size": 48, "max_position_embeddings": 64},
    "falcon": {**SMALL, "num_kv_heads": 2, "new_decoder_architecture": True},  # q, k and v in one weight
}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **MODELS[kind])
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    return randomise(auto.from_config(config).eval())


def adapted(model: nn.Module, **options: Any) -> PeftModel:
    settings = {"r": 5, "lora_alpha": 7, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return get_peft_model(copy.deepcopy(model), LoraConfig(**settings)).eval()


def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=tokens).logits


def check_merged(model: PeftModel, ratio: float = 0.3, **options: Any) -> tuple[nn.Module, Plan]:
    """Prune with adapters and merge; merge and replay the plan: both are the same model."""
    restored = snapshot(model)
    pruned = graphprune.compile(model, ratio, method="magnitude", **options)
    restored()
    assert type(pruned) is type(model)
    plan = graphprune.report(pruned).plan
    assert not any("lora_" in name for name in plan.keep)
    first = copy.deepcopy(pruned).merge_and_unload().eval()
    second = graphprune.compile(copy.deepcopy(model).merge_and_unload().eval(), plan=plan)
    assert {n: t.shape for n, t in names(first).items()} == {n: t.shape for n, t in names(second).items()}
    found, wanted = logits(first), logits(second)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (logits(pruned) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    return pruned, plan


@pytest.mark.parametrize("kind", quick(MODELS, {"gpt2", "mixtral", "falcon"}))
def test_pruned_then_merged_is_merged_then_pruned(kind: str) -> None:
    model = adapted(model_of(kind))
    pruned, _ = check_merged(model)
    ranks = [{n: t.shape[0] for n, t in m.named_parameters() if "lora_A" in n} for m in (model, pruned)]
    assert ranks[0]
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_width(kind: str) -> None:
    check_merged(adapted(model_of(kind)), 0.4, width=True, include="*embed*" if kind == "llama" else "*wte")


KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "biases": {"bias": "lora_only"},
}


@pytest.mark.parametrize(
    ("kind", "lora"),
    quick(
        itertools.product(("llama", "gpt2"), KINDS),
        {("llama", "rslora"), ("llama", "dora"), ("gpt2", "dora"), ("gpt2", "biases")},
    ),
)
def test_kinds_of_lora(kind: str, lora: str) -> None:
    model = adapted(model_of(kind), **KINDS[lora])
    for name, tensor in model.named_parameters():
        if "magnitude" in name:
            tensor.data *= torch.linspace(0.5, 1.5, len(tensor))
    check_merged(model)


def test_embeddings() -> None:
    model = adapted(model_of("llama"), target_modules=["embed_tokens", "down_proj", "up_proj", "lm_head"])
    pruned, _ = check_merged(model, width=True)
    assert pruned.get_input_embeddings().lora_embedding_A["default"].shape == (5, 97)


def test_several_adapters_of_which_one_is_active() -> None:
    model = adapted(model_of("llama"))
    other = {"target_modules": ["gate_proj", "down_proj", "q_proj"], "init_lora_weights": False}
    model.add_adapter("other", LoraConfig(r=3, **other))
    pruned, plan = check_merged(model)
    assert pruned.active_adapters == ["default"]
    model.set_adapter("other")
    pruned.set_adapter("other")
    merged = graphprune.compile(copy.deepcopy(model).merge_and_unload().eval(), plan=plan)
    torch.testing.assert_close(logits(pruned), logits(merged), rtol=1e-5, atol=1e-5)
    pruned.add_adapter("third", LoraConfig(r=2, **other))  # made for the sizes that the layers have now
    pruned.set_adapter("third")
    assert logits(pruned).isfinite().all()


def test_modules_to_save_follow_with_their_original() -> None:
    model = adapted(model_of("llama"), target_modules=["q_proj"], modules_to_save=["mlp"])
    for name, tensor in model.named_parameters():
        if "modules_to_save" in name:
            tensor.data *= 1.5
    pruned, plan = check_merged(model)
    with pruned.disable_adapter():
        found = logits(pruned)
    torch.testing.assert_close(found, logits(graphprune.compile(model_of("llama"), plan=plan)), rtol=1e-5, atol=1e-5)


def test_adapters_of_transformers_itself() -> None:
    model = model_of("llama")
    model.add_adapter(LoraConfig(r=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    plain, plan = logits(model), None
    pruned = graphprune.compile(model, 0.2, method="magnitude")
    assert numel(pruned) < numel(model)
    assert torch.equal(plain, logits(model))
    plan = graphprune.report(pruned).plan
    assert "model.layers.0.mlp.gate_proj.weight[0]" in plan.keep


def test_the_plan_of_the_model_without_adapters_holds_with_them() -> None:
    model = model_of("llama")
    plan = graphprune.report(graphprune.compile(model, 0.2, method="magnitude")).plan
    pruned = graphprune.compile(adapted(model), plan=plan)
    assert pruned.base_model.model.model.layers[0].mlp.down_proj.lora_A["default"].in_features < 48


def test_an_adapter_is_saved_and_loaded_by_peft(tmp_path: Path) -> None:
    model = adapted(model_of("llama"))
    pruned, plan = check_merged(model)
    pruned.save_pretrained(tmp_path)
    base = graphprune.compile(copy.deepcopy(model).unload().eval(), plan=plan)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert torch.equal(logits(loaded), logits(pruned))


def test_an_adapter_follows_the_plan_of_its_model(tmp_path: Path) -> None:
    model = model_of("llama")
    trained = adapted(model)
    trained.save_pretrained(tmp_path / "trained")
    pruned = graphprune.compile(model, 0.2, method="magnitude")
    restored = snapshot(model)
    written = graphprune.apply(graphprune.report(pruned).plan, tmp_path / "trained", base=model)
    restored()
    assert written == tmp_path / "trained-pruned"
    loaded = PeftModel.from_pretrained(pruned, str(written)).eval()
    expected = graphprune.compile(trained.merge_and_unload().eval(), plan=graphprune.report(pruned).plan)
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-5, atol=1e-5)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    plan = graphprune.report(graphprune.compile(model, 0.2, method="magnitude")).plan
    with pytest.raises(graphprune.GraphPruneError, match="is no adapter of peft"):
        graphprune.apply(plan, tmp_path, tmp_path / "out", base=model)
    adapted(model).save_pretrained(tmp_path)
    with pytest.raises(graphprune.GraphPruneError, match="does not say which model"):
        graphprune.apply(plan, tmp_path, tmp_path / "out")
    with pytest.raises(graphprune.GraphPruneError, match="is no adapter of this GPT2"):
        graphprune.apply(plan, tmp_path, tmp_path / "out", base=model_of("gpt2"))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(graphprune.GraphPruneError, match="pickled weights are not read"):
        graphprune.apply(plan, tmp_path, tmp_path / "out", base=model)
    assert not (tmp_path / "out").exists()


def test_a_merged_adapter_is_refused() -> None:
    model = adapted(model_of("llama"))
    model.merge_adapter()
    with pytest.raises(graphprune.GraphPruneError, match="is merged into"):
        graphprune.compile(model, 0.2, method="magnitude")


def test_convolutions() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 5, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).relu())

    x = torch.randn(2, 3, 7, 7)
    model = adapted(randomise(Net().eval()), target_modules=["first", "second"], r=4)
    pruned = graphprune.compile(model, 0.3, method="magnitude", example_inputs=(x,))
    plan = graphprune.report(pruned).plan
    merged = graphprune.compile(copy.deepcopy(model).merge_and_unload(), plan=plan, example_inputs=(x,))
    assert numel(copy.deepcopy(pruned).merge_and_unload()) == numel(merged) < numel(copy.deepcopy(model).unload())
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), merged(x), rtol=1e-5, atol=1e-5)


def test_the_slices_that_run_last_are_those_of_the_weight_and_its_adapter() -> None:
    """An adapter that does nothing yet says nothing: its model is pruned as the one without."""
    model, data = model_of("llama"), torch.randint(0, 97, (4, 8), generator=torch.Generator().manual_seed(3))
    options = {"method": "llm-pruner", "data": data, "include": "*.mlp"}
    plain = graphprune.report(graphprune.compile(model, 0.1, **options)).plan
    fresh = adapted(model, init_lora_weights=True)
    assert graphprune.report(graphprune.compile(fresh, 0.1, merge=True, **options)).plan.keep == plain.keep


@pytest.mark.parametrize(
    ("kind", "method"),
    quick(
        itertools.product(("llama", "gpt2"), ("ppm", "flap", "slimgpt", "taylor-mixed")),
        {("llama", "ppm"), ("llama", "flap"), ("gpt2", "slimgpt"), ("gpt2", "taylor-mixed")},
    ),
)
def test_methods_with_data(kind: str, method: str) -> None:
    data = torch.randint(0, 97, (8, 8), generator=torch.Generator().manual_seed(3))
    pruned = graphprune.compile(adapted(model_of(kind)), 0.2, method=method, data=data)
    found = logits(pruned)
    merged = logits(pruned.merge_and_unload().eval())
    assert (found - merged).abs().max() <= 1e-5 * merged.abs().max()


@pytest.mark.parametrize(
    ("kind", "method"),
    quick(
        itertools.product(("llama", "gpt2"), ("l2", "peak-to-peak", "taylor-mixed", "flap-wifn")),
        {("gpt2", "l2"), ("llama", "peak-to-peak"), ("llama", "taylor-mixed"), ("gpt2", "flap-wifn")},
    ),
)
def test_weights_are_scored_as_they_are_when_merged(kind: str, method: str) -> None:
    model, data = adapted(model_of(kind)), torch.randint(0, 97, (4, 8), generator=torch.Generator().manual_seed(3))
    merged = copy.deepcopy(model).merge_and_unload().eval()
    options = {"method": method, "data": data, "merge": True}
    found, expected = (graphprune.report(graphprune.compile(m, 0.2, **options)).plan for m in (model, merged))
    assert found.keep == expected.keep
