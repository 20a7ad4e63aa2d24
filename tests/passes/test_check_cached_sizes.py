"""Sizes that forward uses only with a cache."""

from __future__ import annotations

import pytest
import torch
from helpers import snapshot
from torch import nn
from transformers import PretrainedConfig, RwkvConfig, RwkvForCausalLM

import graphprune


class Stateful(nn.Module):
    """Keeps its hidden layer as a state of ``config.kept`` channels, when asked to."""

    main_input_name = "input_ids"

    def __init__(self, kept: int = 16):
        super().__init__()
        self.config = PretrainedConfig(vocab_size=50, kept=kept)
        self.embed, self.up, self.free = nn.Embedding(50, 8), nn.Linear(8, 16), nn.Linear(8, 32)
        self.head, self.side = nn.Linear(16, 50), nn.Linear(32, 50)

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        hidden = self.up(x).relu()
        if use_cache:
            hidden = hidden + torch.zeros(*x.shape[:2], self.config.kept, device=x.device)
        return self.head(hidden) + self.side(self.free(x).relu())


def test_a_size_that_only_the_cache_has_follows():
    torch.manual_seed(0)
    model = Stateful()
    unchanged = snapshot(model)
    pruned = graphprune.compile(model, 0.3)
    assert pruned.up.out_features < 16
    assert pruned.config.kept == pruned.up.out_features
    pruned(torch.zeros(2, 3, dtype=torch.long), use_cache=True)
    unchanged()


def test_without_such_a_size_nothing_is_traced_twice(monkeypatch):
    from graphprune.trace import export

    calls = []
    original = export.torch.export.export
    monkeypatch.setattr(export.torch.export, "export", lambda *a, **k: calls.append(1) or original(*a, **k))
    graphprune.compile(Stateful(), 0.3, exclude=["up"])
    assert len(calls) == 1


def test_a_model_that_cannot_use_a_cache_anyway_is_not_asked_to():
    pruned = graphprune.compile(Stateful(kept=11), 0.3)
    assert pruned.up.out_features < 16


@pytest.mark.parametrize("inplace", [False, True])
def test_a_recurrent_state_keeps_its_width(inplace):
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, context_length=64, intermediate_size=96, rescale_every=0
    )
    model = RwkvForCausalLM(config).eval()
    pruned = graphprune.compile(model, 0.2, inplace=inplace)
    prompt = torch.randint(0, 50, (1, 5))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (pruned.generate(prompt, **options, use_cache=flag) for flag in (True, False))
    assert torch.equal(with_cache, without)
    assert pruned.rwkv.blocks[0].feed_forward.key.out_features < 96
