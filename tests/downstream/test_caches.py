"""A KV cache, of any kind, changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruned_models import CAUSAL, TOKENS, pruned
from transformers import DynamicCache, StaticCache

GENERATE: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def cache_of(kind: str, model: Any) -> Any:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=24)
    return DynamicCache(config=model.config)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", CAUSAL)
def test_token_by_token(name: str, kind: str) -> None:
    model = pruned(name)
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits
        cache = cache_of(kind, model)
        found = [model(TOKENS[:, :9], past_key_values=cache, use_cache=True).logits]
        for place in range(9, TOKENS.shape[1]):
            found.append(model(TOKENS[:, place : place + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded_static", "beams"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generate(name: str, kind: str) -> None:
    if kind == "offloaded_static" and not torch.accelerator.is_available():
        pytest.skip("offloads from an accelerator")
    model, beams = pruned(name), {"num_beams": 3} if kind == "beams" else {}
    how = {} if kind == "beams" else {"cache_implementation": kind}
    expected = model.generate(TOKENS, use_cache=False, **GENERATE, **beams)
    assert expected.shape == (2, 25)
    assert torch.equal(model.generate(TOKENS, **how, **GENERATE, **beams), expected)


def test_padding_on_the_left() -> None:
    model = pruned("free")
    row = TOKENS[1:, :7]
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), row), 1)
    mask = torch.cat((torch.zeros(1, 4, dtype=torch.long), torch.ones_like(row)), 1)
    alone = model.generate(row, attention_mask=torch.ones_like(row), **GENERATE)[:, 7:]
    assert torch.equal(model.generate(padded, attention_mask=mask, **GENERATE)[:, 11:], alone)
