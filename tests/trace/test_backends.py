"""Whatever implementation of attention or experts the user has set, the plan is the same and the setting stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers import quick, randomise, snapshot
from test_architectures import CAUSAL, OTHERS, build
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.moe import ExpertsInterface

import graphprune
from graphprune.trace import backends
from graphprune.trace.backends import ATTENTION, EXPERTS, use_portable
from graphprune.trace.skeleton import copy_structure

NAMES = ["gpt2", "opt", "bloom", "falcon_multi_query", "gpt_neox", "qwen3", "llama_grouped_query", "bert", "vit", "t5"]


def with_setting(model: Any, name: str, value: str) -> Any:
    """Straight into the config: transformers itself refuses what is not installed."""
    for config in backends._configs(model):
        vars(config)[name] = value
    return model


def plan(model: nn.Module) -> tuple[dict[str, int], set[str]]:
    found = graphprune.inspect(model)
    return {group.name: group.size for group in found.prunable}, set(found.skipped)


@pytest.mark.parametrize("name", quick(NAMES, {"gpt2", "bloom", "falcon_multi_query", "qwen3", "vit", "t5"}))
def test_attention_does_not_change_the_plan(name: str) -> None:
    """Not so for Falcon with ALiBi: only sdpa derives its scale from the width of a head, which pins that width."""
    assert name in CAUSAL or name in OTHERS
    sdpa = plan(with_setting(build(name), ATTENTION, "sdpa"))
    assert plan(with_setting(build(name), ATTENTION, "eager")) == sdpa
    assert plan(with_setting(build(name), ATTENTION, "flash_attention_2")) == sdpa


@pytest.mark.parametrize(
    "setting", ["flash_attention_2", "flex_attention", "paged|eager", "kernels-community/flash-attn"]
)
def test_a_setting_that_cannot_run_here_stays(setting: str) -> None:
    model = with_setting(build("llama_grouped_query"), ATTENTION, setting)
    unchanged = snapshot(model)
    pruned: Any = graphprune.compile(model, 0.2)
    unchanged()
    assert model.config._attn_implementation == pruned.config._attn_implementation == setting
    assert all(vars(config)[ATTENTION] == setting for config in backends._configs(pruned))
    assert graphprune.report(pruned).oracle_error is not None


def mixture(setting: str) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MixtralConfig(vocab_size=61, num_key_value_heads=2, num_local_experts=4, **sizes)
    torch.manual_seed(0)
    return with_setting(randomise(transformers.MixtralForCausalLM(config)).eval(), EXPERTS, setting)


@pytest.mark.parametrize("setting", ["eager", "batched_mm", "grouped_mm", "deepgemm", "sonicmoe"])
def test_any_setting_of_experts_is_traced(setting: str) -> None:
    model = mixture(setting)
    found = graphprune.inspect(model)
    assert not found.program.need("trace").opaque.why
    assert any("q_proj" in str(member) for group in found.prunable for member in group.members)
    pruned: Any = graphprune.compile(model, 0.05)
    assert model.config._experts_implementation == pruned.config._experts_implementation == setting


def test_the_names_are_those_of_transformers() -> None:
    """When this fails, transformers has renamed a setting or added one: see graphprune/trace/backends.py."""
    config = transformers.MixtralConfig(attn_implementation="sdpa", experts_implementation="eager")
    assert vars(config)[ATTENTION] == "sdpa"
    assert vars(config)[EXPERTS] == "eager"
    assert set(AttentionInterface._global_mapping) == {
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
        "flex_attention",
        "sdpa",
        "paged|eager",
    }
    assert set(ExpertsInterface._global_mapping) == {"deepgemm", "batched_mm", "grouped_mm", "sonicmoe"}


def test_a_setting_of_the_users_own_is_left() -> None:
    model = copy_structure(with_setting(build("llama_grouped_query"), ATTENTION, "mine"))
    use_portable(model, tracing=True)
    assert vars(model.config)[ATTENTION] == "mine"
