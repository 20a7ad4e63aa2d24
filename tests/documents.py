"""Run a page of the documentation as a reader would: its blocks in order, and what it shows against what it prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graphprune.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"
SMOLLM2 = ".cache/SmolLM2-135M-Instruct.Q4_1.gguf"  # where `make setup` puts it, and pages look for it

_BLOCK = re.compile(r"```(python|sh)\n(.*?)```", re.DOTALL)
_SHOWN = re.compile(r"```text\n(.*?)```", re.DOTALL)
_NUMBER = re.compile(r"\d[\d.,]*(?:e[+-]?\d+)?")


def run_page(text: str, name: str, scope: dict[str, Any], replaced: dict[str, str] | None = None) -> None:
    """Run every block of ``python`` and every command of a block of ``sh`` in the current folder, in order.

    ``replaced`` is what stands in for parts of the page: text → text.
    """
    for old, new in (replaced or {}).items():
        assert old in text, f"{old!r} is not on the page any more"
        text = text.replace(old, new)
    for kind, code in _BLOCK.findall(text):
        _run_block(kind, code, name, scope)


def _run_block(kind: str, code: str, name: str, scope: dict[str, Any]) -> None:
    if kind == "python":
        exec(compile(code, name, "exec"), scope)
    else:
        for line in code.replace("\\\n", " ").strip().splitlines():
            command, *arguments = shlex.split(line, comments=True)
            assert command == "graphprune", line
            assert main(arguments) == 0, line


def check_shown(text: str, printed: str, *, numbers: bool = True) -> None:
    """Every line of the page's blocks of ``text`` was printed.

    The line number of a source file is the reader's own; without ``numbers`` so are all numbers.
    """
    printed = " ".join(printed.split())
    for shown in _SHOWN.findall(text):
        for line in filter(None, (" ".join(line.split()) for line in shown.splitlines())):
            said = re.sub(r"[\w.]+\\\.py:\d+", r"\\S+", re.escape(line)) if numbers else _without_numbers(line)
            assert re.search(said, printed), line


def _without_numbers(line: str) -> str:
    return r"[\d.,e+-]+".join(re.escape(piece) for piece in _NUMBER.split(line))


def save_reader(folder: Path) -> None:
    """Save a tiny random Llama that knows the words of the two texts of the examples, with its tokenizer."""
    texts = " ".join((EXAMPLES / name).read_text("utf-8") for name in ("alice.txt", "oz.txt"))
    words = dict.fromkeys(["<unk>", "<end>", *re.findall(r"\w+|[^\w\s]+", texts)])
    tokens = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=len(words), **sizes)).save_pretrained(folder)
