"""What ``deploy="transformers"`` makes is loaded by transformers alone, and computes the same, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CASES
from safetensors.torch import load_file
from stock_loading import GENERATE, TOKENS, finish, logits, start
from torch import nn

import graphprune


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
    folder = tmp_path_factory.mktemp("deployed") / "models"
    finish(start("stock", pruned, folder))
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
