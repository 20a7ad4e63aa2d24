from __future__ import annotations

import math
import sys

import pytest
import torch
from helpers import snapshot
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from graphprune import GraphPruneError
from graphprune.evaluate import perplexity
from graphprune.evaluate import perplexity as function
from graphprune.evaluate.perplexity import perplexity as same


def by_hand(model, tokenizer, text: str, length: int) -> float:
    """One window, one position at a time, in float64."""
    ids = tokenizer(text)["input_ids"]
    losses = []
    for start in range(0, len(ids) - length + 1, length):
        window = ids[start : start + length]
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([window])).logits[0].double().log_softmax(-1)
        losses += [-float(scores[i, window[i + 1]]) for i in range(length - 1)]
    return math.exp(sum(losses) / len(losses))


def test_the_function_is_found_under_both_names():
    assert perplexity is function is same


@pytest.mark.parametrize("length", [2, 100, 300])
def test_against_a_loop_in_float64(model, tokenizer, text, length):
    """300 is longer than the part of a window whose loss is computed at once, and 700 is no multiple of it."""
    expected = by_hand(model, tokenizer, text, length)
    assert perplexity(model, tokenizer, text, length=length) == pytest.approx(expected, rel=1e-5)


def test_the_batch_makes_no_difference_and_is_bounded_by_tokens(model, tokenizer, text, monkeypatch):
    seen = []
    model.register_forward_pre_hook(lambda *call: seen.append(tuple(call[2]["input_ids"].shape)), with_kwargs=True)
    values = [perplexity(model, tokenizer, text, length=50, batch=batch) for batch in (1, 3, 99)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)
    assert seen == [(1, 50)] * 14 + [(3, 50)] * 4 + [(2, 50)] + [(14, 50)]
    seen.clear()
    monkeypatch.setattr(sys.modules["graphprune.evaluate.perplexity"], "TOKENS_PER_FORWARD", 120)
    assert perplexity(model, tokenizer, text, length=50) == pytest.approx(values[0], rel=1e-6)
    assert seen == [(2, 50)] * 7
    seen.clear()
    perplexity(model, tokenizer, text, length=200)
    assert seen == [(1, 200)] * 3


def test_tokens_cut_the_text_and_the_rest_of_a_window_is_left_out(model, tokenizer, text):
    short = " ".join(text.split()[:200])
    assert perplexity(model, tokenizer, text, length=100, tokens=299) == perplexity(model, tokenizer, short, length=100)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e6])
def test_a_broken_model_has_infinite_perplexity(model, tokenizer, text, broken):
    with torch.no_grad():
        model.lm_head.weight.mul_(broken)
    assert perplexity(model, tokenizer, text) == math.inf


def test_the_model_stays_as_it_is(model, tokenizer, text):
    model.train()
    model.model.norm.eval()
    check = snapshot(model)
    perplexity(model, tokenizer, text)
    check()


def test_errors(model, tokenizer, text):
    with pytest.raises(GraphPruneError, match="The text has 5 tokens, less than one window of 128"):
        perplexity(model, tokenizer, "w5 w6 w7 w8 w9")
    with pytest.raises(GraphPruneError, match="at most 512 tokens, not 513"):
        perplexity(model, tokenizer, text, length=513)
    with pytest.raises(GraphPruneError, match="no next token to predict"):
        perplexity(model, tokenizer, text, length=1)
    with pytest.raises(GraphPruneError, match="needs the model's tokenizer"):
        perplexity(model, None, text)
    model.resize_token_embeddings(50)
    with pytest.raises(GraphPruneError, match="not this model's tokenizer"):
        perplexity(model, tokenizer, text)


def test_only_causal_language_models_have_one(tokenizer, text):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    masked = BertForMaskedLM(BertConfig(vocab_size=97, **sizes))
    pair = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    for model in (masked, pair):
        with pytest.raises(GraphPruneError, match="not a causal language model"):
            perplexity(model, tokenizer, text)
