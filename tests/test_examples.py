"""Every example runs as it is called, here with a tiny model or few steps, and says something worth reading."""

from __future__ import annotations

import ast
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from documents import SMOLLM2, save_reader

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
MODEL = "MODEL"  # stands for a model in the arguments below

# Script → arguments that make it quick, and what it prints.
QUICK: dict[str, tuple[list[str], str]] = {
    "prune_from_scratch": (["--steps", "3"], r"ppm: loss \d+\.\d+; .*oracle error"),
    "slimgpt_smollm2": ([MODEL, "--samples", "4", "--length", "32"], r"slimgpt: perplexity \d+"),
    "lorashear": ([MODEL, "run"], r"recovered: [\d,]+ parameters, perplexity"),
    "vit": ([], r"cosine of the logits with the dense ones: 0\.\d+"),
    "custom_module": ([], r"only grow and back: .*oracle error"),
    "custom_criterion": ([], r"largest-reader: the outputs move by \d+%"),
    "iterative": (["--steps", "2"], r"pruned 3 times"),
    "plan_70b": (["--layers", "7"], r"28672 → \d+"),
}
SLOW = {  # with the arguments of their docstrings
    "slimgpt_smollm2": ([], QUICK["slimgpt_smollm2"][1]),
    "lorashear": (["run"], QUICK["lorashear"][1]),
    "demo": (["out"], r"logits are bitwise the same"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "model"
    save_reader(folder)
    return folder


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_every_example_is_here_and_explained() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {*QUICK, *SLOW}
    listed = (EXAMPLES / "README.md").read_text("utf-8")
    for name in scripts:
        doc = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text("utf-8"))) or ""
        assert f"python examples/{name}.py" in doc, name
        assert name == "demo" or re.search(r"second|minute", doc), f"{name}: how long does it take?"
        assert f"({name}.py)" in listed, name


@pytest.mark.parametrize("name", QUICK)
def test_an_example_runs(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, said = QUICK[name]
    monkeypatch.chdir(tmp_path)
    run(name, [str(tiny) if a == MODEL else a for a in arguments], monkeypatch)
    assert re.search(said, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_an_example_runs_on_smollm2(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, said = SLOW[name]
    run(name, [str(ROOT / SMOLLM2), *arguments], monkeypatch)
    assert re.search(said, capsys.readouterr().out)


# ----------------------------------------------------------------------------------------------------- the notebook


def code_cells() -> list[str]:
    """The source of every code cell; the file has what version 4.5 of the format asks of it."""
    notebook: dict[str, Any] = json.loads((EXAMPLES / "quickstart.ipynb").read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    identities = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identities)) == len(identities)
    cells = []
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        assert isinstance(cell["metadata"], dict)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "outputs are not kept: clear them"
            assert cell["execution_count"] is None
            cells.append("".join(cell["source"]))
    return cells


def run_notebook(model: Path) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "notebook"}
    for number, source in enumerate(code_cells()):
        changed = re.sub(r'^MODEL = ".*"', f"MODEL = {str(model)!r}", source, flags=re.MULTILINE)
        assert (changed != source) is (number == 0), "the first cell, and no other, says which model"
        exec(compile(changed.replace("../examples", str(EXAMPLES)), f"cell {number}", "exec"), scope)
    return scope


def test_the_notebook_runs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_notebook(tiny)
    printed = capsys.readouterr().out
    assert "oracle error" in printed
    assert "perplexity" in printed


@pytest.mark.slow
def test_the_notebook_runs_on_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = run_notebook(ROOT / SMOLLM2)
    assert scope["after"] < 5 * scope["before"]
