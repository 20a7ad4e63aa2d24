"""What ``deploy="transformers"`` makes is loaded by transformers alone, and computes the same, bit by bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CASES
from safetensors.torch import load_file, save_file
from torch import nn

import graphprune

TOKENS = torch.arange(34).reshape(2, 17) * 7 % 96
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
GENERATE = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}

# Runs in a process of its own, where importing anything of graphprune raises.
STOCK = """
import importlib.abc, json, sys

class Forbidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "graphprune":
            raise ImportError("graphprune is not installed here")

sys.meta_path.insert(0, Forbidden())
import torch, transformers
torch.set_num_threads(1)  # as in the tests
from safetensors.torch import load_file, save_file

folder = sys.argv[1]
given = load_file(f"{folder}/given.safetensors")
made, notes = {}, {}
for name, (auto, generates) in json.load(open(f"{folder}/cases.json")).items():
    model, info = getattr(transformers, auto).from_pretrained(f"{folder}/{name}", output_loading_info=True)
    notes[name] = {"class": type(model).__name__, **{key: str(value) for key, value in info.items() if value}}
    for parameter in model.parameters():  # not where the file is mapped to, which may be off the boundaries of SIMD
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        if "ImageClassification" in auto:
            made[name] = model(given["images"]).logits
        elif "Seq2Seq" in auto:
            made[name] = model(input_ids=given["tokens"], decoder_input_ids=given["tokens"]).logits
        else:
            made[name] = model(given["tokens"]).logits
        if generates:
            made[f"{name}.generated"] = model.generate(given["tokens"], **json.loads(sys.argv[2]))
save_file({key: value.contiguous() for key, value in made.items()}, f"{folder}/made.safetensors")
json.dump(notes, open(f"{folder}/notes.json", "w"))
"""


def logits(model: nn.Module, auto: str) -> torch.Tensor:
    with torch.no_grad():
        if auto == "AutoModelForImageClassification":
            return model(IMAGES).logits
        if auto == "AutoModelForSeq2SeqLM":
            return model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
        return model(TOKENS).logits


def generated(model: Any) -> torch.Tensor:
    return model.generate(TOKENS, **GENERATE)


@pytest.fixture(scope="module")
def pruned() -> dict[str, nn.Module]:
    """Not to be changed by tests."""
    return {
        name: graphprune.compile(case.build(), case.ratio, method="magnitude", deploy="transformers", **case.options)
        for name, case in CASES.items()
    }


@pytest.fixture(scope="module")
def folder(pruned: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All models saved, and what transformers alone makes of them."""
    folder = tmp_path_factory.mktemp("deployed")
    for name, model in pruned.items():
        graphprune.save(model, folder / name)
    save_file({"tokens": TOKENS, "images": IMAGES}, folder / "given.safetensors")
    cases = {name: (case.auto, case.generates) for name, case in CASES.items()}
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-c", STOCK, str(folder), json.dumps(GENERATE)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_fields_of_the_config(pruned: dict[str, nn.Module], name: str) -> None:
    report = graphprune.report(pruned[name])
    assert report.fields == CASES[name].changes
    assert CASES[name].ratio - 0.06 < report.ratio <= CASES[name].ratio
    for field, (_, after) in CASES[name].changes.items():
        assert getattr(pruned[name].config, field) == after


@pytest.mark.parametrize("name", CASES)
def test_transformers_alone_computes_the_same(pruned: dict[str, nn.Module], folder: Path, name: str) -> None:
    made = load_file(folder / "made.safetensors")
    assert torch.equal(made[name], logits(pruned[name], CASES[name].auto))
    notes = json.loads((folder / "notes.json").read_text())[name]
    assert notes == {"class": type(pruned[name]).__name__}  # nothing missing, unexpected, or of another shape
    if CASES[name].generates:
        assert torch.equal(made[f"{name}.generated"], generated(pruned[name]))


def test_nothing_else_is_in_the_folder(folder: Path) -> None:
    """Tools that read every .safetensors file of a folder find only what is in the state dict."""
    for name, case in CASES.items():
        files = {path.name for path in (folder / name).iterdir()}
        generation = {"generation_config.json"} if case.generates else set()
        assert files == {"README.md", "config.json", "graphprune.json", "model.safetensors"} | generation


@pytest.mark.parametrize("name", CASES)
def test_graphprune_loads_it_too(pruned: dict[str, nn.Module], folder: Path, name: str) -> None:
    loaded = graphprune.load(folder / name)
    assert torch.equal(logits(loaded, CASES[name].auto), logits(pruned[name], CASES[name].auto))
    assert graphprune.report(loaded).fields == graphprune.report(pruned[name]).fields
