"""Rules of the house that a test can hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "graphprune").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])
EVERYTHING = sorted(
    path
    for folder in ("graphprune", "passes", "tests", "tools", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)

# Model types that are also words of the trade or of English, which the code needs: using one names no architecture.
WORDS = {
    "aria",  # WAI-ARIA: the attributes that say what a part of a page is
    "align",  # what the axis algebra does to two descriptions
    "beam",  # a kind of search
    "bit",  # of a number
    "clip",  # an operator of torch
    "codegen",  # torch.fx: how a graph becomes Python
    "dots",  # in names
    "git",  # version control
    "led",  # English: "can be led back to"
    "mt",  # the transpose of a tensor, x.mT
}


def model_names() -> list[str]:
    """Every model type of the installed transformers as it may be written, also without its version number."""
    names: set[str] = set()
    for name in CONFIG_MAPPING_NAMES:
        for written in {name, re.sub(r"[\d.]+$", "", name)}:
            names |= {written, written.replace("_", "-"), written.replace("_", "").replace("-", "")}
    return sorted((name for name in names - WORDS if len(name.strip("_-")) > 1), key=len, reverse=True)


def any_of(words: list[str]) -> str:
    """A pattern of many words: one look at the first letter rules most of them out, which ``a|b|…`` tries in turn."""
    by_first: dict[str, list[str]] = {}
    for word in words:
        by_first.setdefault(word[0], []).append(re.escape(word[1:]))
    return "|".join(f"{re.escape(first)}(?:{'|'.join(rest)})" for first, rest in by_first.items())


# A whole word (an underscore ends one), or the start of a class name such as GPT2Attention.
NAMES = re.compile(rf"(?<![A-Za-z0-9])(?i:{any_of(model_names())})(?:(?![A-Za-z0-9])|(?=[A-Z][a-z]))")


def test_the_pattern_finds_names() -> None:
    for text in (
        "gpt2",
        "Llama",
        "if 'qwen3' in x",
        "LlamaAttention",
        "is_bert",
        "GPTNeoXLayer",
        "gpt-neox",
        "QWEN",
        "phi",
    ):
        assert NAMES.search(text), text
    for text in ("optional", "option", "bloomed", "convert", "evit", "phial"):
        assert not NAMES.search(text), text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_architecture_is_named(path: Path) -> None:
    """Whatever is known about a model is found in its graph, for every model alike."""
    text = path.read_text().replace("opt_einsum", "")  # a package that torch uses
    assert [f"{n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if NAMES.search(line)] == []


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: str(path.relative_to(ROOT)))
def test_passes_are_imported_as_graphprune_passes(path: Path) -> None:
    """A second copy of the package would have a second copy of every registry."""
    assert not {name for name in imports(path) if name.split(".")[0] == "passes"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_pickled(path: Path) -> None:
    assert not {
        name for name in imports(path) if name.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
    }
    calls = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    assert not calls & {"torch.load", "torch.save", "pickle.load", "pickle.dump"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_error_is_swallowed(path: Path) -> None:
    """``except Exception: pass`` and bare ``except:`` hide what went wrong."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            )
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            assert raises or not broad, f"line {node.lineno}"


def test_every_python_package_is_packaged() -> None:
    """``passes`` is mapped by hand: a new folder must be on the list, or an installed copy lacks it."""
    text = (ROOT / "pyproject.toml").read_text()
    folders = {path.parent for path in SOURCES if path.name == "__init__.py"}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    wanted = {f"graphprune.{name}" if name.split(".")[0] == "passes" else name for name in names}
    listed = set(re.findall(r'^    "(graphprune[\w.]*)",$', text, re.MULTILINE))
    assert wanted == listed
