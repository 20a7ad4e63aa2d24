"""The code blocks of the documentation run, in order, as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_runs(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text("utf-8")
    scope: dict[str, object] = {"__name__": page.stem}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, str(page), "exec"), scope)
    printed = capsys.readouterr().out
    for shown in re.findall(r"```text\n(.*?)```", text, re.DOTALL):
        for line in shown.strip().splitlines():
            # A line number belongs to the reader's file.
            said = re.escape(line).replace(r"model\.py:20", r"\S+")
            assert re.search(said, printed), line
