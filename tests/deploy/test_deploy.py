"""``deploy="transformers"``: what shrinks, what stays and why, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import ToyTransformer, randomise
from models import CASES
from stock_loading import TOKENS, logits, reloaded
from torch import nn

import graphprune
from graphprune import GraphPruneError

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 96}


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 4, "pad_token_id": 0, **changes})
    return randomise(transformers.LlamaForCausalLM(config)).eval()


def qwen(**changes: Any) -> nn.Module:
    config = transformers.Qwen3Config(
        **{**SIZES, "num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0, **changes}
    )
    return randomise(transformers.Qwen3ForCausalLM(config)).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=96)
    return randomise(transformers.GPT2LMHeadModel(config)).eval()


def deployed(model: nn.Module, ratio: float | None = 0.2, **options: Any) -> nn.Module:
    return graphprune.compile(model, ratio, **{"method": "magnitude", "deploy": "transformers", **options})


# What shrinks


def test_every_layer_loses_the_same_and_chooses_itself() -> None:
    plan = graphprune.report(deployed(qwen(), 0.3)).plan
    for part in ("mlp.gate_proj.weight[0]", "self_attn.q_proj.weight[0].0"):
        kept = [plan.keep[f"model.layers.{n}.{part}"] for n in range(2)]
        assert len(kept[0]) == len(kept[1])
        assert kept[0] != kept[1]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ppm", {}),
        pytest.param("slimgpt", {}, marks=pytest.mark.slow),
        pytest.param("wanda-sp", {}, marks=pytest.mark.slow),
        ("flap", {}),
        pytest.param("llm-pruner", {}, marks=pytest.mark.slow),
        pytest.param("random", {}, marks=pytest.mark.slow),
        ("magnitude", {"allocation": "global"}),
        ("magnitude", {"allocation": "log-increasing"}),
        ("magnitude", {"allocation": {"*.mlp": 0.5, "*.self_attn": 0.25}}),
        ("magnitude", {"verify": False}),
        ("magnitude", {"inplace": True}),
        ("magnitude", {"unprunable_ratio": 0.2}),
        ("magnitude", {"inner_axes": True}),
    ],
)
def test_methods_and_options(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    data = {} if method in ("magnitude", "random") else {"data": [TOKENS]}
    pruned = deployed(qwen(), 0.25, method=method, **data, **options)
    report = graphprune.report(pruned)
    assert 0.2 < report.ratio <= 0.25
    assert not report.new_biases
    assert torch.equal(logits(reloaded(pruned, tmp_path / "model")), logits(pruned))


def test_sparing_keeps_axes_of_few_indices_but_no_blocks() -> None:
    """Ten blocks: the first is spared where each may have its own width, and cannot be where all are alike."""
    model = qwen(num_hidden_layers=10, num_attention_heads=4, num_key_value_heads=2)
    report = graphprune.report(deployed(model, 0.15, method="llm-pruner", data=[TOKENS]))
    assert report.fields is not None
    assert set(report.fields) == {"intermediate_size"}
    assert len(report.widths) == 10


def test_heads_alone() -> None:
    report = graphprune.report(deployed(qwen(), 0.15, include="*.self_attn"))
    assert report.fields == {"num_attention_heads": (8, 6), "num_key_value_heads": (4, 3)}


def test_feed_forward_alone() -> None:
    report = graphprune.report(deployed(qwen(), 0.1, include="*.mlp"))
    assert set(report.fields or {}) == {"intermediate_size"}


def test_round_to() -> None:
    fields = graphprune.report(deployed(qwen(), 0.3, round_to=16)).fields or {}
    assert fields["intermediate_size"][1] % 16 == 0
    assert fields.get("num_key_value_heads", (4, 4))[1] % 2 == 0


def test_tied_embeddings(tmp_path: Path) -> None:
    pruned: Any = deployed(llama(tie_word_embeddings=True), 0.6, width=True)
    assert "hidden_size" in (graphprune.report(pruned).fields or {})
    loaded = reloaded(pruned, tmp_path / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(pruned))


def test_sizes_that_the_config_refuses_are_not_chosen() -> None:
    """A config of Llama wants a width that the number of heads divides: it goes from 8 to 4 heads or not at all."""
    assert graphprune.report(deployed(llama(), 0.2)).fields == {"intermediate_size": (48, 26)}
    fields = graphprune.report(deployed(llama(), 0.6, width=True)).fields or {}
    assert fields["hidden_size"][1] % fields.get("num_attention_heads", (8, 8))[1] == 0


def test_the_config_in_memory_follows() -> None:
    """Caches and adapters ask the config of the model, and modules their own."""
    pruned: Any = deployed(qwen(), 0.2)
    fields = graphprune.report(pruned).fields or {}
    assert pruned.config.num_key_value_heads == fields["num_key_value_heads"][1] == 3
    for layer in pruned.model.layers:
        assert layer.self_attn.config.num_key_value_heads == 3
        assert layer.mlp.intermediate_size == fields["intermediate_size"][1]
    cache = pruned(TOKENS, use_cache=True).past_key_values
    assert cache.layers[0].keys.shape[1] == 3


def test_the_given_model_is_not_changed() -> None:
    model: Any = qwen()
    before, expected = model.config.to_json_string(), logits(model)
    deployed(model)
    assert model.config.to_json_string() == before
    assert torch.equal(logits(model), expected)


def test_pruned_again(tmp_path: Path) -> None:
    once: Any = deployed(qwen(), 0.15)
    twice = deployed(once, 0.15)
    report = graphprune.report(twice)
    assert (report.fields or {})["intermediate_size"][0] == once.config.intermediate_size
    assert torch.equal(logits(reloaded(twice, tmp_path / "twice")), logits(twice))
    loaded = graphprune.load(tmp_path / "twice")
    assert torch.equal(logits(loaded), logits(twice))
    again = deployed(loaded, 0.15)
    assert torch.equal(logits(reloaded(again, tmp_path / "again")), logits(again))


def test_pruned_layer_by_layer_afterwards(tmp_path: Path) -> None:
    """The folder then has the deployed config, and graphprune loads it."""
    pruned = graphprune.compile(deployed(qwen(), 0.15), 0.2, method="magnitude", allocation="global")
    assert graphprune.report(pruned).fields is None
    graphprune.save(pruned, tmp_path / "model")
    assert torch.equal(logits(graphprune.load(tmp_path / "model")), logits(pruned))


def test_its_plan_replays() -> None:
    model = qwen()
    first = deployed(model)
    plan = graphprune.Plan.from_json(graphprune.report(first).plan.to_json())
    again = deployed(model, None, plan=plan)
    assert torch.equal(logits(again), logits(first))
    assert graphprune.report(again).fields == graphprune.report(first).fields


def test_half_precision(tmp_path: Path) -> None:
    pruned: Any = deployed(type(qwen())._from_config(qwen().config, dtype=torch.bfloat16).eval(), 0.2)
    loaded = reloaded(pruned, tmp_path / "model")
    assert loaded.dtype is torch.bfloat16
    assert torch.equal(logits(loaded), logits(pruned))


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(qwen().config)
    pruned = deployed(model, method="random")
    assert pruned.config.intermediate_size == pruned.model.layers[1].mlp.up_proj.weight.shape[0] < 48


def test_a_config_in_the_config(tmp_path: Path) -> None:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SIZES, num_key_value_heads=4),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
        image_token_index=90,
    )
    model: Any = randomise(transformers.LlavaForConditionalGeneration(config)).eval()
    inputs = {"input_ids": TOKENS % 90}
    pruned: Any = deployed(model, 0.1, example_inputs=inputs, include="*.language_model")
    assert set(graphprune.report(pruned).fields or {}) == {"text_config.intermediate_size"}
    assert pruned.config.text_config.intermediate_size < 48
    loaded = reloaded(pruned, tmp_path / "model")
    assert torch.equal(loaded(**inputs).logits, pruned(**inputs).logits)


# What stays, and why


def reasons(model: nn.Module) -> dict[str, str]:
    return {name: why for name, why in graphprune.report(model).skipped.items() if "no field of" in why}


def test_what_no_field_says_alone_stays() -> None:
    pruned = deployed(gpt2())
    found = reasons(pruned)
    assert set(found) == {f"transformer.h.{n}.attn.c_attn.weight[1].0" for n in range(2)}
    assert all("no field of GPT2Config says this size alone: n_embd also says" in why for why in found.values())
    report = graphprune.report(pruned)
    assert report.unsaid == 0.5
    assert "n_inner None → 81; 50% of the groups left alone for it" in str(report)


def test_a_class_of_which_one_group_is_spared_stays() -> None:
    with pytest.raises(GraphPruneError, match=r"intermediate_size also says .*spared block"):
        deployed(qwen(), skip_first=1)


def test_scales_must_not_follow() -> None:
    """The number of heads also says the scale of attention here, which pruning keeps."""
    found = reasons(deployed(CASES["opt"].build()))
    assert len(found) == 2
    assert all("num_attention_heads also says model.decoder.layers.0.self_attn.scaling" in w for w in found.values())


# What is refused


def test_other_words() -> None:
    with pytest.raises(GraphPruneError, match=r"deploy is 'transformers', or None.*not 'something'"):
        deployed(llama(), deploy="something")
    with pytest.raises(GraphPruneError, match="emit='graph'"):
        deployed(llama(), emit="graph")


def test_a_model_that_is_not_of_transformers() -> None:
    with pytest.raises(GraphPruneError, match=r"needs a model class of transformers.*ToyTransformer is none"):
        deployed(ToyTransformer(), example_inputs=torch.randn(3, 5, 7))


def test_an_allocation_per_layer() -> None:
    with pytest.raises(GraphPruneError, match="one field of the config says both sizes"):
        deployed(qwen(), allocation={"model.layers.0.mlp": 0.5, "model.layers.1.mlp": 0.2, "*.self_attn": 0.1})
    with pytest.raises(GraphPruneError, match="one field of the config says both sizes"):
        deployed(qwen(), allocation={"model.layers.0": 0.5})


def test_a_plan_per_layer_leaves_the_model_as_it_was() -> None:
    model: Any = qwen()
    plan = graphprune.report(graphprune.compile(model, 0.3, method="magnitude", allocation="global")).plan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(GraphPruneError, match=r"No Qwen3Config describes .*model\.layers.* is to be"):
        deployed(model, None, plan=plan, inplace=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_was_pruned_layer_by_layer() -> None:
    pruned = graphprune.compile(qwen(), 0.2, method="magnitude", allocation="global")
    with pytest.raises(GraphPruneError, match=r"Qwen3Config describes another model than this one: model\.layers"):
        deployed(pruned)


def test_ratios_that_cannot_be_reached() -> None:
    with pytest.raises(GraphPruneError, match=r"ratio 0\.05 cannot be reached .*nearest that can be: 0\.1418"):
        deployed(llama(), 0.05, include="*.self_attn")
    with pytest.raises(GraphPruneError, match="cannot be reached"):
        deployed(llama(), 0.9)


def test_a_class_that_computes_something_else_is_refused() -> None:
    """Sizes alone prove nothing: what was changed by hand in a module is in no config."""
    model: Any = qwen()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.5
    with pytest.raises(GraphPruneError, match="computes something else than the pruned model"):
        deployed(model)


def test_damaged_fields_are_refused(tmp_path: Path) -> None:
    from graphprune.io.manifest import MANIFEST, seal

    graphprune.save(deployed(qwen()), tmp_path / "model")
    file = tmp_path / "model" / MANIFEST
    data = json.loads(file.read_text())
    data["reports"][0]["fields"]["intermediate_size"] = [48]
    data["sha256"] = seal(data)
    file.write_text(json.dumps(data))
    with pytest.raises(GraphPruneError, match=r"intermediate_size.* a number before and one after"):
        graphprune.load(tmp_path / "model")
