"""Instructions become tokens in the model's own format, and a loss is taken of answers and of how they end."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from graphprune import GraphPruneError
from graphprune.data.instructions import Example, encode

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALPACA = {"instruction": "Name a colour.", "input": "", "output": "Red"}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Ciao"},
        {"role": "user", "content": "no answer to this"},
    ]
}


def letters(chat_template: str | None = CHATML, merges: tuple[tuple[str, str], ...] = (), **special: Any) -> Any:
    """A tokenizer of bytes, with a few merges and the special tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(BPE({word: n for n, word in enumerate(words)}, [*merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = chat_template
    return tokenizer


def spelled(ids: list[int], tokenizer: Any) -> str:
    words = tokenizer.convert_ids_to_tokens(ids)
    return "".join(words).replace("Ġ", " ").replace("Ċ", "\n")


def one(row: Any, tokenizer: Any) -> Example:
    (example,) = encode([(row, "Row 0")], tokenizer)
    assert example is not None
    assert len(example.tokens) == len(example.counts)
    return example


def answers(example: Example, tokenizer: Any) -> str:
    return spelled([token for token, counts in zip(example.tokens, example.counts, strict=True) if counts], tokenizer)


# ------------------------------------------------------------------------------------------------------- chat template


def test_alpaca_rows_in_a_chat_template() -> None:
    tokenizer = letters()
    example = one(ALPACA | {"input": "A warm one."}, tokenizer)
    prompt = "<|im_start|>user\nName a colour.\n\nA warm one.<|im_end|>\n<|im_start|>assistant\n"
    assert spelled(example.tokens, tokenizer) == f"{prompt}Red<|im_end|>"
    assert answers(example, tokenizer) == "Red<|im_end|>"
    assert example.tokens[-1] == tokenizer.eos_token_id
    assert example.counts == [False] * (len(example.tokens) - 4) + [True] * 4


def test_every_turn_of_the_assistant_counts() -> None:
    tokenizer = letters()
    example = one(CHAT, tokenizer)
    assert answers(example, tokenizer) == "Hello<|im_end|>Ciao<|im_end|>"
    whole = tokenizer.apply_chat_template(CHAT["messages"][:-1], tokenize=False)
    assert spelled(example.tokens, tokenizer) == whole.removesuffix("\n")
    assert example.tokens == tokenizer(whole)["input_ids"][:-1]


def test_an_answer_that_would_grow_together_with_its_prompt_is_tokenised_as_it_is_generated() -> None:
    tokenizer = letters(merges=(("Ċ", "Ċ"),))
    example = one(ALPACA | {"output": "\nRed"}, tokenizer)
    assert answers(example, tokenizer) == "\nRed<|im_end|>"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a colour."}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt)["input_ids"]
    assert example.tokens[: len(ids)] == ids
    assert not any(example.counts[: len(ids)])


def test_a_template_that_does_not_end_a_turn_gets_eos() -> None:
    tokenizer = letters("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
                        "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    assert answers(one(ALPACA, tokenizer), tokenizer) == "Red\n<|im_end|>"


def test_a_template_that_ends_turns_in_its_own_way_does_not() -> None:
    tokenizer = letters(eos_token="<end>", additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    assert answers(one(ALPACA, tokenizer), tokenizer) == "Red<|im_end|>\n"


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    tokenizer = letters("{{ messages | length }}" + CHATML)
    with pytest.raises(GraphPruneError, match=r"Row 0: the chat template .* another way"):
        one(CHAT, tokenizer)


def test_a_template_that_refuses_is_reported() -> None:
    tokenizer = letters(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    with pytest.raises(GraphPruneError, match=r"Row 0 does not fit the chat template: .*no system"):
        one(CHAT, tokenizer)


# --------------------------------------------------------------------------------------------------- without a template


def test_alpaca_format() -> None:
    tokenizer = letters(None)
    example = one(ALPACA, tokenizer)
    assert spelled(example.tokens, tokenizer) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Response:\nRed<|im_end|>"
    )
    assert answers(example, tokenizer) == "Red<|im_end|>"
    example = one(ALPACA | {"input": "A warm one."}, tokenizer)
    assert spelled(example.tokens, tokenizer) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Input:\nA warm one.\n\n### Response:\nRed<|im_end|>"
    )


def test_missing_inputs_are_empty_ones() -> None:
    tokenizer = letters(None)
    without = {"instruction": "Name a colour.", "output": "Red"}
    assert one(without, tokenizer) == one(ALPACA, tokenizer) == one(ALPACA | {"input": None}, tokenizer)


def test_chats_in_alpaca_format() -> None:
    tokenizer = letters(None)
    example = one(CHAT, tokenizer)
    assert spelled(example.tokens, tokenizer) == (
        "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello<|im_end|>"
        "\n\n### Instruction:\nBye\n\n### Response:\nCiao<|im_end|>"
    )
    assert answers(example, tokenizer) == "Hello<|im_end|>Ciao<|im_end|>"


def test_bos_is_in_front_where_the_tokenizer_puts_it() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = letters(None, bos_token="<s>")
    assert one(ALPACA, tokenizer).tokens[0] != tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    example = one(ALPACA, tokenizer)
    assert example.tokens.count(tokenizer.bos_token_id) == 1
    assert (example.tokens[0], example.counts[0]) == (tokenizer.bos_token_id, False)


# ----------------------------------------------------------------------------------------------------------- in general


@pytest.mark.parametrize("template", [CHATML, None])
def test_rows_are_encoded_one_by_one_whatever_comes_with_them(template: str | None) -> None:
    tokenizer = letters(template)
    rows: list[tuple[Any, str]] = [(ALPACA, "0"), (ALPACA | {"output": " "}, "1"), (CHAT, "2")]
    assert encode(rows, tokenizer) == [one(ALPACA, tokenizer), None, one(CHAT, tokenizer)]
    assert encode([], tokenizer) == []


def test_cut_at_the_end() -> None:
    example = Example([1, 2, 3, 4], [False, False, True, True])
    assert example.cut(3) == Example([1, 2, 3], [False, False, True])
    assert example.cut(9) == example
    assert example.cut(2) is None


def test_half_a_surrogate_pair_is_left_out() -> None:
    tokenizer = letters()
    assert one(ALPACA | {"output": "R\ud83ded"}, tokenizer) == one(ALPACA, tokenizer)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("text", "is no instruction, an object with fields, but str"),
        ({"prompt": "x", "output": "y"}, "neither 'instruction' and 'output' nor 'messages'; it has: prompt, output"),
        ({"instruction": "x"}, "it has: instruction"),
        ({"instruction": "x", "output": 3}, "the field 'output' is int, not text"),
        ({"messages": "x"}, "'messages' is str, not a list"),
        ({"messages": [{"from": "human", "value": "x"}]}, "message 0 has no 'role' and 'content'; it has: from, value"),
        ({"messages": [{"role": "human", "content": "x"}]}, "message 0: the role 'human' is none of system, user"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the role 'assistant'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "the field 'content' is NoneType"),
    ],
)
def test_rows_that_are_no_instructions(row: Any, says: str) -> None:
    with pytest.raises(GraphPruneError, match=f"^a.jsonl, row 7.*{says}"):
        encode([(row, "a.jsonl, row 7")], letters())


def test_what_is_no_tokenizer() -> None:
    with pytest.raises(GraphPruneError, match="this function does not"):
        encode([(ALPACA, "Row 0")], lambda text: text)
