"""A tiny Llama and a tokenizer of words with a chat template."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 60
FIRST = 4  # the first that is a word: w4


def tiny_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=WORDS, **sizes)).eval()


def word_tokenizer() -> Any:
    words = {"<unk>": 0, "<end>": 1, "<asks>": 2, "<says>": 3} | {f"w{n}": n for n in range(FIRST, WORDS)}
    tokens = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<asks> ' if m.role == 'user' else '<says> ' }}{{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<says> {% endif %}"
    )
    return tokenizer
