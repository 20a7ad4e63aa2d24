"""The scoreboard: cells are kept, done once, and what failed is said; the model and its data are tiny stand-ins."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import subprocess
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import save_words
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune
from graphprune.recovery.trainer import RecoveryTrainer

WORDS = 40
SPARED = {"skip_first": 1, "skip_last": 0}


@pytest.fixture
def bench(load_tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_tool("bench_quality")
    monkeypatch.setattr(module, "SETTINGS", {module.DENSE: ({},), module.BARE: ({},), "l1": ({}, SPARED)})
    monkeypatch.setattr(module, "OURS", ({"include": ["*.mlp"]},))
    return module


@pytest.fixture
def peers(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("quality_peers")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=3, vocab_size=WORDS, tie_word_embeddings=True, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """The arguments for a tiny model with its tokenizer, and a folder of data."""
    llama().save_pretrained(tmp_path / "model")
    save_words(tmp_path / "model", tmp_path / "data", WORDS)
    arguments = [str(tmp_path / "model"), "--data", str(tmp_path / "data"), "-o", str(tmp_path / "out" / "board.md")]
    return [*arguments, "--lengths", "16", "32", "--samples", "8", "--length", "16", "--tokens", "128"]


class Runs:
    """Stands for the processes of cells: notes which there were and answers for them."""

    def __init__(self, answer: Callable[[Any], dict]) -> None:
        self.answer, self.cells = answer, []

    def __call__(self, cell: Any, work: Path, timeout: float) -> dict:
        self.cells.append(cell)
        return self.answer(cell)


def answer(cell: Any) -> dict:
    """A result that says which cell it belongs to."""
    about = {"parameters": 1, "removed": cell.ratio, "prune_seconds": 1.5, "seconds": 2.0, "device": "CPU"}
    if "tasks" in cell.measures:
        about |= {"tasks": {"a": {"acc": 0.25}, "b": {"acc": 0.5, "acc_norm": 0.75}}, "average": 0.5}
    if "lengths" not in cell.measures:
        return about
    value = 10 + 100 * cell.ratio + len(cell.method) - len(cell.setting) + cell.setting.get("seed", 0)
    return {**about, "perplexity": {"16": value, "32": value / 2}}


def rows_of(path: Path, title: str) -> list[list[str]]:
    """The rows of the table under a title, without the line under its head."""
    lines = path.read_text().partition(f"{title}\n")[2].partition("\n#")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]


def test_every_cell_is_done_once(bench: ModuleType, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(answer)
    monkeypatch.setattr(bench, "run_cell", runs)
    asked = [*given, "--methods", "l1", "flap", "--ratios", "0.2", "0.5"]
    assert bench.main(asked) == 0
    assert [(c.method, c.ratio, c.setting) for c in runs.cells] == [
        ("dense", 0.0, {}),
        ("l1", 0.2, {}),
        ("l1", 0.2, SPARED),
        ("flap", 0.2, {"include": ["*.mlp"]}),
        ("l1", 0.5, {}),
        ("l1", 0.5, SPARED),
        ("flap", 0.5, {"include": ["*.mlp"]}),
    ]
    assert bench.main(asked) == 0
    assert len(runs.cells) == 7
    assert bench.main([*asked, "--ratios", "0.2", "0.3"]) == 0
    assert {cell.ratio for cell in runs.cells[7:]} == {0.3}
    runs.cells.clear()
    assert bench.main([*asked, "--tokens", "64"]) == 0  # what was measured otherwise is no answer
    assert len(runs.cells) == 7


def test_only_the_first_setting_that_can_be_reached(
    bench: ModuleType, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(lambda cell: {"failed": "no"} if cell.ratio == 0.5 and not cell.setting else answer(cell))
    monkeypatch.setattr(bench, "run_cell", runs)
    assert bench.main([*given, "--methods", "l1", "--ratios", "0.2", "0.5", "--first"]) == 0
    assert [(c.method, c.ratio, c.setting) for c in runs.cells] == [
        ("dense", 0.0, {}),
        ("l1", 0.2, {}),
        ("l1", 0.5, {}),
        ("l1", 0.5, SPARED),
    ]


def test_recovery_has_settings_of_its_own(bench: ModuleType, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(answer)
    monkeypatch.setattr(bench, "run_cell", runs)
    asked = [*given, "--ratios", "0.2", "--recover", "5000", "--seeds", "3", "5", "--rank", "16", "--bf16", "--tasks"]
    with pytest.raises(SystemExit):
        bench.main(asked)  # there are no instructions
    path = Path(given[2], "instruct", "alpaca_cleaned_first5000.jsonl")
    path.parent.mkdir()
    path.write_text("")
    Path(given[2], "lm_eval_tasks").mkdir()
    assert bench.main(asked) == 0
    methods = ["lorashear", "llm-pruner", "loraprune", "slimgpt", "flap"]
    trained = {"recover": 5000, "rank": 16, "bf16": True}
    wanted = [(method, {**trained, "seed": seed}) for method in methods for seed in (3, 5)]
    assert [(c.method, c.setting) for c in runs.cells[1:]] == wanted
    assert all(c.measures.keys() == {"lengths", "tokens", "tasks", "limit"} for c in runs.cells)
    out = Path(given[given.index("-o") + 1])
    assert "after recovery on 5,000 tokens" in out.read_text()
    assert "mean of all seeds" in out.read_text()
    assert rows_of(out, "windows of 16 tokens")[1] == ["lorashear", "39.00 (38.00–40.00)"]
    assert rows_of(out, "average accuracy in %")[1] == ["lorashear", "**50.00 (50.00–50.00)**"]
    assert rows_of(out, "### 20%")[-1] == ["flap", "25.00", "75.00"]


def test_cells_run_side_by_side(bench: ModuleType, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(3, timeout=60)  # nobody gets past it before three are there

    def together(cell: Any) -> dict:
        meeting.wait()
        return answer(cell)

    monkeypatch.setattr(bench, "run_cell", Runs(together))
    assert bench.main([*given, "--methods", "l1", "--ratios", "0.2", "--parallel", "3"]) == 0
    out = Path(given[given.index("-o") + 1])
    assert len(json.loads(out.with_suffix(".json").read_text())) == 3


def at_call(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, but the call of that number is interrupted."""
    calls = itertools.count(1)

    def run(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return run


@pytest.mark.parametrize("method", ["lorashear", "loraprune", "flap", "ppm"])
def test_a_recovered_cell_is_measured(
    bench: ModuleType, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    data = Path(given[2])
    words = [" ".join(f"w{(start + n) % WORDS}" for n in range(200)) for start in range(40)]
    for name in ("c4", "books"):
        (data / "calib" / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    path = data / "instruct" / "alpaca_cleaned_first5000.jsonl"
    path.parent.mkdir()
    rows = [{"instruction": text[:40], "output": text[40:80]} for text in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    setting = {"recover": 48_000, "seed": 1, "rank": 4, "distill": 0.5}
    calibration = {"samples": 8, "length": 96}
    cell = cell_of(bench, given, method, setting=setting, calibration=calibration)
    found = bench.measure(cell, tmp_path)
    assert found["removed"] == pytest.approx(0.2, abs=0.01)
    assert found["perplexity"]["16"] < 100
    assert list((tmp_path / "runs").iterdir()) == []
    if method == "lorashear":
        with monkeypatch.context() as patch:
            patch.setattr(RecoveryTrainer, "training_step", at_call(40, RecoveryTrainer.training_step))
            with pytest.raises(KeyboardInterrupt):
                bench.measure(cell, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(graphprune, "compile", None)  # it is pruned already
            again = bench.measure(cell, tmp_path)
        assert again["perplexity"] == found["perplexity"]


@pytest.mark.parametrize("method", ["lorashear", "loraprune"])
def test_what_trains_while_it_prunes_has_the_seed_of_the_cell(
    load_tool: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    tool = load_tool("quality_recovery")
    asked: list[Any] = []
    monkeypatch.setattr(tool, "passes_of", lambda name, settings: asked.append(settings))
    state = tmp_path / "state"
    tool._passes(method, tool.TrainBack(recover=1000, seed=7), 100, state)
    assert [(one.training.seed, one.training.checkpoint) for one in asked] == [(7, state)]


def test_it_goes_on_where_it_was_stopped(bench: ModuleType, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped_at_the_third(cell: Any) -> dict:
        if len(runs.cells) == 3:
            raise KeyboardInterrupt
        return answer(cell)

    runs = Runs(stopped_at_the_third)
    monkeypatch.setattr(bench, "run_cell", runs)
    asked = [*given, "--methods", "l1", "flap", "--ratios", "0.2"]
    out = Path(given[given.index("-o") + 1])
    assert bench.main(asked) == 130
    assert len(json.loads(out.with_suffix(".json").read_text())) == 2
    assert ["flap", "not measured"] in rows_of(out, "windows of 16 tokens")
    assert bench.main(asked) == 0
    assert [cell.method for cell in runs.cells] == ["dense", "l1", "l1", "l1", "flap"]
    assert runs.cells[2] == runs.cells[3]
    assert len(json.loads(out.with_suffix(".json").read_text())) == 4


def test_the_tables(bench: ModuleType, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run_cell", Runs(answer))
    (Path(given[given.index("--data") + 1]) / "lm_eval_tasks").mkdir()
    out = Path(given[given.index("-o") + 1])
    assert bench.main([*given, "--methods", "l1", "flap", "--ratios", "0.2", "0.5", "--tasks", "a", "b"]) == 0
    assert rows_of(out, "windows of 16 tokens") == [
        ["method", "20%", "50%"],
        ["l1", "**30.00**", "**60.00**"],  # spared: two options less than without
        ["flap", "33.00", "63.00"],
    ]
    assert rows_of(out, "windows of 32 tokens")[2] == ["flap", "16.50", "31.50"]
    assert rows_of(out, "average accuracy in %")[1] == ["l1", "**50.00**", "**50.00**"]
    assert rows_of(out, "### 20%") == [["method", "a", "b"], *([m, "25.00", "75.00"] for m in ("dense", "l1", "flap"))]
    cells = rows_of(out, "## Every cell")
    assert cells[2] == ["l1", "defaults", "20%", "20.00%", "32.00", "16.00", "1.5"]
    assert cells[3][1] == "skip\\_first=1, skip\\_last=0"
    assert len(cells) == 1 + 7
    text = out.read_text()
    assert "--ratios 0.2 0.5" in text  # the command
    assert "dense 15.00 at 16, 7.50 at 32" in text
    assert "the best of its settings, by perplexity at 16" in text
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_tasks_are_run_for_the_best_setting(
    bench: ModuleType, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(answer)
    monkeypatch.setattr(bench, "run_cell", runs)
    (Path(given[given.index("--data") + 1]) / "lm_eval_tasks").mkdir()
    assert bench.main([*given, "--methods", "l1", "--ratios", "0.2", "--tasks", "--limit", "3"]) == 0
    tasks = [cell for cell in runs.cells if "tasks" in cell.measures]
    assert [(cell.method, cell.setting) for cell in tasks] == [("dense", {}), ("l1", SPARED)]
    assert tasks[0].measures == {"tasks": ["local_commonsense"], "limit": 3}


def test_what_failed_is_said_and_done_again_when_asked(
    bench: ModuleType, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Runs(lambda cell: {"failed": "ValueError: a|b"} if cell.setting != SPARED else answer(cell))
    monkeypatch.setattr(bench, "run_cell", broken)
    asked = [*given, "--methods", "l1", "flap", "--ratios", "0.2"]
    out = Path(given[given.index("-o") + 1])
    assert bench.main(asked) == 0
    assert rows_of(out, "windows of 16 tokens")[1:] == [["l1", "**30.00**"], ["flap", "FAILED"]]
    failed = [row for row in rows_of(out, "## Every cell") if "FAILED: ValueError: a\\|b" in row]
    assert [row[0] for row in failed] == ["dense", "l1", "flap"]
    assert bench.main(asked) == 0
    assert len(broken.cells) == 4
    working = Runs(answer)
    monkeypatch.setattr(bench, "run_cell", working)
    assert bench.main([*asked, "--retry"]) == 0
    assert [cell.method for cell in working.cells] == ["dense", "l1", "flap"]
    assert "FAILED" not in out.read_text()


def test_infinity_is_kept_and_never_best(bench: ModuleType, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(cell: Any) -> dict:
        return answer(cell) | ({"perplexity": {"16": "inf", "32": "inf"}} if cell.setting == SPARED else {})

    monkeypatch.setattr(bench, "run_cell", Runs(overflow))
    out = Path(given[given.index("-o") + 1])
    assert bench.main([*given, "--methods", "l1", "--ratios", "0.2"]) == 0
    assert rows_of(out, "windows of 16 tokens")[1] == ["l1", "**32.00**"]
    assert rows_of(out, "## Every cell")[3][4:6] == ["inf", "inf"]


def cell_of(bench: ModuleType, given: list[str], method: str, ratio: float = 0.2, **changes: Any) -> Any:
    asked: dict[str, Any] = {"lengths": [16, 32], "tokens": 128, "tasks": None, "limit": None, "recover": None}
    arguments = argparse.Namespace(**asked, samples=8, length=16, model=given[0], data=given[2])
    cell = bench.Scoreboard(arguments, None).cell(method, changes.pop("setting", {}), ratio)
    return bench.Cell(**{**asdict(cell), **changes})


@pytest.mark.parametrize("method", ["dense", "bare", "wanda-sp"])
def test_a_cell_is_measured(bench: ModuleType, given: list[str], tmp_path: Path, method: str) -> None:
    ratio = 0.0 if method == "dense" else 0.2
    found = bench.measure(cell_of(bench, given, method, ratio), tmp_path)
    assert found["removed"] == pytest.approx(ratio, abs=0.01)
    assert found["parameters"] == pytest.approx((1 - ratio) * sum(p.numel() for p in llama().parameters()), rel=0.01)
    assert found["perplexity"].keys() == {"16", "32"}
    assert all(10 < value < 1000 for value in found["perplexity"].values())
    assert json.loads(json.dumps(found)) == found


def test_another_number_of_parameters_is_no_result(
    bench: ModuleType, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quality_peers

    monkeypatch.setitem(quality_peers.PEERS, "lazy", lambda model, ratio, rows, setting: model)
    with pytest.raises(ValueError, match=r"removed 0.000% of all parameters, which is not 20.000%"):
        bench.measure(cell_of(bench, given, "lazy"), tmp_path)


def test_a_crash_is_one_cell(bench: ModuleType, given: list[str], tmp_path: Path) -> None:
    result = bench.run_cell(cell_of(bench, given, "l1", model=str(tmp_path / "none.gguf")), tmp_path, timeout=300)
    assert result == {"failed": f"graphprune.errors.GraphPruneError: There is no file {tmp_path / 'none.gguf'}."}


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("import sys; print('a\\nb\\n\\n', file=sys.stderr); sys.exit(3)", "b"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import time; time.sleep(60)", "not finished after 3 s"),
    ],
)
def test_how_a_process_ends(
    bench: ModuleType, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, why: str
) -> None:
    script = tmp_path / "ends.py"
    script.write_text(code)
    monkeypatch.setattr(bench, "__file__", str(script))
    result = bench.run_cell(cell_of(bench, given, "l1"), tmp_path, timeout=3 if "sleep" in code else 300)
    assert result == {"failed": why}


def test_a_process_gets_the_whole_cell(
    bench: ModuleType,
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    cell = cell_of(bench, given, "flap", setting={"include": ["*.mlp"], "skip_first": 1})

    def in_this_process(command: list[str], **options: Any) -> subprocess.CompletedProcess:
        assert bench.main(command[2:]) == 0
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out, "")

    monkeypatch.setattr(bench, "measure", lambda cell, work: {**asdict(cell), "in": str(work)})
    monkeypatch.setattr(bench.subprocess, "run", in_this_process)
    assert bench.run_cell(cell, tmp_path, timeout=1) == {**asdict(cell), "in": str(tmp_path)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--methods", "magic"], "no method 'magic'"),
        (["--ratios", "1.5"], "between 0 and 1"),
        (["-o", "board.txt"], "does not end in .md"),
        (["--tasks"], "has no lm_eval_tasks"),
        (["--data", "nowhere"], "nowhere has no calib/c4.jsonl"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(
    bench: ModuleType, given: list[str], changed: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        bench.main([*given, *changed])
    assert message in capsys.readouterr().err


def test_a_file_of_something_else_is_left_alone(bench: ModuleType, given: list[str]) -> None:
    path = Path(given[given.index("-o") + 1]).with_suffix(".json")
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(SystemExit, match="left as it is"):
        bench.main([*given, "--methods", "l1"])
    assert path.read_text() == "mine"


def test_channels_are_counted(peers: ModuleType) -> None:
    model = llama()
    total = sum(p.numel() for p in model.parameters())
    for blocks in ([0, 1, 2], [1, 2]):
        count, width = peers.channels(model, 0.2, blocks)
        assert width == 88
        assert abs(count * 96 * len(blocks) - 0.2 * total) <= 96 * len(blocks) / 2
    with pytest.raises(ValueError, match="cannot be removed from the FFNs of 1 blocks"):
        peers.channels(model, 0.5, [1])


@pytest.mark.parametrize("setting", [{}, SPARED, {"global_pruning": True}, {**SPARED, "global_pruning": True}])
@pytest.mark.parametrize("name", ["torch-pruning L2", "torch-pruning Taylor", "optipfair", "optipfair with data"])
def test_peers_prune_as_many_parameters(peers: ModuleType, name: str, setting: dict[str, Any]) -> None:
    package = name.split()[0].replace("-", "_")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: `make quality` does that")
    model = llama()
    before = sum(p.numel() for p in model.parameters())
    blocks = peers.blocks_to_prune(model, setting)
    count, width = peers.channels(model, 0.2, blocks)
    rows = torch.randint(0, WORDS, (8, 16), generator=torch.Generator().manual_seed(0))
    pruned = peers.PEERS[name](model, 0.2, rows, setting)
    assert before - sum(p.numel() for p in pruned.parameters()) == 96 * count * len(blocks)
    widths = [layer.mlp.down_proj.in_features for layer in pruned.model.layers]
    assert [i for i, left in enumerate(widths) if left < width] == blocks
    if "global_pruning" not in setting:
        assert {widths[i] for i in blocks} == {width - count}
    assert pruned(input_ids=rows).logits.shape == (8, 16, WORDS)
