from __future__ import annotations

import json
import subprocess
import sys

import pytest

import graphprune
from graphprune.cli import main


@pytest.fixture
def folders(model, tokenizer, tmp_path):
    """A dense folder, and a pruned one with other widths in every layer."""
    dense, pruned = tmp_path / "dense", tmp_path / "pruned"
    model.save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    graphprune.save(graphprune.compile(model, 0.2, allocation="global"), pruned, tokenizer=tokenizer)
    return str(dense), str(pruned)


def test_table_and_files(folders, text, tmp_path, capsys):
    texts = tmp_path / "text.jsonl"
    half = len(text) // 2
    texts.write_text("".join(json.dumps({"text": part}) + "\n" for part in (text[:half], "", text[half:])))
    out = tmp_path / "found.json"
    options = ["--text", str(texts), "--lengths", "16", "32", "--tokens", "200", "-o", str(out)]
    assert main(["eval", *folders, *options]) == 0
    printed = capsys.readouterr().out
    for word in ("dense", "pruned", "parameters", "MACs", "on disk", "perplexity @16", "perplexity @32", "%"):
        assert word in printed
    found = json.loads(out.read_text())
    assert list(found) == ["dense", "pruned"]
    assert found["pruned"]["parameters"] < found["dense"]["parameters"]

    assert main(["eval", folders[1], *options[:-2], "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"pruned": found["pruned"]}
    assert "perplexity in windows of 32 tokens" in captured.err

    assert main(["eval", folders[1], "-o", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert json.loads(out.read_text()) == found


def test_tasks_latency_and_dtype(folders, task_folder, capsys):
    tasks = ["--tasks", "tiny", "tiny_norm", "--include-path", str(task_folder), "--limit", "3"]
    assert main(["eval", *folders, *tasks, "--latency", "--prompt", "8", "--dtype", "bfloat16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for one in found.values():
        assert one["parameter_bytes"] == 2 * one["parameters"]
        assert list(one["tasks"]) == ["tiny", "tiny_norm"]
        assert [timed["batch"] for timed in one["latency"]] == [1, 8]
        assert one["task_average"] is not None


def test_what_was_measured_is_kept_when_the_next_model_fails(folders, tmp_path, capsys):
    out = tmp_path / "found.json"
    assert main(["eval", folders[0], str(tmp_path / "missing"), "-o", str(out)]) == 1
    assert "missing" in capsys.readouterr().err
    assert list(json.loads(out.read_text())) == ["dense"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "missing.txt"], "missing.txt"),
        (["--tasks", "tiny", "--include-path", "missing"], "no folder missing"),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
        (["-o", "no/such/folder/x.json"], "cannot be written"),
    ],
)
def test_errors_are_one_line(folders, capsys, arguments, words):
    assert main(["eval", folders[0], *arguments]) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_models_are_told_apart(folders, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "dense"
    twin.symlink_to(folders[0])
    assert main(["eval", folders[0], str(twin), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == [folders[0], str(twin)]
    assert main(["eval", folders[0], folders[0]]) == 1
    assert "given twice" in capsys.readouterr().err


def test_the_command_line_starts_without_torch():
    code = "import sys, graphprune.cli; print(sorted({'torch', 'transformers', 'lm_eval'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
