"""What all commands have in common: help, levels, errors, exit codes, JSON."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune
from graphprune.cli import _parsers, main

COMMANDS = list(_parsers()[1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "dense"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=101, **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_examples_that_parse(name: str) -> None:
    command = _parsers()[1][name]
    text = command.format_help()
    examples = [line.strip() for line in text.splitlines() if line.strip().startswith(f"graphprune {name} ")]
    assert len(examples) >= 2
    for example in examples:
        arguments = [part for part in shlex.split(example.partition(">")[0])[1:] if part != "…"]
        if "--config" not in arguments:
            _parsers()[0].parse_args(arguments)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("lm_eval", "completion")])
def test_every_command_has_what_all_have(name: str) -> None:
    options = _parsers()[1][name]._option_string_actions
    assert {"--config", "--json", "--log-level", "-v", "-q", "--debug"} <= options.keys()


def test_the_help_tells_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert "exit codes: 0 done, 1 an error" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"graphprune {graphprune.__version__}\n"


def inspecting(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Have ``graphprune inspect`` meet an error."""

    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(graphprune, "inspect", fail)


def test_errors_are_a_line_unless_asked(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inspecting(monkeypatch, graphprune.GraphPruneError("there is no such thing"))
    assert main(["inspect", str(model), "-q"]) == 1
    assert capsys.readouterr().err == "graphprune: there is no such thing\n"
    with pytest.raises(graphprune.GraphPruneError):
        main(["inspect", str(model), "--debug"])

    inspecting(monkeypatch, TypeError("what a bug says\nat length"))
    capsys.readouterr()
    assert main(["inspect", str(model), "-q"]) == 1
    said = "graphprune: unexpected TypeError: what a bug says (--debug shows where)\n"
    assert capsys.readouterr().err == said
    with pytest.raises(TypeError):
        main(["inspect", str(model), "--debug"])

    inspecting(monkeypatch, KeyboardInterrupt())
    assert main(["inspect", str(model)]) == 130
    assert "interrupted, nothing was written" in capsys.readouterr().err


def test_debug_shows_where_a_file_of_options_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "asked.yaml").write_text("ratoi: 1")
    assert main(["inspect", "x", "--config", str(tmp_path / "asked.yaml")]) == 1
    with pytest.raises(graphprune.GraphPruneError, match="ratoi"):
        main(["inspect", "x", "--config", str(tmp_path / "asked.yaml"), "--debug"])


@pytest.mark.parametrize(
    ("level", "progress", "warned"), [("info", True, 2), ("warning", False, 2), ("error", False, 0)]
)
def test_levels(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    level: str,
    progress: bool,
    warned: int,
) -> None:
    def inspect(*args: object, **options: object) -> str:
        warnings.warn("of a library", stacklevel=2)
        logging.getLogger("some.library").warning("of another library")
        return "found"

    monkeypatch.setattr(graphprune, "inspect", inspect)
    heard: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *args, **kwargs: heard.append(str(message)))
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("some.library").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert main(["inspect", str(model), "--log-level", level]) == 0
    finally:
        logging.getLogger("some.library").removeHandler(handler)
    captured = capsys.readouterr()
    assert captured.out == "found\n"
    assert ("loading" in captured.err) is progress
    assert len(heard) == warned
    assert logging.root.manager.disable == logging.NOTSET


def test_json_of_inspect_viz_and_card(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> dict:
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    found = said("inspect", str(model), "--inner-axes")
    groups = {group["name"]: group for group in found["groups"]}
    mlp = groups["model.layers.1.mlp.gate_proj.weight[0]"]
    assert (mlp["size"], mlp["prunable"], mlp["reason"]) == (48, True, None)
    assert "model.layers.1.mlp.down_proj.weight[1]" in mlp["members"]
    words = groups["model.embed_tokens.weight[0]"]
    assert (words["prunable"], "looked up by index" in words["reason"]) == (False, True)
    assert (found["class"], found["unruled"]) == ("LlamaForCausalLM", {})

    drawn = said("viz", str(model), "--config-only", "-o", str(tmp_path / "graph.dot"))
    assert drawn["output"] == str(tmp_path / "graph.dot")
    assert drawn["groups"] > 0

    small = tmp_path / "small"
    assert said("prune", str(model), "--ratio", "0.2", "--method", "random", "-o", str(small))["output"] == str(small)
    assert said("card", str(small), "--license", "mit") == {"output": str(small / "README.md")}


def test_who_reads_no_more_is_no_error() -> None:
    """As ``graphprune … | head``; in a process of its own, for its stdout is lost."""
    code = (
        "import sys; from graphprune import cli, cli_completion\n"
        "cli_completion._script = lambda *_: 'a few words'\n"
        "sys.exit(cli.main(['completion', 'bash']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False, env=buffered
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
