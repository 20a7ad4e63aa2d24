"""``--config``, and the run.yaml that a run leaves."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import graphprune
from graphprune.cli import _parsers, main
from graphprune.cli_config import RUN, parse, settable, write_run
from graphprune.passes.methods import DEFAULT_METHOD


def parsed(*argv: str) -> argparse.Namespace:
    return parse(*_parsers(), argv)


@pytest.fixture
def config(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        (tmp_path / "asked.yaml").write_text(text)
        return str(tmp_path / "asked.yaml")

    return write


def test_every_kind_of_value(config: Any) -> None:
    path = config("""
model: some-org/some-model
output: small
ratio: 1e-1       # YAML takes this for text
round_to: 64      # as in Python
skip-first: 2
include: '*.mlp'  # one of a list
exclude: [a, b]
width: true
portable: false
method: null      # as if it were not there
max-shard-size: 20000
aggregation: max
""")
    found = parsed("prune", "--config", path)
    assert (found.model, found.output, found.ratio, found.round_to, found.skip_first) == (
        "some-org/some-model",
        "small",
        0.1,
        64,
        2,
    )
    assert (found.include, found.exclude, found.width, found.portable) == (["*.mlp"], ["a", "b"], True, False)
    assert (found.method, found.max_shard_size, found.aggregation, found.length) == (
        DEFAULT_METHOD,
        "20000",
        "max",
        128,
    )


def test_the_command_line_wins(config: Any) -> None:
    path = config("{model: a, output: small, ratio: 0.1, data: [x.txt, y.txt], width: true, no-verify: true}")
    found = parsed("prune", "--data", "z.txt", "--config", path, "--ratio", "0.2", "--no-width", "--verify")
    assert (found.model, found.output, found.ratio, found.data) == ("a", "small", 0.2, ["z.txt"])
    assert (found.width, found.no_verify) == (False, False)
    assert parsed("prune", "--ratio", "0.3", "b", f"--config={path}").model == "b"
    assert parsed("eval", "--config", config("models: [a, b]\ntokens: 5"), "--tokens", "6").models == ["a", "b"]
    assert parsed("eval", "--conf", config("models: [a, b]"), "--tokens", "6", "--", "c").models == ["c"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ratoi: 0.1", "asked.yaml: graphprune prune has no option 'ratoi': did you mean 'ratio'?"),
        ("knowledge: x", "has no option 'knowledge'."),
        ("config: other.yaml", "has no option 'config'"),
        ("1: 2", "has no option '1'"),
        ("ratio: much", "ratio is to be a number, not 'much'"),
        ("ratio: [0.1]", "ratio is to be a number, not [0.1]"),
        ("round-to: 2.5", "round-to is to be a whole number, not 2.5"),
        ("round-to: true", "round-to is to be a whole number, not True"),
        ("method: yes", "method is to be text, not True"),
        ("include: [a, {b: c}]", "include is to be text, not {'b': 'c'}"),
        ("width: 1", "width is true or false, not 1"),
        ("width: 'no'", "width is true or false, not 'no'"),
        ("aggregation: maxx", "aggregation is one of sum, prod, max, last, not 'maxx': did you mean 'max'?"),
        ("command: shear", "asked.yaml is for graphprune shear, not for graphprune prune"),
        ("- ratio", "has no options"),
        ("just words", "has no options"),
        ("ratio: [", "asked.yaml is no YAML: while parsing"),
        ("ratio: !!python/object/apply:os.getcwd []", "is no YAML: could not determine a constructor"),
        ("day: 2026-99-99", "is no YAML"),
    ],
)
def test_what_is_wrong_is_said(config: Any, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    assert main(["prune", "model", "-o", "small", "--config", config(text)]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_a_file_that_is_not_there_and_one_that_says_nothing(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", "model", "-o", "small", "--config", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml cannot be read" in capsys.readouterr().err
    assert parsed("prune", "model", "-o", "small", "--config", config("# nothing\n")).model == "model"


def test_what_is_required_still_is(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for text, words in (("ratio: 0.1", "MODEL, -o/--output"), ("model: a", "-o/--output"), ("output: a", "MODEL")):
        with pytest.raises(SystemExit) as exit_:
            main(["prune", "--config", config(text)])
        assert exit_.value.code == 2
        assert f"the following arguments are required: {words}\n" in capsys.readouterr().err
    assert main(["eval", "--config", config("models: []")]) == 1
    assert "models is empty" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, one in _parsers()[1].items() if name not in ("lm_eval", "completion")])
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    """With every option of every command, whatever kinds of values it has."""
    command = _parsers()[1][name]
    made = {int: 3, float: 0.25}
    asked: dict[str, Any] = {}
    for key, action in settable(command).items():
        one = True if action.nargs == 0 else action.choices[-1] if action.choices else made.get(action.type, "yes: 1")
        asked[key] = [one, one] if action.nargs == "+" else one
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(asked))
    first = parsed(name, "--config", str(tmp_path / "asked.yaml"))
    assert {key: getattr(first, action.dest) for key, action in settable(command).items()} == asked
    write_run(first, tmp_path)
    written = yaml.safe_load((tmp_path / RUN).read_text())
    assert written == {"command": name, **{k: v for k, v in asked.items() if k not in ("json", "log-level", "debug")}}
    second = parsed(name, "--config", str(tmp_path / RUN))
    different = {key for key, value in vars(first).items() if value != getattr(second, key)}
    assert different == {"config", "json", "log_level", "debug", "parser"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=101, **sizes)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_a_run_is_made_again(
    model: Path, tmp_path: Path, stream: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    asked = [str(model), "--ratio", "0.2", "--round-to", "2", "--deploy", "transformers", "--seed", "3", *stream]
    assert main(["prune", *asked, "--method", "random", "-o", str(first)]) == 0
    assert main(["prune", "--config", str(first / RUN)]) == 1
    assert "first exists already" in capsys.readouterr().err
    assert main(["prune", "--config", str(first / RUN), "-o", str(second)]) == 0
    plans = [graphprune.report(graphprune.load(folder)).plan for folder in (first, second)]
    assert plans[0].to_json() == plans[1].to_json()
    runs = [(folder / RUN).read_text() for folder in (first, second)]
    assert runs[0].replace(str(first), str(second)) == runs[1]
    assert not [path for path in first.iterdir() if path.name.startswith(".")]


def test_values_that_were_in_effect_and_folders_that_load(model: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    assert main(["prune", str(model), "--ratio", "0.2", "--deploy", "transformers", "-o", str(small)]) == 0
    run = yaml.safe_load((small / RUN).read_text())
    assert (run["method"], run["length"], run["aggregation"], run["width"]) == ("ppm", 128, "last", False)
    tokens = torch.arange(12).view(2, 6)
    ours, stock = graphprune.load(small), AutoModelForCausalLM.from_pretrained(small)
    assert torch.equal(ours(tokens).logits, stock(tokens).logits)
    graphprune.update_card(small, metadata={"license": "mit"})
    graphprune.save(ours, tmp_path / "again")  # what push_to_hub uploads
    assert not (tmp_path / "again" / RUN).exists()
