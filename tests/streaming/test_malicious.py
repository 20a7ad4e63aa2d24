"""A folder that lies is refused, with nothing executed and nothing allocated that its weights do not have."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graphprune
from graphprune import GraphPruneError
from graphprune.ir.plan import Plan
from graphprune.streaming import open_model
from graphprune.streaming.checkpoint import INDEX, SINGLE
from tests.helpers import quick
from tests.streaming.models import checkpoint, llama


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("dense") / "one", llama())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("sharded") / "some", llama(), "40KB")


def refused(folder: Path, says: str, **how: Any) -> None:
    how = how if "plan" in how else {"method": "magnitude", **how}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(GraphPruneError, match=says):
        graphprune.stream(folder, folder.parent / "small", None if "plan" in how else 0.2, **how)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10  # KiB
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]  # nothing, not even hidden


def copied(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "folder"))


def edit_index(folder: Path, name: Any) -> None:
    data = json.loads((folder / INDEX).read_text())
    data["weight_map"][min(data["weight_map"])] = name
    (folder / INDEX).write_text(json.dumps(data))


def edit_config(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))


def edit_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", ".hidden.safetensors", "x.bin", "..", 7, ""]
)
def test_an_index_that_leaves_the_folder(sharded: Path, tmp_path: Path, name: Any) -> None:
    folder = copied(sharded, tmp_path)
    edit_index(folder, name)
    refused(folder, "no name of a safetensors file|expected str")


def test_an_index_that_names_what_is_not_there(sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path)
    edit_index(folder, "model-00009-of-00009.safetensors")
    refused(folder, "incomplete")


def test_an_index_that_names_another_shard(sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path)
    data = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_index(folder, next(file for file in data.values() if file != data[min(data)]))
    refused(folder, "but it is not")


def test_a_shard_that_is_a_pipe_is_not_opened(sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path)
    shard = next(folder.glob("model-*.safetensors"))
    shard.unlink()
    os.mkfifo(shard)
    refused(folder, "incomplete")


def test_one_tensor_in_two_shards(sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path)
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    second.write_bytes(first.read_bytes())
    refused(folder, "is in")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda header: header["lm_head.weight"].update(shape=[10**12, 10**12]), "does not take"),
        (lambda header: header["lm_head.weight"].update(shape=[-96, -32]), "damaged"),
        (lambda header: header["lm_head.weight"].update(shape=[2**40] * 100), "damaged"),
        (lambda header: header["lm_head.weight"].update(dtype="F64"), "does not take"),
        (lambda header: header["lm_head.weight"].update(dtype="F8_E4M3"), "quantised"),
        (lambda header: header["lm_head.weight"].update(dtype="os.system"), "quantised"),
        (lambda header: header["lm_head.weight"].update(shape=[32, 96]), "do not belong together"),
        (lambda header: header["lm_head.weight"].update(shape=True), "expected list"),
        (lambda header: header["lm_head.weight"].update(data_offsets=[0, 2**62]), "does not take|begin"),
        (lambda header: header["lm_head.weight"].update(data_offsets=[-6144, 0]), "does not take"),
        (lambda header: header["model.norm.weight"].update(data_offsets=[0, 64]), "begin"),
        (lambda header: header.pop("lm_head.weight"), "begin|truncated"),
        (lambda header: header.update({"lm_head.weight": 3}), "expected dict"),
        (lambda header: header.update(other=header.pop("lm_head.weight")), "no weights for 'lm_head.weight'"),
    ],
)
def test_a_header_that_lies(dense: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str) -> None:
    folder = copied(dense, tmp_path)
    edit_header(folder / SINGLE, change)
    refused(folder, says)


def test_dtypes_that_are_not_those_of_the_model(dense: Path, tmp_path: Path) -> None:
    folder = copied(dense, tmp_path)
    tensors = load_file(folder / SINGLE)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int16)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    refused(folder, "int16")


@pytest.mark.parametrize("cut", [3, 200, -1])
def test_a_truncated_shard(dense: Path, tmp_path: Path, cut: int) -> None:
    folder = copied(dense, tmp_path)
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:cut])
    refused(folder, "truncated")


def test_a_header_that_is_longer_than_the_file(dense: Path, tmp_path: Path) -> None:
    folder = copied(dense, tmp_path)
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes((2**63).to_bytes(8, "little") + content[8:])
    refused(folder, "header of")


def test_a_name_that_occurs_twice(dense: Path, tmp_path: Path) -> None:
    folder = copied(dense, tmp_path)
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content.replace(b'"model.layers.0.mlp', b'"model.layers.1.mlp'))
    refused(folder, "twice")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 10**12},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 10**9},
        {"vocab_size": 2**31 - 1},
        {"hidden_size": 2**20, "intermediate_size": 2**20},
        {"num_hidden_layers": 2**20 - 1},
        {"intermediate_size": -1},
        {"hidden_size": "many"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10**30}},
        {"model_type": "no-such-model", "architectures": None},
        {"quantization_config": {"quant_method": "fp8"}},
        {"architectures": ["pipeline"], "model_type": None},
        {"architectures": ["T5ForConditionalGeneration"]},
    ],
    ids=lambda changes: "-".join(f"{name}={value}"[:40] for name, value in changes.items()),
)
def test_a_config_that_lies(dense: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = copied(dense, tmp_path)
    edit_config(folder, **changes)
    refused(folder, "config.json|quantised|do not belong|no weights for")


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_position_embeddings", 10**12), ("hidden_size", 10**12), ("num_hidden_layers", 10**9), ("vocab_size", 2**21)],
)
def test_a_size_that_is_absurd_is_named_before_anything_is_built(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    folder = copied(dense, tmp_path)
    edit_config(folder, text_config={name: value})
    monkeypatch.setattr(open_model, "read_config", None)
    refused(folder, f"text_config.{name} is {value:,}")


def test_a_config_that_is_no_json(dense: Path, tmp_path: Path) -> None:
    folder = copied(dense, tmp_path)
    (folder / "config.json").write_text("[" * 100_000)
    refused(folder, "not JSON")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_a_pickle_is_never_read(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copied(dense, tmp_path)
    (folder / SINGLE).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    refused(folder, "convert it to safetensors")


def test_code_in_the_folder_never_runs(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for the model, the config, the tokenizer nor for generate."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    folder = copied(dense, tmp_path / "in")
    (folder / "evil.py").write_text("open('exploded', 'w')\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("open('exploded', 'w')\n")
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", "evil.T"]}
    edit_config(folder, auto_map=auto, trust_remote_code=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto, "tokenizer_class": "Evil"}))
    graphprune.stream(folder, tmp_path / "small", 0.2, method="magnitude")
    assert not (tmp_path / "exploded").exists()
    edit_config(folder, model_type="evil", architectures=["EvilModel"])
    refused(folder, "never run")
    assert not (tmp_path / "exploded").exists()


def test_a_kernel_from_elsewhere_is_not_fetched(dense: Path, tmp_path: Path) -> None:
    folder = copied(dense, tmp_path)
    edit_config(folder, attn_implementation="some/kernel", _attn_implementation="some/kernel")
    graphprune.stream(folder, tmp_path / "small", 0.2, method="magnitude")
    assert json.loads((tmp_path / "small" / "graphprune.json").read_text())["attention"] == "sdpa"


@pytest.mark.parametrize(
    ("bad", "name", "method"),
    quick(
        itertools.product(
            (math.nan, math.inf), ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"), ("magnitude", "random")
        ),
        {
            (math.nan, "lm_head.weight", "magnitude"),
            (math.inf, "lm_head.weight", "random"),
            (math.inf, "model.layers.0.mlp.up_proj.weight", "magnitude"),
            (math.nan, "model.layers.0.mlp.up_proj.weight", "random"),
        },
    ),
)
def test_weights_that_are_not_finite(dense: Path, tmp_path: Path, bad: float, name: str, method: str) -> None:
    folder = copied(dense, tmp_path)
    tensors = load_file(folder / SINGLE)
    tensors[name][3, 4] = bad
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    refused(folder, "NaN or infinite", method=method)


NAME = "model.layers.0.mlp.gate_proj.weight[0]"


@pytest.mark.parametrize("keep", [[0, 48], [-1, 3], [1, 1], [], [0.5], [3, 1]])
def test_a_plan_of_indices_that_are_none(keep: list[Any]) -> None:
    data = {"format": 1, "ratio": 0.1, "axes": {NAME: {"size": 48, "keep": keep}}}
    with pytest.raises(GraphPruneError):
        Plan.from_dict(data)


def test_a_plan_of_another_size(dense: Path, tmp_path: Path) -> None:
    folder = copied(dense, tmp_path)
    plan = Plan.from_dict({"format": 1, "ratio": 0.1, "axes": {NAME: {"size": 64, "keep": [0, 63]}}})
    refused(folder, "another architecture", plan=plan)


def test_what_graphprune_wrote_and_was_damaged(dense: Path, tmp_path: Path) -> None:
    graphprune.stream(dense, tmp_path / "folder", 0.2, method="magnitude")
    content = bytearray((tmp_path / "folder" / SINGLE).read_bytes())
    content[-1] ^= 1
    (tmp_path / "folder" / SINGLE).write_bytes(content)
    refused(tmp_path / "folder", "checksum")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match="no folder"):
        graphprune.stream(tmp_path / "nowhere", tmp_path / "small", 0.2, method="magnitude")
