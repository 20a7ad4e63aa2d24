"""The scripts of ``graphprune completion``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graphprune.cli import main


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    return tmp_path / "script"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["rep"], {"report"}),
        (["prune", "--rat"], {"--ratio"}),
        (["eval", "--lo"], {"--log-level"}),
        (["prune", "model", "--aggregation", ""], {"sum", "prod", "max", "last"}),
        (["inspect", "scr"], {"script"}),
        (["prune", "x", "--plan", "scr"], {"script"}),
        (["card", "fol"], {"folder"}),
        (["completion", "f"], {"fish"}),
    ],
)
def test_bash_completes(script: Path, words: list[str], found: set[str]) -> None:
    (script.parent / "folder").mkdir()
    line = " ".join(f"'{word}'" for word in ["graphprune", *words])
    code = f"""source ./script; COMP_WORDS=({line}); COMP_CWORD={len(words)}
        _shtab_graphprune graphprune; printf '%s\\n' "${{COMPREPLY[@]}}" """
    done = subprocess.run(["bash", "-c", code], cwd=script.parent, capture_output=True, text=True, check=True)
    assert found <= set(done.stdout.split())
    assert words[-1] == "" or set(done.stdout.split()) == found


@pytest.mark.parametrize(("shell", "word"), [("zsh", "#compdef graphprune"), ("fish", "complete -c graphprune")])
def test_other_shells(shell: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for said in (word, "max-shard-size", "knowledge"):
        assert said in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    captured = capsys.readouterr()
    assert "pip install 'graphprune[completion]'" in captured.err
    assert captured.out == ""
