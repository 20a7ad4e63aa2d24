"""The code blocks of the documentation run, in order, as they are written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recovery.words import tiny_model, word_tokenizer

import graphprune

DOCS = Path(__file__).parents[1] / "docs"


def for_recovery() -> dict[str, Any]:
    """A model, its tokenizer, and sources in the folder ``corpora``."""
    Path("corpora").mkdir()
    for name, step in (("c4", 1), ("books", 3)):
        texts = [" ".join(f"w{4 + (start + step * n) % 50}" for n in range(300)) for start in range(60)]
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        Path("corpora", f"{name}.jsonl").write_text(rows)
    return {"model": tiny_model(), "tokenizer": word_tokenizer()}


def for_serving() -> dict[str, Any]:
    """The folder ``smaller``, and tokens."""
    small = graphprune.compile(tiny_model(), 0.2, method="magnitude", deploy="transformers")
    graphprune.save(small, "smaller")
    return {"inputs": torch.arange(12).view(2, 6)}


WHAT_THE_READER_HAS: dict[str, Callable[[], dict[str, Any]]] = {"recovery": for_recovery, "serving": for_serving}
NEEDS = {"serving": "torchao"}


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_runs(
    page: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    monkeypatch.chdir(tmp_path)
    text = page.read_text("utf-8")
    scope: dict[str, Any] = {"__name__": page.stem}
    scope |= WHAT_THE_READER_HAS.get(page.stem, dict)()
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, str(page), "exec"), scope)
    printed = capsys.readouterr().out
    for shown in re.findall(r"```text\n(.*?)```", text, re.DOTALL):
        for line in shown.strip().splitlines():
            # A line number belongs to the reader's file.
            said = re.escape(line).replace(r"model\.py:20", r"\S+")
            assert re.search(said, printed), line
