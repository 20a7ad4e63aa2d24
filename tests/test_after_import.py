"""Something is done as soon as a module has been imported, once, and nothing else about the import changes."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import pytest

from graphprune.after_import import after_import


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "module_for_after_import.py").write_text("value = 3\n\n\ndef function():\n    return value\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "module_for_after_import", raising=False)
    return "module_for_after_import"


def test_a_module_that_is_imported_later(name: str) -> None:
    seen: list[int] = []
    before = list(sys.meta_path)
    after_import(name, lambda: seen.append(sys.modules[name].value))
    assert seen == []
    module = importlib.import_module(name)
    assert seen == [3]
    assert sys.meta_path == before
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__
    assert "return value" in inspect.getsource(module.function)
    importlib.reload(module)
    assert seen == [3]


def test_a_module_that_is_there(name: str) -> None:
    importlib.import_module(name)
    seen: list[str] = []
    after_import(name, lambda: seen.append("now"))
    assert seen == ["now"]


def test_other_modules_are_left_alone(name: str) -> None:
    before = list(sys.meta_path)
    after_import("module_that_is_nowhere", lambda: pytest.fail("it was not imported"))
    try:
        assert importlib.import_module(name).value == 3
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("module_that_is_nowhere")
    finally:
        sys.meta_path[:] = before
