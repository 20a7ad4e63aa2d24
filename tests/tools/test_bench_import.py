"""The bench of imports takes off what Python itself takes, and compares with torch."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest


def test_ratios(
    load_tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load_tool("bench_import")
    took = {"python": 0.5, "graphprune": 0.6, "torch": 2.5, "compile": 4.5}
    monkeypatch.setattr(tool, "seconds", lambda code: next(took[n] for n, c in tool.IMPORTS.items() if c == code))
    assert tool.main(["--repeats", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in printed] == ["0.05", "1.00", "2.00"]
