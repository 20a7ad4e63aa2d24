"""What ``deploy="transformers"`` makes is loaded by transformers alone, and computes the same, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quick
from models import CASES
from safetensors.torch import load_file
from stock_loading import GENERATE, TOKENS, finish, logits, start
from torch import nn

import graphprune


def generated(model: Any) -> torch.Tensor:
    return model.generate(TOKENS, **GENERATE)


# Sizes that configs say in every way there is: alone, together, per expert, with and without a value of their own.
FEW = ("llama_width", "qwen2", "gemma2", "gpt2_width", "mixtral_experts", "t5", "vit")
REST = tuple(name for name in CASES if name not in FEW)
NAMES = quick(CASES, FEW)


@cache
def pruned(name: str) -> nn.Module:
    """Not to be changed by tests."""
    case = CASES[name]
    return graphprune.compile(case.build(), case.ratio, method="magnitude", deploy="transformers", **case.options)


@pytest.fixture(scope="module")
def folder_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models of one half of the cases saved, and what transformers alone makes of them."""

    @cache
    def made(names: tuple[str, ...]) -> Path:
        folder = tmp_path_factory.mktemp("deployed") / "models"
        finish(start("stock", {name: pruned(name) for name in names}, folder))
        return folder

    return lambda name: made(FEW if name in FEW else REST)


@pytest.mark.parametrize("name", NAMES)
def test_fields_of_the_config(name: str) -> None:
    report = graphprune.report(pruned(name))
    assert report.fields == CASES[name].changes
    assert CASES[name].ratio - 0.06 < report.ratio <= CASES[name].ratio
    for field, (_, after) in CASES[name].changes.items():
        assert getattr(pruned(name).config, field) == after


@pytest.mark.parametrize("name", NAMES)
def test_transformers_alone_computes_the_same(folder_with: Callable[[str], Path], name: str) -> None:
    folder = folder_with(name)
    made = load_file(folder / "made.safetensors")
    assert torch.equal(made[name], logits(pruned(name), CASES[name].auto))
    notes = json.loads((folder / "notes.json").read_text())[name]
    assert notes == {"class": type(pruned(name)).__name__}  # nothing missing, unexpected, or of another shape
    if CASES[name].generates:
        assert torch.equal(made[f"{name}.generated"], generated(pruned(name)))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_is_in_the_folder(folder_with: Callable[[str], Path], name: str) -> None:
    """Tools that read every .safetensors file of a folder find only what is in the state dict."""
    files = {path.name for path in (folder_with(name) / name).iterdir()}
    generation = {"generation_config.json"} if CASES[name].generates else set()
    assert files == {"README.md", "config.json", "graphprune.json", "model.safetensors"} | generation


@pytest.mark.parametrize("name", NAMES)
def test_graphprune_loads_it_too(folder_with: Callable[[str], Path], name: str) -> None:
    folder = folder_with(name)
    loaded = graphprune.load(folder / name)
    assert torch.equal(logits(loaded, CASES[name].auto), logits(pruned(name), CASES[name].auto))
    assert graphprune.report(loaded).fields == graphprune.report(pruned(name)).fields
