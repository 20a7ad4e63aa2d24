"""``graphprune export``: what other runtimes run, and what of it is checked."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from downstream.pruned_models import ALL, TOKENS, example, fresh, logits, pruned
from helpers import save_words
from torch import nn

import graphprune
from graphprune.cli import main
from graphprune.deploy import exported
from graphprune.deploy.exported import export
from graphprune.errors import GraphPruneError

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason="needs onnx, onnxscript and onnxruntime",
)

SLOW = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model with other widths in every layer, and a tokenizer."""
    graphprune.save(fresh("free"), tmp_path / "smaller")
    save_words(tmp_path / "smaller", tmp_path / "data", 96)
    return tmp_path / "smaller"


def in_onnx(path: Path, **inputs: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(found)


@needs_onnx
def test_the_command_writes_onnx(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "onnx"
    assert main(["export", str(folder), "-o", str(out), "--format", "onnx", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["error"] < 1e-4
    assert {"model.onnx", "tokenizer.json", "run.yaml"} <= said["files"].keys() == {p.name for p in out.iterdir()}
    assert yaml.safe_load((out / "run.yaml").read_text())["format"] == "onnx"
    for rows in (TOKENS[:1, :1], TOKENS[:, :3], TOKENS.repeat(3, 1)):
        found = in_onnx(out / "model.onnx", input_ids=rows, attention_mask=torch.ones_like(rows))
        torch.testing.assert_close(found, pruned("free")(rows).logits, atol=1e-5, rtol=1e-4)


def test_the_command_writes_pt2_without_a_pickle(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pt2"
    assert main(["export", str(folder), "-o", str(out), "--format", "pt2", "--dtype", "bfloat16"]) == 0
    assert "differs by 0.0e+00" in capsys.readouterr().out
    program = torch.export.load(out / "model.pt2").module()
    rows = TOKENS[:, :5].repeat(3, 1)
    expected = fresh("free").to(torch.bfloat16)(rows).logits
    assert torch.equal(program(rows, torch.ones_like(rows)), expected)
    with zipfile.ZipFile(out / "model.pt2") as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    assert any(b"input_ids" in text or b"given" in text for text in held.values())
    # A pickle of protocol 2 or more, by itself or in what torch.save writes.
    assert not [name for name, data in held.items() if data[:1] == b"\x80" or b"data.pkl" in data]


def test_the_command_writes_safetensors_anew(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    asked = ["export", str(folder), "-o", str(out), "--format", "safetensors", "--dtype", "float16", "--portable"]
    assert main([*asked, "--max-shard-size", "20KB"]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert loaded.dtype == torch.float16
    torch.testing.assert_close(loaded.float()(TOKENS).logits, pruned("free")(TOKENS).logits, atol=1e-2, rtol=1e-2)
    assert graphprune.report(graphprune.load(out)).plan.to_json() == graphprune.report(pruned("free")).plan.to_json()


@pytest.mark.parametrize("form", ["pt2", pytest.param("onnx", marks=[needs_onnx, SLOW])])
@pytest.mark.parametrize("name", [name if name in ("bert", "vit") else pytest.param(name, marks=SLOW) for name in ALL])
def test_all_kinds_of_models(name: str, form: str, tmp_path: Path) -> None:
    assert export(fresh(name), tmp_path / "out", form) < 1e-5
    given = example(name)
    if "input_ids" in given:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    path = tmp_path / "out" / f"model.{form}"
    found = in_onnx(path, **given) if form == "onnx" else torch.export.load(path).module()(*given.values())
    torch.testing.assert_close(found, logits(pruned(name), name), atol=1e-5, rtol=1e-4)


def test_what_computes_something_else_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a mask that is read while tracing only, or an exporter with an error."""

    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = fresh("free"), fresh("free").config
            self.main_input_name = "input_ids"

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
            masked = attention_mask is not None and not torch.compiler.is_compiling()
            return self.inner(input_ids, attention_mask=attention_mask if masked else None)

    # The padded token looks at itself only when no mask hides it.
    with pytest.raises(GraphPruneError, match="differs from the model by"):
        export(Careless().eval(), tmp_path / "out", "pt2")
    monkeypatch.setattr(exported, "_error", lambda *_: float("nan"))
    with pytest.raises(GraphPruneError, match="differs from the model by nan"):
        export(fresh("free"), tmp_path / "out", "pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.export.save

    def careless(program: Any, path: Path) -> None:
        program.example_inputs = ((TOKENS, torch.ones_like(TOKENS)), {})
        plain(program, path)

    monkeypatch.setattr(torch.export, "save", careless)
    with pytest.raises(GraphPruneError, match=r"would pickle .*sample_inputs"):
        export(fresh("free"), tmp_path / "out", "pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_killed_while_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is checked, there is nothing at the target; the next one cleans up."""
    child = os.fork()
    if child == 0:
        exported._error = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        export(fresh("vit"), tmp_path / "out", "pt2")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.name.endswith(".partial") for path in tmp_path.iterdir()] == [True]
    export(fresh("vit"), tmp_path / "out", "pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "onnx", "--dtype", "bfloat16"], "does not compute in bfloat16"),
        (["--format", "pt2", "--portable"], "--portable and --max-shard-size are of --format safetensors"),
        (["--format", "safetensors", "-o", "."], ". exists already"),
    ],
)
def test_what_is_wrong_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["export", str(folder), "-o", str(tmp_path / "out"), *arguments]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else plain(name))
    with pytest.raises(GraphPruneError, match=r"onnx needs onnxruntime: pip install 'graphprune\[onnx\]'"):
        export(fresh("free"), tmp_path / "out", "onnx")
