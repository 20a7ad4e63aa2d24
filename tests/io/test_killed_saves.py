"""A save that is killed at any moment leaves the target whole or absent, and the next one works and cleans up."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import graphprune
from graphprune.io.leftovers import partial_folder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

TOKENS = torch.arange(34).reshape(2, 17) * 7 % 96


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """Not to be changed by tests. It was saved and loaded before, so that all is imported in the forked processes."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **sizes)).eval()
    small = graphprune.compile(model, 0.2, method="random", verify=False)
    folder = tmp_path_factory.mktemp("first") / "model"
    save(small, folder)
    graphprune.load(folder)
    return small


def save(model: nn.Module, target: Path) -> None:
    graphprune.save(model, target, max_shard_size="10KB")  # many files


def in_a_child(work: Callable[[], Any]) -> int:
    """Start ``work`` in a forked process; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def killed(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def counting(work: Callable[[], Any], at: Callable[[int], None]) -> int:
    """Do ``work``, calling ``at`` with 1, 2, … whenever Python touches files. Only for processes that then end."""
    seen = 0

    def count(event: str, _: Any) -> None:
        nonlocal seen
        if event == "open" or event.startswith(("os.", "shutil.")):
            seen += 1
            at(seen)

    sys.addaudithook(count)
    work()
    return seen


@pytest.fixture(scope="module")
def events(pruned: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often Python touches files while it saves."""
    folder = tmp_path_factory.mktemp("counted")

    def work() -> None:
        found = counting(lambda: save(pruned, folder / "model"), lambda _: None)
        (folder / "events").write_text(str(found))

    os.waitpid(in_a_child(work), 0)
    return int((folder / "events").read_text())


def assert_whole_or_absent(target: Path, model: nn.Module) -> bool:
    if not target.exists():
        return False
    loaded = graphprune.load(target)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert (target / "README.md").is_file()
    return True


def assert_a_rerun_completes(target: Path, model: nn.Module) -> None:
    save(model, target)
    assert assert_whole_or_absent(target, model)
    assert list(target.parent.iterdir()) == [target]  # nothing is left


# While folders are made, shards written, flushed, and renamed.
@pytest.mark.parametrize("part", [0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 1.0])
def test_killed_while_it_writes(pruned: nn.Module, tmp_path: Path, events: int, part: float) -> None:
    target = tmp_path / "model"
    number = max(1, round(part * events))

    def die(seen: int) -> None:
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed(in_a_child(lambda: counting(lambda: save(pruned, target), die)))
    if not assert_whole_or_absent(target, pruned):
        assert_a_rerun_completes(target, pruned)


@pytest.mark.parametrize("turn", [pytest.param(turn, marks=[] if turn < 2 else pytest.mark.slow) for turn in range(10)])
def test_killed_at_a_random_moment(pruned: nn.Module, tmp_path: Path, turn: int) -> None:
    start = time.perf_counter()
    save(pruned, tmp_path / "warm" / "model")
    takes = time.perf_counter() - start
    target = tmp_path / "cold" / "model"
    child = in_a_child(lambda: save(pruned, target))
    time.sleep(random.Random(turn).uniform(0, takes))
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    killed(child)
    if not assert_whole_or_absent(target, pruned):
        assert_a_rerun_completes(target, pruned)


# Whose leftovers go


@contextlib.contextmanager
def another_process_saves(target: Path) -> Iterator[Path]:
    """A process that is in the middle of it."""
    reader, writer = os.pipe()

    def work() -> None:
        with partial_folder(target) as partial:
            (partial / "half").write_text("mine")
            os.write(writer, partial.name.encode())
            time.sleep(60)

    child = in_a_child(work)
    try:
        yield target.parent / os.read(reader, 1000).decode()
    finally:
        os.kill(child, signal.SIGKILL)
        killed(child)
        os.close(reader), os.close(writer)


def test_what_another_process_is_writing_stays(pruned: nn.Module, tmp_path: Path) -> None:
    with another_process_saves(tmp_path / "model") as theirs:
        save(pruned, tmp_path / "model")
        assert (theirs / "half").read_text() == "mine"
    save(pruned, tmp_path / "other")  # for another target
    assert theirs.exists()
    with partial_folder(tmp_path / "model"):  # now it is dead
        assert not theirs.exists()


@pytest.mark.parametrize(
    "name", [".model.partial", ".model.abcd.partial", ".model.xyz", "model.partial", ".other.{}.partial"]
)
def test_what_only_looks_like_it_stays(pruned: nn.Module, tmp_path: Path, name: str) -> None:
    with another_process_saves(tmp_path / "model") as theirs:
        token = theirs.name.split(".")[2]
    mine = tmp_path / name.format(token)
    mine.mkdir()
    (mine / "file").write_text("mine")
    foreign = theirs.with_name(theirs.name.replace(token[:8], "0" * 8))  # of another machine
    foreign.mkdir()
    link = theirs.with_name(theirs.name.replace(token[8:], "0" * 8))
    link.symlink_to(mine)
    save(pruned, tmp_path / "model")
    assert (mine / "file").read_text() == "mine"
    assert foreign.is_dir()
    assert link.is_symlink()
    assert not theirs.exists()


def test_two_that_save_at_once(pruned: nn.Module, tmp_path: Path) -> None:
    """One of them wins, and nothing is left of the other."""
    target = tmp_path / "model"
    children = [in_a_child(lambda: save(pruned, target)) for _ in range(4)]
    for child in children:
        os.waitpid(child, 0)
    assert assert_whole_or_absent(target, pruned)
    assert list(tmp_path.iterdir()) == [target]
