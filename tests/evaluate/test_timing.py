from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import snapshot
from torch import nn

from graphprune import GraphPruneError
from graphprune.evaluate import latency
from graphprune.evaluate.language_model import random_prompt


def test_prefills_and_decoding_steps_are_those_of_generate(model):
    """Every forward is what ``generate`` would run: same tokens, a growing cache, logits of the last position."""
    seen = []

    def look(module, args, kwargs, out):
        cache = kwargs.get("past_key_values")
        past = out.past_key_values.get_seq_length() - kwargs["input_ids"].shape[1]
        assert (cache is None) is (past == 0)
        assert out.logits.shape[1] == 1
        seen.append((kwargs["input_ids"], past))

    hook = model.register_forward_hook(look, with_kwargs=True)
    found = latency(model, batch=2, prompt=9, new_tokens=4, repeats=3)
    hook.remove()
    assert [(tuple(ids.shape), past) for ids, past in seen] == [((2, 9), 0)] * 4 + [
        ((2, 1), past) for past in range(9, 14)
    ]
    prompt = random_prompt(model, 2, 9)
    assert all(torch.equal(ids, prompt) for ids, _ in seen[:4])
    made = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    assert torch.equal(torch.cat([ids for ids, _ in seen[4:]], 1)[:, 0], made[:, 9])
    assert (found.batch, found.prompt) == (2, 9)
    assert found.prefill_ms > 0
    assert found.decode_ms > 0


def test_medians_and_rates(model, monkeypatch):
    """The clock is ours: prefills take 9, 1, 2, 6 s, of which the first does not count, and steps 5, 1, 1, 4 s."""
    took = iter([9.0, 1.0, 2.0, 6.0, 5.0, 1.0, 1.0, 4.0])
    monkeypatch.setattr("graphprune.evaluate.timing._Timer", lambda device: lambda f: (f(), next(took)))
    found = latency(model, batch=2, prompt=10, new_tokens=3, repeats=3)
    assert (found.prefill_ms, found.decode_ms) == (2000, 1000)
    assert found.prefill_tokens_per_second == 10
    assert found.decode_tokens_per_second == 2
    assert found.to_dict() == {
        "batch": 2,
        "prompt": 10,
        "prefill_ms": 2000,
        "decode_ms": 1000,
        "prefill_tokens_per_second": 10,
        "decode_tokens_per_second": 2,
    }


def test_a_model_without_a_cache_has_no_decoding(model):
    class Bigrams(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 9)

        def get_input_embeddings(self):
            return self.table

        def forward(self, input_ids, use_cache=True):
            return SimpleNamespace(logits=self.table(input_ids))

    found = latency(Bigrams(), prompt=4)
    assert found.prefill_ms > 0
    assert found.decode_ms is None
    assert found.to_dict()["decode_tokens_per_second"] is None


def test_the_model_stays_as_it_is(model):
    model.train()
    check = snapshot(model)
    latency(model, prompt=4, new_tokens=1, repeats=1)
    check()


def test_errors(model):
    for wrong in ({"batch": 0}, {"prompt": 0}, {"new_tokens": 0}, {"repeats": 0}):
        with pytest.raises(GraphPruneError, match="at least 1, not 0"):
            latency(model, **wrong)
    with pytest.raises(GraphPruneError, match="at most 512 tokens"):
        latency(model, prompt=500)
    with pytest.raises(GraphPruneError, match="no prompt to give it"):
        latency(nn.Linear(3, 3))
