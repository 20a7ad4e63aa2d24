"""The whole pipeline on a tiny Llama with a tokenizer of words: it goes on wherever it is interrupted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quick
from recovery.words import FIRST, WORDS, tiny_model, word_tokenizer

import graphprune
from graphprune import GraphPruneError, Recovery, Shear, shear
from graphprune.cli import main
from graphprune.data.corpus import prepare
from graphprune.data.sources import sources_of
from graphprune.passes.add_adapters import Adapters
from graphprune.passes.train_lhspg import Lhspg
from graphprune.recovery.dry_run import forecast
from graphprune.recovery.shear import Measures, Shorn, even_rows

WHAT = Shear(
    0.2,
    samples=12,
    length=16,
    validation=4,
    lhspg=Lhspg(warmup_steps=1, periods=2, period_steps=2, final_steps=0),
    recovery=Recovery(
        adapters=Adapters(rank=4), lr=1e-2, batch=4, rows_at_once=4, round_steps=3, rounds=2, warmup_steps=0
    ),
)
STAGES = ["pruning", "recovering", "measuring"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shear") / "model"
    tiny_model().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of text, and instructions beside their folder."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "texts").mkdir()
    for name, step in (("ones", 1), ("twos", 2)):
        rows = [" ".join(f"w{FIRST + (start + step * n) % (WORDS - FIRST)}" for n in range(100)) for start in range(20)]
        (folder / "texts" / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    asked = [{"instruction": f"w{n} w{n + 1}", "output": f"w{n + 2} w{n + 3}"} for n in range(FIRST, 40)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return folder


def given(model: Path, data: Path) -> dict[str, Any]:
    from graphprune.io.models import load_model

    _, tokenizer = load_model(str(model))
    text = " ".join(f"w{FIRST + n % (WORDS - FIRST)}" for n in range(200))
    measures = Measures(text=text, lengths=(16,))
    return {"tokenizer": tokenizer, "data": data / "texts", "measures": measures}


def load(model: Path) -> Any:
    from graphprune.io.models import load_model

    return load_model(str(model))[0]


@pytest.mark.parametrize("method", quick(["lorashear", "loraprune", "wanda-sp"], {"lorashear", "wanda-sp"}))
def test_it_prunes_recovers_and_measures(method: str, model: Path, data: Path, tmp_path: Path) -> None:
    dense = load(model)
    done = shear(dense, tmp_path / "run", replace(WHAT, method=method), **given(model, data))
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"pruned", "model", "report.md", "evaluation.json"}
    saved = graphprune.load(tmp_path / "run" / "model")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, done.model(ids).logits)
    assert graphprune.report(saved).plan.method == method
    assert abs(graphprune.report(saved).ratio - 0.2) < 0.02
    found = done.evaluations
    assert list(found) == ["dense", "pruned", "recovered"]
    assert found["pruned"]["parameters"] == found["recovered"]["parameters"] < found["dense"]["parameters"]
    assert done.stages[0].best > 0
    report = (tmp_path / "run" / "report.md").read_text()
    for word in (
        "20% of all parameters removed by",
        "perplexity @16",
        "Recovery: pretraining",
        "round 1",
        "mixing.png",
    ):
        assert word in report
    assert (tmp_path / "run" / "mixing.png").stat().st_size > 10_000


INTERRUPTED = replace(WHAT, lhspg=replace(WHAT.lhspg, training=replace(WHAT.lhspg.training, checkpoint_steps=1)))


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Shorn:
    """What the run comes to that nothing interrupts."""
    options = {**given(model, data), "instruct": data / "asked.jsonl"}
    return shear(load(model), tmp_path_factory.mktemp("whole"), INTERRUPTED, **options)


class Stop(KeyboardInterrupt):
    pass


MOMENTS = [
    *("pruning", "training: step 3"),
    *("recovering", "pretraining: step 4", "instruct: before", "instruct: step 2"),
    *("measuring the dense", "measuring the recovered"),
]


@pytest.mark.parametrize("at", quick(MOMENTS, {"training: step 3", "instruct: step 2", "measuring the recovered"}))
def test_it_goes_on_where_it_stopped(at: str, whole: Shorn, model: Path, data: Path, tmp_path: Path) -> None:
    what, options = INTERRUPTED, {**given(model, data), "instruct": data / "asked.jsonl"}
    lines: list[str] = []

    def stop(text: str) -> None:
        lines.append(text)
        if text.startswith(at):
            raise Stop

    with pytest.raises(Stop):
        shear(load(model), tmp_path / "run", what, progress=stop, **options)
    before, lines[:] = list(lines), []
    found = shear(load(model), tmp_path / "run", what, progress=lines.append, **options)
    for stage in ("pruning 20%", "pretraining: full model", "measuring the dense"):
        begun = [text for text in before if text.startswith(stage)]
        if begun and before[-1] != begun[-1] and not at.startswith("training"):
            assert not any(text.startswith(stage) for text in lines), stage  # what was done is not done again
    assert found.stages == whole.stages
    assert found.evaluations == whole.evaluations
    for one, other in zip(found.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_of_something_else_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    shear(load(model), tmp_path, replace(WHAT, method="wanda-sp"), **given(model, data))
    with pytest.raises(GraphPruneError, match="a run of another model, other data or other settings"):
        shear(load(model), tmp_path, replace(WHAT, method="wanda-sp", ratio=0.3), **given(model, data))


def test_pruning_without_pretraining_text_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    options = given(model, data)
    asked = prepare(
        sources_of(data / "asked.jsonl", instruct=True), options["tokenizer"], tmp_path, length=16, validation=2
    )
    with pytest.raises(GraphPruneError, match="calibrated on pretraining text"):
        even_rows(asked, 4, 0)


def test_rows_come_evenly_from_the_sources(model: Path, data: Path, tmp_path: Path) -> None:
    corpora = prepare(sources_of(data / "texts"), given(model, data)["tokenizer"], tmp_path, length=16, validation=2)
    rows = even_rows(corpora, 9, 0)
    assert rows.shape == (9, 16)
    of_first = {tuple(corpora[0].train[n]["input_ids"].tolist()) for n in range(len(corpora[0].train))}
    assert sum(tuple(row.tolist()) in of_first for row in rows) == 5
    with pytest.raises(GraphPruneError, match="rows in all, and samples=9999"):
        even_rows(corpora, 9999, 0)


def test_a_dry_run_writes_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    dense = load(model)
    what = replace(WHAT, method="wanda-sp")
    said = str(forecast(dense, tmp_path / "run", what, data / "texts", data / "asked.jsonl", Measures()))
    assert not (tmp_path / "run").exists()
    total = sum(p.numel() for p in dense.parameters())
    for word in (f"{total:,}", "prune (wanda-sp)", "pretraining (2 sources)", "instruct (1 sources)", "left to do"):
        assert word in said
    shear(dense, tmp_path / "run", what, **given(model, data))
    again = str(forecast(dense, tmp_path / "run", what, data / "texts", None, Measures()))
    assert again.count(" done ") == 5


def test_the_commands(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--data", str(data / "texts"), "--length", "16", "--validation", "2", "--batch", "4", "--rank", "4"]
    common += ["--rounds", "1", "--round-steps", "2"]
    asked = [
        str(model),
        "--ratio",
        "0.2",
        "-o",
        str(tmp_path / "run"),
        "--method",
        "wanda-sp",
        "--samples",
        "8",
        *common,
    ]
    assert main(["shear", *asked, "--dry-run"]) == 0
    assert "left to do" in capsys.readouterr().out
    assert main(["shear", *asked, "--dry-run", "--json"]) == 0
    foreseen = json.loads(capsys.readouterr().out)
    assert [one["done"] for one in foreseen["work"]] == [False] * 5
    assert not (tmp_path / "run").exists()
    assert main(["shear", *asked]) == 0
    assert "Recovery: pretraining" in capsys.readouterr().out
    assert main(["shear", "--config", str(tmp_path / "run" / "run.yaml"), "--json"]) == 0  # which is done already
    done = json.loads(capsys.readouterr().out)
    assert list(done["evaluations"]) == ["dense", "pruned", "recovered"]
    assert [(one["name"], len(one["rounds"]), one["steps"]) for one in done["stages"]] == [("pretraining", 1, 2)]
    assert done["evaluations"]["pruned"]["parameters"] == foreseen["parameters"][1]
    out = tmp_path / "recovered"
    pruned = str(tmp_path / "run" / "pruned")
    assert main(["recover", pruned, "--dense", str(model), "-o", str(out), *common]) == 0
    assert "mean validation loss" in capsys.readouterr().out
    assert graphprune.report(graphprune.load(out)).plan.method == "wanda-sp"
    again = tmp_path / "again"
    assert main(["recover", "--config", str(out / "run.yaml"), "-o", str(again), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [len(one["means"]) for one in stages] == [2]
    weights = [graphprune.load(folder).state_dict() for folder in (out, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert main(["recover", pruned, "--dense", str(model), "-o", str(out), *common]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["recover", pruned, "-o", str(tmp_path / "other"), *common]) == 1
    assert "give dense=" in capsys.readouterr().err
    assert main(["shear", str(model), "--ratio", "0.2", "-o", str(tmp_path / "none")]) == 1
    assert "--data" in capsys.readouterr().err


def test_what_was_interrupted_is_said(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphprune.recovery.shear.shear", stop)
    asked = ["shear", str(model), "--ratio", "0.2", "-o", str(tmp_path / "run"), "--data", str(data / "texts")]
    assert main(asked) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def test_compile_recovers(model: Path, data: Path) -> None:
    dense, options = load(model), given(model, data)
    texts: dict[str, Any] = {"data": [data / "texts" / "ones.jsonl"], "tokenizer": options["tokenizer"]}
    settings: dict[str, Any] = {"method": "wanda-sp", "samples": 8, "length": 16, **texts}
    pruned = graphprune.compile(dense, 0.2, **settings)
    found = graphprune.compile(dense, 0.2, instruct=data / "asked.jsonl", recovery=WHAT.recovery, **settings)
    ids = torch.tensor([[2, 10, 11, 1, 3, 12, 13, 1]])

    def loss(model: Any) -> float:
        with torch.no_grad():
            return float(model(input_ids=ids, labels=torch.where(torch.arange(8) < 5, -100, ids)).loss)

    assert loss(found) < loss(pruned)
    assert graphprune.report(found).plan == graphprune.report(pruned).plan
    with pytest.raises(GraphPruneError, match="compares with the dense model"):
        graphprune.compile(dense, 0.2, recovery=WHAT.recovery, inplace=True, **settings)
