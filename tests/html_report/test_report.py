"""What is recorded of a pruned model, in the terminal, as JSON and as a page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
from browser import browser, needs_browser
from helpers import X, toy

import graphprune
from graphprune import GraphPruneError
from graphprune.cli import main
from graphprune.evaluate import Evaluation, Latency
from graphprune.html_report import collect, to_html
from graphprune.html_report.charts import _decades, _ticks, lines
from graphprune.ir.knowledge import GroupKnowledge, Knowledge
from graphprune.recovery.recover import Round, Stage

HOSTILE = "</td><img src=x onerror=alert(1)>"
AXIS = "layers.{}.mlp.up.weight[0]"


def evaluation(parameters: int, perplexity: float) -> Evaluation:
    tasks = {"quiz": {"acc,none": 0.5, "acc_stderr,none": 0.01}}
    return Evaluation(parameters, 4 * parameters, 9, None, {128: perplexity}, tasks, [Latency(1, 128, 5.0, None)])


def stage() -> Stage:
    rounds = [Round({"wiki": 0.75, HOSTILE: 0.25}, {"wiki": 2.5, HOSTILE: 2.0}) for _ in range(3)]
    start = {"wiki": 4.0, HOSTILE: 3.0}
    return Stage("pretraining", {"wiki": 2.0, HOSTILE: 1.5}, start, rounds, [(1, 4.5), (2, 4.25)], 2)


def knowledge() -> Knowledge:
    groups = [GroupKnowledge(AXIS.format(n), ["m"], 48, [12], [math.inf if n else 1.5]) for n in range(2)]
    return Knowledge((0.25,), "perplexity", 1.0, 8, groups)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``shear`` leaves one, with all that can be in it; its model was pruned twice."""
    folder = tmp_path_factory.mktemp("run")
    small = graphprune.compile(toy(), 0.2, method="magnitude", example_inputs=X)
    graphprune.save(graphprune.compile(small, 0.2, method="magnitude", example_inputs=X), folder / "pruned")
    (folder / "recovery" / "pretraining").mkdir(parents=True)
    (folder / "recovery" / "pretraining" / "stage.json").write_text(json.dumps(asdict(stage())))
    found = {"dense": evaluation(1000, 5.0).to_dict(), "pruned": evaluation(800, math.inf).to_dict()}
    (folder / "evaluation.json").write_text(json.dumps(found))
    (folder / "knowledge.json").write_text(knowledge().to_json())
    return folder


def test_everything_is_found(run: Path) -> None:
    found = collect(run)
    assert len(found.reports) == 2
    assert found.class_name == "ToyTransformer"
    first, last = found.reports
    name = AXIS.format(0)
    assert found.widths[name] == (first.widths[name][0], last.widths[name][1]) == (48, last.widths[name][1])
    assert found.stages == [stage()]
    assert found.evaluations == {"dense": evaluation(1000, 5.0), "pruned": evaluation(800, math.inf)}
    assert found.knowledge == knowledge()


def test_a_saved_folder_alone_and_files_from_elsewhere(run: Path) -> None:
    assert collect(run / "pruned").evaluations == {}
    found = collect(run / "pruned", [run / "evaluation.json"], run / "knowledge.json")
    assert list(found.evaluations) == ["dense", "pruned"]
    assert found.knowledge is not None
    titles = to_html(collect(run / "pruned")).split("<h2>")[1:]
    assert [title.partition("<")[0] for title in titles] == ["Size", "Widths", "Scores", "Left alone", "Time"]


def test_the_terminal_is_plain_when_piped(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    for text in ("ToyTransformer", "layers.1", "48→", "perplexity @128", "round 2 (kept)", "2.5000 (75%)", "+ at 0.25"):
        assert text in printed, text


def test_json_and_page_from_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    assert main(["report", str(run), "--json", "-o", str(page)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["widths"][AXIS.format(0)] == list(collect(run).widths[AXIS.format(0)])
    assert [one["method"] for one in data["reports"]] == ["magnitude", "magnitude"]
    assert data["evaluations"]["pruned"]["perplexity"] == {"128": "inf"}
    text = page.read_text(encoding="utf-8")
    sections = [part.partition("<")[0] for part in text.split("<h2>")[1:]]
    recovery, more = "Recovery: pretraining", ["Knowledge distribution", "Left alone", "Time"]
    assert sections == ["Size", "Widths", "Scores", "Evaluation", recovery, *more]
    assert "<img" not in text
    assert "<script" not in text
    assert text.count("<polyline") == 5 * 2 + 2 + 2 + 1 + 1
    assert main(["report", str(run), "-o", str(tmp_path / "report.pdf")]) == 1
    assert "must end in .html" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("recovery/pretraining/stage.json", '{"name": "x"}', "is damaged: 'rounds' is missing"),
        ("evaluation.json", '{"dense": {"parameters": "many"}}', "dense: parameters is damaged"),
        ("evaluation.json", '{"dense": 5}', "expected dict"),
        ("knowledge.json", "[]", "no knowledge distribution"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(GraphPruneError, match=message):
        collect(tmp_path)


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match="holds nothing to report"):
        collect(tmp_path)
    with pytest.raises(GraphPruneError, match="There is no folder"):
        collect(tmp_path / "nowhere")


def test_charts_leave_out_what_is_not_finite() -> None:
    chart = lines({"a": [(0, 1.0), (1, math.inf), (2, 3.0)]}, across="x", up="y")
    assert chart.count("<circle") == 2
    assert "inf" not in chart
    assert lines({"a": [(0, math.nan)]}, across="x", up="y") == ""
    assert lines({"a": [(0, 2.0)]}, across="x", up="y").count("<circle") == 1


def test_ticks() -> None:
    assert _ticks(0.0, 1.0) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert _ticks(1e-15, 3e-15)[0] <= 1e-15 < 3e-15 <= _ticks(1e-15, 3e-15)[-1]
    assert _decades(-20, 3000, 1.0) == [-10, -1, 0, 1, 10, 100, 1000]
    assert len(_decades(0, 1e12, 1e-3)) <= 7


@needs_browser
def test_the_page_fits_a_telephone(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(to_html(collect(run)), encoding="utf-8")
    with browser(390, 844) as window:
        window.open(page)
        assert window.run("return document.documentElement.scrollWidth") <= 390
        assert window.run("return document.images.length") == 0
        window.press("Tab", "Enter")
        assert window.run("return location.hash") == "#s0"
        assert window.errors() == []
