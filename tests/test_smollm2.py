"""The whole pipeline on a real pretrained language model, not on a mock."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import graphprune
from graphprune.evaluate.perplexity import perplexity
from graphprune.io.models import load_model

ROOT = Path(__file__).parents[1]
MODEL = Path(os.environ.get("GRAPHPRUNE_TEST_MODEL", ROOT / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"))
PROMPT = "The best way to learn a new language is to"


@pytest.fixture(scope="module")
def smollm2():
    if not MODEL.is_file():
        pytest.fail(f"{MODEL} is missing: `make test` fetches it")
    return load_model(str(MODEL))


def greedy(model, tokenizer, **options) -> list[int]:
    ids = tokenizer(PROMPT, return_tensors="pt")
    return model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0, **options)[0].tolist()


@pytest.mark.parametrize(("ratio", "width"), [(0.2, False), (0.5, False), (0.2, True)])
def test_pruned_by_ratio(smollm2, ratio, width, tmp_path):
    model, tokenizer = smollm2
    before = {name: (t.data_ptr(), t._version) for name, t in model.named_parameters()}
    pruned = graphprune.compile(model, ratio, method="magnitude", width=width)
    report = graphprune.report(pruned)

    assert type(pruned) is type(model)
    assert (pruned.model.norm.weight.numel() < 576) is width
    assert abs(report.ratio - ratio) < 0.001
    assert sum(p.numel() for p in pruned.parameters()) == report.parameters_after
    assert report.oracle_error <= 1e-4
    assert {name: (t.data_ptr(), t._version) for name, t in model.named_parameters()} == before
    assert greedy(pruned, tokenizer) == greedy(pruned, tokenizer, use_cache=False)

    graphprune.save(pruned, tmp_path / "pruned", tokenizer=tokenizer)
    loaded, same_tokenizer = load_model(str(tmp_path / "pruned"))
    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**ids).logits, pruned(**ids).logits)
    assert same_tokenizer(PROMPT)["input_ids"] == tokenizer(PROMPT)["input_ids"]


def test_query_heads_stay_with_their_kv_head(smollm2):
    """9 query heads on 3 KV heads of width 64: what is left of q_proj are the query heads of the KV heads kept."""
    model, _ = smollm2
    pruned = graphprune.compile(model, 0.05, method="magnitude", include=["*.self_attn"])
    for layer, small in zip(model.model.layers, pruned.model.layers, strict=True):
        heads = model.config.num_key_value_heads
        keys = layer.self_attn.k_proj.weight.view(heads, 64, -1)
        kept = [
            i
            for i in range(heads)
            if any(torch.equal(keys[i], k) for k in small.self_attn.k_proj.weight.view(-1, 64, 576))
        ]
        assert kept
        queries = layer.self_attn.q_proj.weight.view(heads, 3 * 64, -1)
        outputs = layer.self_attn.o_proj.weight.view(-1, heads, 3 * 64)
        assert torch.equal(small.self_attn.q_proj.weight, queries[kept].flatten(0, 1))
        assert torch.equal(small.self_attn.o_proj.weight, outputs[:, kept].flatten(1))


def test_activations_keep_the_model_alive(smollm2):
    """Magnitude destroys a language model at 20%; a score that looks at activations does not."""
    model, tokenizer = smollm2
    text = (ROOT / "examples" / "alice.txt").read_text("utf-8")
    other = (ROOT / "examples" / "oz.txt").read_text("utf-8")
    options = {"include": ["*.mlp"], "skip_first": 3, "skip_last": 2, "verify": False}
    magnitude = graphprune.compile(model, 0.2, method="magnitude", **options)
    wanda = graphprune.compile(model, 0.2, method="wanda-sp", data=[text], tokenizer=tokenizer, samples=8, **options)
    dense, alive, dead = (perplexity(m, tokenizer, other, tokens=512) for m in (model, wanda, magnitude))
    assert dense < alive < 5 * dense
    assert dead > 5 * alive
    for i in (0, 1, 2, 28, 29):
        assert torch.equal(wanda.model.layers[i].mlp.down_proj.weight, model.model.layers[i].mlp.down_proj.weight)
