"""What commands say on stderr while they work."""

from __future__ import annotations

import argparse
import io
import time
from typing import Any

import pytest
import torch
from recovery.words import tiny_model, word_tokenizer
from rich.console import Console

import graphprune
from graphprune import cli_progress
from graphprune.cli_progress import _bar, progress
from graphprune.evaluate import perplexity

SAID = ["loading", "training: step 1 of 1,000, loss 2.1", *(f"training: step {n} of 1,000" for n in range(2, 400))]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def lines(level: str, clock: list[float], capsys: pytest.CaptureFixture[str], **options: Any) -> list[str]:
    """What is said of ``SAID``, one an eighth of a second, and of an end, when it is piped."""
    with progress(argparse.Namespace(log_level=level), **options) as say:
        for text in [*SAID, "training: step 1,000 of 1,000", "writing"]:
            say(text)
            clock[0] += 0.125
    captured = capsys.readouterr()
    assert captured.out == ""
    return [line.partition(" min  ")[2] for line in captured.err.splitlines()]


def test_piped_it_is_a_line_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    every = [f"training: step {n} of 1,000" for n in (80, 160, 240, 320)]
    assert lines("info", clock, capsys) == ["loading", *every, "training: step 1,000 of 1,000"]


def test_piped_and_kept_it_is_every_stage(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    every = [SAID[1], *(f"training: step {n} of 1,000" for n in (81, 161, 241, 321, "1,000"))]
    assert lines("info", clock, capsys, keep=True) == ["loading", *every, "writing"]


def test_levels(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert lines("warning", clock, capsys) == lines("error", clock, capsys) == []
    assert len(lines("debug", clock, capsys)) == len(SAID) + 2


@pytest.mark.parametrize("keep", [False, True])
def test_a_terminal_shows_the_time_left(monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    """Of which it is gone when it is done, but for the lines that are kept."""
    now = [0.0]
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, highlight=False, width=120)
    monkeypatch.setattr(console, "get_time", lambda: now[0])
    with _bar(console, keep) as say:
        say("loading [model]")
        for step in range(1, 61):
            now[0] += 2
            say(f"training: step {step} of 120, loss 2.1")
        bar = console._live_stack[-1]
        bar.refresh()
    shown = screen.getvalue()
    assert "training: step 60 of 120" in shown
    assert "0:02:00" in shown  # left: 60 steps of two seconds
    assert ("min  loading [model]" in shown) is ("min  training: step 1 of 120" in shown) is keep


def test_what_is_counted() -> None:
    read = cli_progress._read
    assert read("sampling texts 1 to 4 of 8: 5 of 128 tokens")[1:] == ("sampling texts 1 to 4 of 8", 5, 128)
    assert read("writing x: 0.12 of 1.50 GB")[1:] == ("writing x", 0.12, 1.5)
    assert read("perplexity in windows of 128 tokens")[1:] == ("perplexity in windows of 128 tokens", 0, None)
    assert read("perplexity in windows of 128 tokens: 8 of 9")[1:] == ("perplexity in windows of 128 tokens", 8, 9)


@pytest.mark.parametrize(
    ("method", "last"),
    [
        ("wanda-sp", ["calibration: 2 of 2 batches", "adapting weights: 2 of 2"]),
        ("llm-pruner", ["gradients: 2 of 2 batches", "gradients of blocks: 2 of 2"]),
    ],
)
def test_what_takes_long_says_how_far_it_is(method: str, last: list[str]) -> None:
    said: list[str] = []
    batches = [{"input_ids": torch.arange(24).view(3, 8) + shift} for shift in (4, 9)]
    options = {"data": batches, "allocation": "global", "verify": False, "progress": said.append}
    graphprune.compile(tiny_model(), 0.1, method=method, **options)
    counts = {read.stage: read.text for read in map(cli_progress._read, said) if read.total is not None}
    assert list(counts.values()) == last


def test_perplexity_says_how_far_it_is() -> None:
    said: list[str] = []
    text = " ".join(f"w{4 + n % 50}" for n in range(100))
    perplexity(tiny_model(), word_tokenizer(), text, length=16, batch=4, progress=said.append)
    assert said == ["4 of 6 windows", "6 of 6 windows"]
