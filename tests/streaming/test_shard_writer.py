"""A shard written by pieces is the file that safetensors writes, and what is read back by rows is what was in it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graphprune import GraphPruneError
from graphprune.passes.rewrite import Sliced, sliced
from graphprune.streaming.shard_writer import write_shard
from graphprune.streaming.tensor_files import DTYPES, TensorFile
from graphprune.trace.stored import Converted, stand_in


def tensors() -> dict[str, torch.Tensor]:
    found = {f"{kind}.x": torch.arange(12).reshape(3, 4).to(dtype) for kind, dtype in DTYPES.items()}
    found |= {"none": torch.empty(0, 3), "scalar": torch.tensor(2.5), "ünicode": torch.ones(2), "BF16.a": torch.ones(1)}
    return found


def test_it_is_the_file_of_safetensors(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    told: list[int] = []
    written = write_shard(tensors(), tmp_path / "ours.safetensors", told.append)
    content = (tmp_path / "ours.safetensors").read_bytes()
    assert content == (tmp_path / "theirs.safetensors").read_bytes()
    assert written.sha256 == hashlib.sha256(content).hexdigest()
    assert written.bytes == len(content) == sum(told)


def test_tensors_on_disk_are_written_by_pieces(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "theirs.safetensors")
    held = {name: stand_in(one) for name, one in file.tensors.items()}
    write_shard(held, tmp_path / "ours.safetensors", lambda count: None)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match="complex64"):
        write_shard({"c": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "x.safetensors", lambda count: None)


KEEPS = {
    "rows": {0: torch.tensor([[1], [2], [6]])},
    "columns": {1: torch.tensor([[0, 3, 4]])},
    "both": {0: torch.tensor([[0], [5]]), 1: torch.tensor([[2]])},
    "columns of every row": {1: torch.tensor([[n % 3, 3 + n % 2] for n in range(7)])},
    "columns of every row that stays": {0: torch.tensor([[1], [4]]), 1: torch.tensor([[0, 1], [2, 4]])},
    "rows of every column": {0: torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]])},
    "all": {},
}


@pytest.mark.parametrize("name", KEEPS)
@pytest.mark.parametrize("most", [1, 20, 1000])
def test_slicing_by_pieces_is_slicing(tmp_path: Path, name: str, most: int) -> None:
    whole = torch.randn(7, 5)
    save_file({"w": whole}, tmp_path / "w.safetensors")
    stored = TensorFile(tmp_path / "w.safetensors").tensors["w"]
    made = Sliced(stored, KEEPS[name])
    expected = sliced(whole, KEEPS[name])
    assert made.shape == tuple(expected.shape)
    assert torch.equal(torch.cat(list(made.pieces(most))), expected)
    assert torch.equal(Converted(made, torch.float16).read(), expected.half())


def test_every_row_is_looked_at(tmp_path: Path) -> None:
    """Also those that go, in whatever pieces: a weight that is not finite is found."""
    save_file({"w": torch.randn(9, 2)}, tmp_path / "w.safetensors")
    file = TensorFile(tmp_path / "w.safetensors")
    seen: list[tuple[int, int]] = []
    stored = file.tensors["w"]
    plain = stored.rows
    stored.rows = lambda start, stop: (seen.append((start, stop)), plain(start, stop))[1]  # type: ignore[method-assign]
    list(Sliced(stored, {0: torch.tensor([[2], [3], [7]])}).pieces(8))
    assert [row for start, stop in seen for row in range(start, stop)] == list(range(9))


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    save_file({"w": torch.randn(9, 2)}, tmp_path / "w.safetensors")
    file = TensorFile(tmp_path / "w.safetensors")
    with open(tmp_path / "w.safetensors", "r+b") as other:
        other.truncate(90)
    with pytest.raises(GraphPruneError, match="shorter"):
        file.tensors["w"].read()
