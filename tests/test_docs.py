"""The code blocks of the documentation run, in order, as they are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import EXAMPLES, SMOLLM2, check_shown, run_page, save_reader
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


TUTORIAL = DOCS / "tutorial.md"


@pytest.mark.parametrize("page", sorted({*DOCS.glob("*.md")} - {TUTORIAL}), ids=lambda page: page.stem)
def test_a_page_runs(
    page: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    monkeypatch.chdir(tmp_path)
    text = page.read_text("utf-8")
    scope: dict[str, Any] = {"__name__": page.stem}
    run_page(text, str(page), scope | WHAT_THE_READER_HAS.get(page.stem, dict)())
    check_shown(text, capsys.readouterr().out)


def test_the_tutorial_runs_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(EXAMPLES)
    save_reader(Path("model"))
    small = {SMOLLM2: "model", "--samples 32 --length 128": "--samples 4 --length 16", "--lengths 128": "--lengths 32"}
    run_page(TUTORIAL.read_text("utf-8"), "tutorial", {"__name__": "tutorial"}, small)
    assert {path.name for path in Path("out").iterdir()} == {"bare", "slimgpt", "copy", "stock"}


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(EXAMPLES)
    Path(".cache").symlink_to((DOCS.parent / ".cache").resolve())
    run_page(TUTORIAL.read_text("utf-8"), "tutorial", {"__name__": "tutorial"})
    check_shown(TUTORIAL.read_text("utf-8"), capsys.readouterr().out, numbers=False)
