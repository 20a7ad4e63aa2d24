"""Folders made to do harm: refused before anything is built from them, and nothing outside of them is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import graphprune
from graphprune import GraphPruneError
from graphprune.io import empty_model, weight_files
from graphprune.io.manifest import seal


def llama(**changes: Any) -> nn.Module:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, **changes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **sizes)).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A free plan, and one whose class computes its buffers when it is loaded. Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("saved")
    for name, options in (("free", {}), ("stock", {"deploy": "transformers"})):
        graphprune.save(graphprune.compile(llama(), 0.2, method="random", verify=False, **options), folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(params=["free", "stock"])
def folder(request: pytest.FixtureRequest, saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved[request.param], tmp_path / "model"))


def refuses(folder: Path, match: str) -> None:
    with pytest.raises(GraphPruneError, match=match):
        graphprune.load(folder)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change graphprune.json on purpose, with a checksum that fits."""
    data = json.loads((folder / "graphprune.json").read_text())
    change(data)
    data["sha256"] = seal(data)
    (folder / "graphprune.json").write_text(json.dumps(data))


def rewrite_config(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))
    stored = weight_files.fingerprint(folder / "config.json")
    edit(folder, lambda data: data["files"].update({"config.json": vars(stored)}))


@pytest.fixture
def nothing_real(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be built whose class really computes something."""
    on_meta = empty_model.without_weights

    def refuse(computes: bool) -> Any:
        if computes:
            pytest.fail("a model was built in memory from a config that nobody had looked at")
        return on_meta(computes)

    monkeypatch.setattr(empty_model, "without_weights", refuse)


ABSURD = [
    {"hidden_size": 10**12},
    {"hidden_size": 2**63},
    {"vocab_size": 10**12},
    {"intermediate_size": 10**11},
    {"head_dim": 10**12},
    {"num_hidden_layers": 10**12},
    {"hidden_size": 2**36, "num_attention_heads": 2**34},
    {"hidden_size": -4},
]


@pytest.mark.usefixtures("nothing_real")
@pytest.mark.parametrize("changes", ABSURD, ids=str)
def test_absurd_sizes(folder: Path, changes: dict[str, Any]) -> None:
    rewrite_config(folder, **changes)
    refuses(folder, "describes|this is not the model|far more tensors|does not come from pruning")


@pytest.mark.usefixtures("nothing_real")
def test_absurd_sizes_that_the_reports_agree_with(saved: dict[str, Path], tmp_path: Path) -> None:
    """Whoever writes a folder also writes the number of parameters that its config is checked against."""
    folder = Path(shutil.copytree(saved["stock"], tmp_path / "model"))
    size = 10**10
    rewrite_config(folder, vocab_size=size)
    edit(folder, lambda data: data["reports"][-1].update(parameters_after=10**15, parameters_before=2 * 10**15))
    refuses(folder, "would take .* bytes, far more than is in the folder")


def test_many_bytes_in_buffers_that_a_class_computes(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(empty_model, "_ALWAYS", 0)
    monkeypatch.setattr(empty_model, "_TIMES_STORED", 1e-5)
    folder = Path(shutil.copytree(saved["stock"], tmp_path / "model"))
    refuses(folder, "would take .* bytes, far more than is in the folder")
    graphprune.load(saved["free"])  # computes nothing


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_that_leads_elsewhere_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The index is for transformers; what is read is in graphprune.json, whose names cannot leave the folder."""
    small = graphprune.compile(llama(), 0.2, method="random", verify=False)
    graphprune.save(small, tmp_path / "model", max_shard_size="10KB")
    path = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    path.write_text(json.dumps(index))
    opened = []
    real = weight_files._open
    monkeypatch.setattr(weight_files, "_open", lambda one: opened.append(one) or real(one))
    loaded = graphprune.load(tmp_path / "model")
    assert {one.parent for one in opened} == {tmp_path / "model"}
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), small.parameters(), strict=True))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "graphprune.json"])
def test_what_is_no_file_is_not_opened(folder: Path, name: str) -> None:
    """Reading a pipe would wait for ever, reading a device would never end."""
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refuses(folder, f"has no (file )?{name}")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    refuses(folder, f"has no (file )?{name}")


def test_a_shard_that_lies_about_its_size(folder: Path) -> None:
    path = folder / "model.safetensors"
    for size in (2**62, path.stat().st_size - 7):
        whole = path.read_bytes()
        path.write_bytes(size.to_bytes(8, "little") + whole[8:])  # the length of the header
        stored = weight_files.fingerprint(path)
        edit(folder, lambda data, stored=stored: data["files"].update({path.name: vars(stored)}))
        refuses(folder, "no readable safetensors file")
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"keep": [-1, 0]},
        {"keep": [0, 10**12]},
        {"keep": [0, 0]},
        {"keep": [[0], [1]]},
        {"size": 0},
        {"size": -1},
        {"size": 2**70, "keep": "all"},
    ],
    ids=str,
)
def test_plans_with_other_indices(folder: Path, changes: dict[str, Any]) -> None:
    def change(data: dict[str, Any]) -> None:
        next(iter(data["reports"][0]["plan"]["axes"].values())).update(changes)

    edit(folder, change)
    refuses(folder, "plan")


def test_pickles_beside_the_weights_are_never_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not by what transformers would look for first, nor by the command line."""
    from graphprune.io.models import load_model

    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "tokenizer.pkl", "pytorch_model.bin.index.json"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a pickle was read")

    for target in ("pickle.Unpickler", "pickle.load", "pickle.loads", "torch.load"):
        monkeypatch.setattr(target, refuse)
    graphprune.load(folder)
    load_model(str(folder))


def test_code_in_a_folder_is_never_run(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text("raise SystemExit('this was run')")
    (folder / "configuration_evil.py").write_text("raise SystemExit('this was run')")
    auto = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    rewrite_config(folder, auto_map=auto, model_type="evil", architectures=["Evil"], trust_remote_code=True)
    assert type(graphprune.load(folder)).__module__.startswith("transformers.")


def test_a_card_in_a_folder_is_not_believed(folder: Path) -> None:
    (folder / "README.md").write_text("---\n!!python/object/apply:os.system ['false']\n---\n")
    graphprune.load(folder)
    with pytest.raises(GraphPruneError, match="no model card"):
        graphprune.update_card(folder, metadata={"license": "mit"})
