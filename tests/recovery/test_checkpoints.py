"""Which checkpoints are whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphprune.recovery.checkpoints import last_whole, mark


def checkpoint(folder: Path, step: int) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir()
    (made / "adapter.safetensors").write_bytes(b"abc")
    (made / "state.json").write_text("{}")
    return made


def test_the_last_that_is_whole_counts(tmp_path: Path) -> None:
    assert last_whole(tmp_path) is None
    first, last = checkpoint(tmp_path, 5), checkpoint(tmp_path, 10)
    for made in (first, last):
        mark(made)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole(tmp_path) == last
    half = checkpoint(tmp_path, 15)  # killed before the mark
    assert last_whole(tmp_path) == last
    assert not half.exists()
    assert (tmp_path / "checkpoint-best").exists()


@pytest.mark.parametrize("what", ["shorter", "missing", "more", "no mark"])
def test_what_is_not_as_marked_is_not_whole(what: str, tmp_path: Path) -> None:
    first, last = checkpoint(tmp_path, 5), checkpoint(tmp_path, 10)
    for made in (first, last):
        mark(made)
    if what == "shorter":
        (last / "adapter.safetensors").write_bytes(b"ab")
    elif what == "missing":
        (last / "state.json").unlink()
    elif what == "more":
        (last / "more").write_text("")
    else:
        (last / "whole.json").write_text("{")
    assert last_whole(tmp_path) == first
    assert not last.exists()
