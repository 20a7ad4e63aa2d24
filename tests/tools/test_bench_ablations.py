"""The ablations run, each with one thing changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TOOLS = Path(__file__).parents[2] / "tools"
WORDS = 40


@pytest.fixture
def bench(load_tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return load_tool("bench_ablations")


def test_every_comparison_is_of_variants_that_differ_in_one_thing(bench: ModuleType) -> None:
    for better, worse in bench.COMPARED:
        a, b = bench.VARIANTS[better], bench.VARIANTS[worse]
        assert {k: v for k, v in a.items() if k != "passes"} == {k: v for k, v in b.items() if k != "passes"}


def test_the_whole_table_at_small_sizes(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=12, num_attention_heads=8, vocab_size=WORDS
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    row = json.dumps({"text": " ".join(f"w{n * n % WORDS}" for n in range(400))}) + "\n"
    for name in ("calib/c4.jsonl", "wikitext2/wikitext2_raw_test_rows.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(row)
    code = bench.main([str(tmp_path), "--data", str(tmp_path), "--samples", "4", "--length", "16", "--tokens", "256"])
    assert code in (0, 1)  # random weights have no side
    captured = capsys.readouterr()
    for variant in bench.VARIANTS:
        assert f"{variant}: " in captured.err
    assert "better" in captured.out
