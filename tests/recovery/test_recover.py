"""Recovery: rounds, mixtures, stages, interruptions; on tiny Llamas and rows of made tokens."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from recovery import made
from recovery.made import QUICK, Made, corpora, llama
from torch import nn
from transformers import Trainer

import graphprune
from graphprune import GraphPruneError
from graphprune.data.corpus import Corpus
from graphprune.passes.add_adapters import Adapters, add_adapters
from graphprune.recovery.mixture import MixedRows, by_degradation
from graphprune.recovery.recover import Recovered, recover_on
from graphprune.recovery.settings import Recovery

SCRIPT = Path(__file__).with_name("made.py")
# On CPUs also where there is a GPU, which two processes cannot share.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_it_learns_what_was_lost_and_leaves_the_model_alone(tmp_path: Path) -> None:
    dense = llama()
    pruned = graphprune.compile(dense, 0.2, method="magnitude")
    before, of_dense = states(pruned), states(dense)
    found = recover_on(pruned, corpora(instruct=True), tmp_path, dense=dense, settings=Recovery(**QUICK))
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.state_dict().items())
    assert all(torch.equal(tensor, of_dense[name]) for name, tensor in dense.state_dict().items())
    assert [stage.name for stage in found.stages] == ["pretraining", "instruct"]
    for stage in found.stages:
        assert stage.best > 0
        assert sum(stage.rounds[stage.best - 1].losses.values()) < sum(stage.start.values())
    assert type(found.model) is type(pruned)
    assert found.model.state_dict().keys() == before.keys()
    assert {n: p.requires_grad for n, p in found.model.named_parameters()} == {
        n: p.requires_grad for n, p in pruned.named_parameters()
    }
    assert graphprune.report(found.model).plan == graphprune.report(pruned).plan
    graphprune.save(found.model, tmp_path / "saved")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(graphprune.load(tmp_path / "saved")(ids).logits, found.model(ids).logits)


def test_losses_are_those_of_the_best_round(tmp_path: Path) -> None:
    found = recover_on(llama(), corpora(), tmp_path, settings=Recovery(**{**QUICK, "mixing": "uniform"}))
    stage = found.stages[0]
    again = recover_on(found.model, corpora(), tmp_path / "again", settings=Recovery(**{**QUICK, "mixing": "uniform"}))
    for name, loss in again.stages[0].start.items():
        assert loss == pytest.approx(stage.rounds[stage.best - 1].losses[name], rel=1e-5)
    total, count = 0.0, 0
    for row in range(8):
        given = Made(1, 8, 500)[row]
        with torch.no_grad():
            loss = found.model(input_ids=given["input_ids"][None], labels=given["labels"][None]).loss
        counted = int((given["labels"][1:] != -100).sum())
        total, count = total + float(loss) * counted, count + counted
    assert stage.rounds[stage.best - 1].losses["source1"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("mixing", ["uniform", "dynamic"])
def test_a_small_source_is_not_seen_ever_again(mixing: str, tmp_path: Path) -> None:
    small, large = Corpus("small", False, Made(0, 3), Made(0, 8, 500), "small"), corpora()[1]
    settings = Recovery(**{**QUICK, "mixing": mixing, "repeats": 2.0, "patience": 3})  # 36 rows in all, 6 of them small
    found = recover_on(llama(1), [small, large], tmp_path, dense=llama(), settings=settings)
    assert found.stages[0].rounds
    for one in found.stages[0].rounds:
        assert one.weights == pytest.approx({"small": 1 / 6, "source1": 5 / 6})


class Stop(KeyboardInterrupt):
    pass


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, dict[str, Any], Recovered]:
    """A pruned model, what it is recovered with, and what that comes to."""
    dense = llama()
    model = graphprune.compile(dense, 0.2, method="magnitude")
    settings = Recovery(**{**QUICK, "checkpoint_steps": 1, "patience": 5})
    given: dict[str, Any] = {"dense": dense, "settings": settings}
    return model, given, recover_on(model, corpora(), tmp_path_factory.mktemp("whole"), **given)


@pytest.mark.parametrize("after", [2, 5, 8])
def test_an_interrupted_run_goes_on_to_the_same_result(after: int, uninterrupted: Any, tmp_path: Path) -> None:
    model, given, whole = uninterrupted

    def stop(text: str) -> None:
        if f"step {after} of" in text:
            raise Stop

    with pytest.raises(Stop):
        recover_on(model, corpora(), tmp_path / "broken", progress=stop, **given)
    found = recover_on(model, corpora(), tmp_path / "broken", **given)
    assert found.stages == whole.stages
    for one, other in zip(found.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
    lines: list[str] = []
    again = recover_on(model, corpora(), tmp_path / "broken", progress=lines.append, **given)
    assert not lines
    assert again.stages == whole.stages


def run(folder: Path, processes: int = 1, **options: Any) -> dict[str, Any]:
    """What a run in processes of its own comes to."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    if processes == 1:
        command = [sys.executable]
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), json.dumps(options)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text())


def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    options = {"rows_at_once": 2, "rounds": 2, "round_steps": 2}
    made.main(tmp_path / "one", options)
    one = json.loads((tmp_path / "one" / "result.json").read_text())
    two = run(tmp_path / "two", processes=2, **options)
    for stage, other in zip(one["stages"], two["stages"], strict=True):
        assert stage["best"] == other["best"]
        for key in ("dense", "start"):
            assert stage[key] == pytest.approx(other[key], rel=1e-5)
        for (step, loss), (other_step, other_loss) in zip(stage["steps"], other["steps"], strict=True):
            assert step == other_step
            assert loss == pytest.approx(other_loss, rel=1e-4)
        for here, there in zip(stage["rounds"], other["rounds"], strict=True):
            assert here["losses"] == pytest.approx(there["losses"], rel=1e-4)
    torch.testing.assert_close(torch.tensor(one["logits"]), torch.tensor(two["logits"]), rtol=1e-3, atol=1e-4)


def test_rounds_follow_the_losses(tmp_path: Path) -> None:
    dense = llama()
    given: dict[str, Any] = {"dense": dense, "settings": Recovery(**{**QUICK, "floor": 0.2, "patience": 5})}
    stage = recover_on(graphprune.compile(dense, 0.3, method="magnitude"), corpora(), tmp_path, **given).stages[0]
    assert stage.dense is not None
    losses = [stage.start, *(one.losses for one in stage.rounds)]
    assert len(stage.rounds) == QUICK["rounds"]
    for before, one in zip(losses, stage.rounds, strict=False):
        assert one.weights == by_degradation(before, stage.dense, 0.2)
    for corpus in corpora():
        held = [corpus.validation[row] for row in range(len(corpus.validation))]
        with torch.no_grad():
            found = [(float(dense(input_ids=r["input_ids"][None], labels=r["labels"][None]).loss), r) for r in held]
        counts = [int((row["labels"][1:] != -100).sum()) for _, row in found]
        mean = sum(loss * count for (loss, _), count in zip(found, counts, strict=True)) / sum(counts)
        assert stage.dense[corpus.name] == pytest.approx(mean, rel=1e-5)


def test_it_ends_when_nothing_is_gained(tmp_path: Path) -> None:
    worse = {"lr": 30.0, "warmup_steps": 0, "max_norm": 1e9}  # from the first step on
    settings = Recovery(**{**QUICK, **worse, "rounds": 9, "patience": 2, "mixing": "uniform"})
    model = llama()
    found = recover_on(model, corpora(), tmp_path, settings=settings)
    assert not found.stages[0].means[1] < found.stages[0].means[0] + 1
    assert found.stages[0].best == 0
    assert len(found.stages[0].rounds) < 9
    for one, other in zip(found.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_distillation_learns_from_the_full_model(tmp_path: Path) -> None:
    """With nothing but the divergence; the first step's loss is that of the model as it came."""
    dense = llama(seed=3)
    with torch.no_grad():
        dense.lm_head.weight.mul_(20)  # type: ignore[union-attr,operator]
    pruned = graphprune.compile(dense, 0.3, method="magnitude")
    settings = Recovery(
        **{**QUICK, "distill": 1.0, "temperature": 2.0, "mixing": "uniform", "rounds": 8, "patience": 8}
    )
    steps = recover_on(pruned, corpora()[:1], tmp_path, dense=dense, settings=settings).stages[0].steps
    sampler = MixedRows({"source0": 30}, 12, 0, lambda: [{"source0": 1.0}])
    total, count = 0.0, 0
    for row in list(sampler)[:4]:
        ids, counts = Made(0, 30)[row]["input_ids"], Made(0, 30)[row]["labels"][1:] != -100
        with torch.no_grad():
            found, wanted = ((m(ids[None]).logits[0, :-1][counts] / 2).log_softmax(-1) for m in (pruned, dense))
        total += float((wanted.exp() * (wanted - found)).sum()) * 4
        count += int(counts.sum())
    assert steps[0][1] == pytest.approx(total / count, rel=1e-4)
    assert steps[-1][1] < 0.8 * steps[0][1]


@pytest.mark.parametrize("option", ["gradient_checkpointing", "bf16"])
def test_memory_savers(option: str, tmp_path: Path) -> None:
    plain = recover_on(llama(), corpora(), tmp_path / "plain", settings=Recovery(**{**QUICK, "mixing": "uniform"}))
    settings = Recovery(**{**QUICK, "mixing": "uniform", option: True})
    found = recover_on(llama(), corpora(), tmp_path / "saving", settings=settings)
    rel = 1e-5 if option == "gradient_checkpointing" else 0.02
    for (_, loss), (_, wanted) in zip(found.stages[0].steps, plain.stages[0].steps, strict=True):
        assert loss == pytest.approx(wanted, rel=rel)


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    model, uniform = llama(), Recovery(**{**QUICK, "mixing": "uniform"})
    with pytest.raises(GraphPruneError, match="give dense="):
        recover_on(model, corpora(), tmp_path, settings=Recovery(**QUICK))
    with pytest.raises(GraphPruneError, match="nothing to train on"):
        recover_on(model, [], tmp_path, settings=uniform)
    with pytest.raises(GraphPruneError, match="has adapters already"):
        recover_on(add_adapters(model, Adapters()), corpora(), tmp_path, settings=uniform)
    with pytest.raises(GraphPruneError, match="no multiple of the 3 rows"):
        recover_on(model, corpora(), tmp_path, settings=Recovery(**{**QUICK, "mixing": "uniform", "rows_at_once": 3}))
    recover_on(model, corpora(), tmp_path / "one", settings=uniform)
    with pytest.raises(GraphPruneError, match="a run of another model, other data or other settings"):
        recover_on(llama(seed=1), corpora(), tmp_path / "one", settings=uniform)
    with pytest.raises(GraphPruneError, match="a run of another model, other data or other settings"):
        recover_on(model, corpora(), tmp_path / "one", settings=Recovery(**{**QUICK, "mixing": "uniform", "lr": 1e-3}))


@pytest.mark.parametrize(
    ("options", "match"),
    [({"mixing": "best"}, "mixing is one of"), ({"floor": 1.5}, "floor is between"), ({"rounds": 0}, "at least 1")],
)
def test_settings_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(GraphPruneError, match=match):
        Recovery(**options)


def test_a_full_disk_is_said_and_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Recovery(**{**QUICK, "mixing": "uniform", "patience": 5})
    whole = recover_on(llama(), corpora(), tmp_path / "whole", settings=settings)
    plain, left = Trainer._save_optimizer_and_scheduler, [1]

    def full(trainer: Trainer, folder: str) -> None:
        if not left:
            Path(folder, "optimizer.pt").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        left.pop()
        plain(trainer, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(GraphPruneError, match=r"No space left on device.*goes on from there"):
        recover_on(llama(), corpora(), tmp_path / "full", settings=settings)
    monkeypatch.undo()
    assert recover_on(llama(), corpora(), tmp_path / "full", settings=settings).stages == whole.stages


@pytest.mark.slow
def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    """Killed at ten random moments, and in the end the same to the bit."""
    options = {"checkpoint_steps": 1, "rounds": 8, "patience": 8}
    wanted = run(tmp_path / "whole", **options)
    draw, folder = random.Random(0), tmp_path / "killed"
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), json.dumps(options)], env=ENVIRONMENT, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not (folder / "pretraining").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 3))
        process.kill()
        process.wait()
    assert run(folder, **options) == wanted
