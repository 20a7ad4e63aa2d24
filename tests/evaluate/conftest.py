"""A tiny language model, a tokenizer of as many words, and lm-eval tasks for them."""

from __future__ import annotations

import pytest
import torch
from helpers import randomise
from lm_eval_task import write_task
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 97


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=WORDS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return randomise(LlamaForCausalLM(config)).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, …, of which the last is the end of a text; no padding token."""
    vocabulary = {**{f"w{number}": number for number in range(WORDS - 1)}, "END": WORDS - 1}
    tokens = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokens.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="END")


def words(count: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{number}" for number in torch.randint(0, WORDS - 1, (count,), generator=generator).tolist())


@pytest.fixture
def text() -> str:
    return words(700)


@pytest.fixture
def rows() -> list[dict]:
    """Questions of 3 to 30 words, each with four answers of one to four words."""
    return [
        {"question": words(3 + 3 * i, i), "choices": [words(1 + k, 10 * i + k) for k in range(4)], "answer": i % 4}
        for i in range(10)
    ]


@pytest.fixture
def task_folder(tmp_path, rows):
    """Tasks ``tiny`` and ``tiny_norm`` over the same rows, and their group ``tiny_both``."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, "tiny", rows)
    write_task(folder, "tiny_norm", rows, ("acc", "acc_norm"))
    (folder / "both.yaml").write_text("group: tiny_both\ntask:\n  - tiny\n  - tiny_norm\n")
    return folder
