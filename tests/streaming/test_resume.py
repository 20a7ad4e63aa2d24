"""A run that is killed leaves nothing but a partial folder, from which the same call goes on to the same result."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import graphprune
from graphprune import GraphPruneError
from graphprune.streaming import shard_writer
from graphprune.streaming import stream as stream_module
from graphprune.streaming.partial import partial_folder
from tests.streaming.models import checkpoint, digests, llama

SHARD = "12KB"
# For every line on stdin, [source, target, n], a process is forked off that kills itself, as kill -9 does, when it is
# told of progress for the n-th time; by which signal it ended is printed. The imports, which take time, are done once.
KILLED = """
import json, os, signal, sys
import graphprune, torch, transformers
import graphprune.streaming.stream
from transformers import AutoConfig, AutoModelForCausalLM

def say(text):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

for line in sys.stdin:
    source, target, left = json.loads(line)
    if not os.fork():
        graphprune.stream(source, target, 0.2, method="magnitude", max_shard_size="12KB", progress=say)
        os._exit(0)
    print(-os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("dense") / "one", llama())


@pytest.fixture(scope="module")
def whole(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of a run that nothing interrupted."""
    target = tmp_path_factory.mktemp("whole") / "small"
    graphprune.stream(dense, target, 0.2, method="magnitude", max_shard_size=SHARD)
    return digests(target)


def steps(dense: Path, target: Path) -> int:
    """How often a whole run tells of progress."""
    told: list[str] = []
    graphprune.stream(dense, target, 0.2, method="magnitude", max_shard_size=SHARD, progress=told.append)
    return len(told)


@pytest.fixture(scope="module")
def killed() -> Iterator[Callable[[Path, Path, int], int]]:
    """Streams from one folder to another in a process that is killed; returns the signal."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # no fork has threads
    command, pipe = [sys.executable, "-c", KILLED], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(source: Path, target: Path, moment: int) -> int:
            process.stdin.write(json.dumps([str(source), str(target), moment]) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield run
        process.stdin.close()
    assert process.returncode == 0


def kill_and_go_on(dense: Path, folder: Path, moments: list[int], whole: dict[str, str], killed: Any) -> None:
    target = folder / "small"
    for moment in moments:
        assert killed(dense, target, moment) == signal.SIGKILL
        assert not target.exists()
        (partial,) = folder.iterdir()
        assert partial.name.startswith(".small.")
    graphprune.stream(dense, target, 0.2, method="magnitude", max_shard_size=SHARD)
    assert digests(target) == whole
    assert sorted(path.name for path in folder.iterdir()) == ["small"]  # the partial folder is gone


def test_killed_twice(dense: Path, tmp_path: Path, whole: dict[str, str], killed: Any) -> None:
    last = steps(dense, tmp_path / "steps")
    (tmp_path / "here").mkdir()
    kill_and_go_on(dense, tmp_path / "here", [last - 12, 17], whole, killed)


@pytest.mark.slow
def test_killed_ten_times_at_random(dense: Path, tmp_path: Path, whole: dict[str, str], killed: Any) -> None:
    last = steps(dense, tmp_path / "steps")
    moments = random.Random(0)
    for n in range(5):
        (tmp_path / str(n)).mkdir()
        at = [moments.randint(2, last // 2), moments.randint(2, last // 2)]
        kill_and_go_on(dense, tmp_path / str(n), at, whole, killed)


class Stopped(BaseException):
    """Like KeyboardInterrupt, which pytest would take for its own."""


def interrupt(dense: Path, target: Path, after: int, shard: str = SHARD) -> Path:
    """Stop a run in shard number ``after``; returns the partial folder."""

    def say(text: str) -> None:
        if text.startswith(f"writing model-{after:05d}"):
            raise Stopped

    with pytest.raises(Stopped):
        graphprune.stream(dense, target, 0.2, method="magnitude", max_shard_size=shard, progress=say)
    assert not target.exists()
    return next(path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}."))


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are written from now on."""
    names: list[str] = []

    def noting(tensors: object, path: Path, count: object) -> object:
        names.append(path.name)
        return shard_writer.write_shard(tensors, path, count)  # type: ignore[arg-type]

    monkeypatch.setattr(stream_module, "write_shard", noting)
    return names


def test_finished_shards_are_kept(
    dense: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(dense, tmp_path / "small", 3)
    names = written(monkeypatch)
    told: list[str] = []
    graphprune.stream(dense, tmp_path / "small", 0.2, method="magnitude", max_shard_size=SHARD, progress=told.append)
    assert names[0].startswith("model-00003")
    assert "score" not in told  # nor is the plan made again
    assert digests(tmp_path / "small") == whole


def test_a_shard_that_changed_since_is_written_again(
    dense: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = interrupt(dense, tmp_path / "small", 3)
    shard = next(partial.glob("model-00001*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (partial / "stranger.safetensors").write_bytes(b"")
    (partial / ".finished.json.1234.partial").write_bytes(b"")  # from a kill while it was replaced
    names = written(monkeypatch)
    graphprune.stream(dense, tmp_path / "small", 0.2, method="magnitude", max_shard_size=SHARD)
    assert names[0] == shard.name
    assert digests(tmp_path / "small") == whole


def test_notes_that_are_damaged_count_for_nothing(dense: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    partial = interrupt(dense, tmp_path / "small", 3)
    (partial / ".finished.json").write_text("{")
    (partial / ".plan.json").write_text("")
    graphprune.stream(dense, tmp_path / "small", 0.2, method="magnitude", max_shard_size=SHARD)
    assert digests(tmp_path / "small") == whole


def test_another_command_does_not_go_on(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = interrupt(dense, tmp_path / "small", 3)
    before = digests(partial)
    names = written(monkeypatch)
    graphprune.stream(dense, tmp_path / "small", 0.3, method="magnitude", max_shard_size=SHARD)
    assert names[0].startswith("model-00001")
    assert digests(partial) == before


def test_another_checkpoint_does_not_go_on(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "dense", llama())
    first = interrupt(source, tmp_path / "small", 3)
    checkpoint(source, llama(num_hidden_layers=3))
    interrupt(source, tmp_path / "small", 3)
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".small.")]) == 2
    assert first.is_dir()


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with partial_folder(tmp_path / "small", "key") as partial:
        partial.keep_plan({"a": 1})
        with pytest.raises(GraphPruneError, match="Another process"), partial_folder(tmp_path / "small", "key"):
            pass
        assert partial.plan() == {"a": 1}
    assert list((tmp_path / "small").iterdir()) == []


def test_a_full_disk_leaves_what_is_finished(
    dense: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def full(tensors: object, path: Path, count: object) -> object:
            if path.name.startswith("model-00004"):
                raise OSError(28, "No space left on device")
            return shard_writer.write_shard(tensors, path, count)  # type: ignore[arg-type]

        patch.setattr(stream_module, "write_shard", full)
        with pytest.raises(GraphPruneError, match="No space left"):
            graphprune.stream(dense, tmp_path / "small", 0.2, method="magnitude", max_shard_size=SHARD)
    names = written(monkeypatch)
    graphprune.stream(dense, tmp_path / "small", 0.2, method="magnitude", max_shard_size=SHARD)
    assert names[0].startswith("model-00004")
    assert digests(tmp_path / "small") == whole


def test_what_was_calibrated_is_calibrated_again_and_goes_on_if_it_is_the_same(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed weights are not kept; finished shards are, unless something else came of it this time."""
    how = {"method": "slimgpt", "data": "random", "samples": 2, "length": 16, "max_shard_size": SHARD}
    graphprune.stream(dense, tmp_path / "whole", 0.2, **how)
    for change in (False, True):
        target = tmp_path / f"small-{change}"

        def say(text: str) -> None:
            if text.startswith("writing model-00003"):
                raise Stopped

        with pytest.raises(Stopped):
            graphprune.stream(dense, target, 0.2, progress=say, **how)
        with monkeypatch.context() as patch:
            if change:
                (state,) = tmp_path.glob(".small-*/.finished.json")
                data = json.loads(state.read_text())
                state.write_text(json.dumps({**data, "outcome": "another"}))
            names = written(patch)
            graphprune.stream(dense, target, 0.2, **how)
        shards = [name for name in names if name.startswith("model-")]
        assert shards[0].startswith("model-00001" if change else "model-00003")
        assert digests(target) == digests(tmp_path / "whole")
