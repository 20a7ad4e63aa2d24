"""LHSPG and LoRAPrune: what is zero at the end, the schedule, and everything that may go wrong on the way."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import graphprune
from graphprune import GraphPruneError
from graphprune.ir.program import Program
from graphprune.passes import train_adapters
from graphprune.passes.adapted import Adapted
from graphprune.passes.add_adapters import Adapters, training_pass
from graphprune.passes.allocate_budget import allocate_budget
from graphprune.passes.base import Pass
from graphprune.passes.methods import passes_of
from graphprune.passes.score import score_by
from graphprune.passes.train_adapters import Nothing, Training, train
from graphprune.passes.train_lhspg import HalfSpace, Lhspg, train_lhspg
from graphprune.passes.train_loraprune import LoraPrune, _Masks, train_loraprune
from graphprune.passes.tune_adapters import tune_adapters
from tests.helpers import quick, snapshot
from tests.passes.test_adapted import SIZES, TOKENS, adapted, plain

DATA = torch.randint(0, 97, (12, 10), generator=torch.Generator().manual_seed(2))
QUICK: dict[str, Any] = {"warmup_steps": 2, "periods": 3, "period_steps": 3, "final_steps": 2}


def lhspg(config: Lhspg) -> tuple[Pass, ...]:
    return (score_by("l2"), allocate_budget("uniform"), train_lhspg(config))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize(
    ("kind", "merge", "optimizer"),
    quick(
        itertools.product(("llama", "gpt2"), (True, False), ("adamw", "sgd")),
        # Every two settings of any two of them meet.
        {("llama", True, "adamw"), ("llama", False, "sgd"), ("gpt2", True, "sgd"), ("gpt2", False, "adamw")},
    ),
)
def test_exactly_the_wanted_structures_are_zero_and_slicing_changes_nothing(
    kind: str, merge: bool, optimizer: str
) -> None:
    seen: dict[str, Any] = {}

    def run(program: Program, view: Adapted, counts: dict[str, int]) -> None:
        config = Lhspg(**QUICK, training=Training(optimizer, lr=0.01))
        half_space = HalfSpace(view, counts, config, program.scores)
        train(program, view, config.training, config.steps, half_space)
        seen.update(zero=half_space.zero, counts=counts, logits=logits(view.model))

    model = plain(kind)
    restored = snapshot(model)
    passes = (score_by("l2"), allocate_budget("uniform"), training_pass("watched", run, Adapters(rank=3)))
    pruned = graphprune.compile(model, 0.25, passes=passes, data=DATA, merge=merge)
    restored()
    assert seen["zero"] == sum(seen["counts"].values()) > 0
    assert ("Peft" in type(pruned).__name__) is not merge
    assert (logits(pruned) - seen["logits"]).abs().max() <= 1e-5 * seen["logits"].abs().max()
    assert (logits(pruned) - logits(model)).abs().max() > 1e-3
    if merge:
        assert graphprune.report(pruned).ratio == pytest.approx(0.25, abs=0.02)
        assert all(parameter.requires_grad for parameter in pruned.parameters())


@pytest.mark.parametrize("method", ["lorashear", "loraprune"])
def test_methods_by_name(method: str, tmp_path: Path) -> None:
    pruned = graphprune.compile(plain("gpt2"), 0.3, method=method, data=DATA, allocation="uniform")
    assert graphprune.report(pruned).attributes  # heads go: integers have to follow, under their plain names
    graphprune.save(pruned, tmp_path / "model")
    torch.testing.assert_close(logits(graphprune.load(tmp_path / "model")), logits(pruned))


def test_adapters_that_are_there_train_on() -> None:
    model = adapted()[0].model
    pruned = graphprune.compile(model, 0.2, passes=lhspg(Lhspg(**QUICK)), data=DATA, merge=False)
    name, before = next((n, p) for n, p in model.named_parameters() if "lora_B" in n and "o_proj" in n)
    assert not torch.equal(dict(pruned.named_parameters())[name], before)


def half_space(config: Lhspg, **prior: torch.Tensor) -> tuple[Adapted, HalfSpace, dict[str, int]]:
    view = adapted()[1]
    counts = {name: len(gates) // 2 for name, gates in view.gates.items()}
    scores = {name: torch.arange(len(gates)).float() for name, gates in view.gates.items()}
    return view, HalfSpace(view, counts, config, scores), counts


def test_structures_fade_linearly_and_the_least_salient_first() -> None:
    view, watcher, _ = half_space(Lhspg(**QUICK))
    gates = view.gates["model.layers.0.mlp.gate_proj.weight[0]"]  # 48, of which 24 go in 3 periods
    seen = []
    for _ in range(12):
        watcher.before_step()
        watcher.after_step()
        seen.append(gates.clone())
    assert all(bool((one == 1).all()) for one in seen[:2])
    for step, left in enumerate([2 / 3, 1 / 3, 0.0]):
        torch.testing.assert_close(seen[2 + step][:8], torch.full((8,), left))
        assert bool((seen[2 + step][8:] == 1).all())
    assert (seen[4] == 0).sum() == 8
    assert (seen[7] == 0).sum() == 16
    assert (seen[10][:24] == 0).all()
    assert (seen[11][24:] == 1).all()
    assert watcher.zero == sum(len(g) // 2 for g in view.gates.values())


def test_the_half_space_sets_to_zero_what_would_turn_around() -> None:
    view, watcher, _ = half_space(Lhspg(warmup_steps=0, periods=1, period_steps=10, epsilon=0.0))
    watcher.before_step()
    watcher.after_step()
    watcher.before_step()
    layer = view.layers["base_model.model.model.layers.0.mlp.down_proj"]
    with torch.no_grad():  # the step of some optimizer that turns column 0 of every part around
        for part in view.parts["model.layers.0.mlp.gate_proj.weight[0]"]:
            one = part.layer
            merged = one.weight() + one.update()
            if part.reads:
                one.writer.weight.copy_(
                    torch.linalg.lstsq(one.reader.weight.T, (-3 * merged).T).solution.T / one.scaling
                )
    assert layer.writer.weight.abs().max() > 1
    watcher.after_step()
    gates = view.gates["model.layers.0.mlp.gate_proj.weight[0]"]
    assert bool((gates[:24] == 0).any())
    others = view.gates["model.layers.1.mlp.gate_proj.weight[0]"]
    torch.testing.assert_close(others[:24], torch.full((24,), 0.8))


def test_epsilon_near_one_is_at_once() -> None:
    view, watcher, counts = half_space(Lhspg(warmup_steps=0, periods=1, period_steps=10, epsilon=0.99))
    for _ in range(2):
        watcher.before_step()
        watcher.after_step()
    assert watcher.zero == sum(counts.values())
    assert view


def test_criteria_of_saliency() -> None:
    config = Lhspg(saliency={"magnitude": 1.0})
    view, watcher, _ = half_space(config)
    name = "model.layers.0.mlp.gate_proj.weight[0]"
    expected = torch.zeros(48)
    for part in view.parts[name]:
        merged = part.layer.weight() + part.layer.update()
        expected += merged.square().sum(0 if part.reads else 1)
    expected = expected.sqrt()
    torch.testing.assert_close(watcher.saliency()[name], expected / expected.norm())
    for criterion in ("average-magnitude", "cosine"):
        found = half_space(Lhspg(saliency={criterion: 2.0}))[1].saliency()[name]
        assert found.norm() == pytest.approx(2.0, abs=1e-5)
    view, watcher, _ = half_space(Lhspg(saliency={"taylor-first": 1.0, "taylor-second": 1.0}))
    train_adapters.calibration_loss(view.model, {"input_ids": TOKENS}, 0).backward()
    watcher.before_step()
    found = watcher.saliency()[name]
    first = torch.zeros(48)
    for part in view.parts[name]:
        gradient = part.layer.guided_gradient()
        assert gradient is not None
        first += part.sums((part.layer.weight() + part.layer.update()) * gradient)
    second = first.square() / 2
    torch.testing.assert_close(found, first.abs() / first.norm() + second / second.norm())


def test_a_prior_wants_scores() -> None:
    with pytest.raises(GraphPruneError, match="takes the criterion 'prior'"):
        graphprune.compile(plain(), 0.2, passes=(allocate_budget("uniform"), train_lhspg()), data=DATA)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"saliency": {"size": 1.0}}, "There is no saliency 'size'"),
        ({"periods": 0}, "at least one period"),
        ({"epsilon": 1.0}, "epsilon of the half-space"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphPruneError, match=message):
        Lhspg(**settings)


class Stopped(Exception):
    pass


@pytest.mark.filterwarnings("error:.*lr_scheduler")
@pytest.mark.parametrize("method", ["lhspg", "loraprune", "tune"])
def test_an_interrupted_run_goes_on_to_the_same_result(method: str, tmp_path: Path) -> None:
    def passes(checkpoint: Path | None) -> tuple[Pass, ...]:
        training = Training(lr=0.01, checkpoint=checkpoint, checkpoint_steps=3)
        lora = Adapters(rank=3, dropout=0.1)
        if method == "lhspg":
            saliency = {"prior": 1.0, "taylor-first": 1.0}
            return lhspg(Lhspg(**QUICK, training=training, adapters=lora, saliency=saliency))
        if method == "loraprune":
            pruning = train_loraprune(LoraPrune(steps=13, every=2, training=training, adapters=lora))
            return (allocate_budget("uniform"), pruning)
        return (tune_adapters(13, lora, training),)

    def stop(said: str) -> None:
        if "step 8 " in said:
            raise Stopped

    model, checkpoint = plain(), tmp_path / "state.safetensors"
    whole = graphprune.compile(model, 0.2, passes=passes(None), data=DATA)
    with pytest.raises((Stopped, GraphPruneError)):
        graphprune.compile(model, 0.2, passes=passes(checkpoint), data=DATA, progress=stop)
    steps: list[str] = []
    resumed = graphprune.compile(model, 0.2, passes=passes(checkpoint), data=DATA, progress=steps.append)
    assert next(said for said in steps if "step" in said).startswith("training: step 7 ")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(GraphPruneError, match="of other settings or data"):
        graphprune.compile(model, 0.2, passes=passes(checkpoint), data=DATA + 0 * DATA + 1 - DATA // 96)
    checkpoint.write_bytes(b"nothing")
    with pytest.raises(GraphPruneError, match="is no checkpoint"):
        graphprune.compile(model, 0.2, passes=passes(checkpoint), data=DATA)


@pytest.mark.filterwarnings("error:.*lr_scheduler")
def test_steps_that_are_not_finite_are_skipped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    program, view = adapted()
    program.options.data = DATA
    plain_loss, calls = train_adapters.calibration_loss, iter(range(100))

    def sometimes(*args: Any) -> torch.Tensor:
        number = next(calls)
        bad = {0: float("nan"), 1: float("nan"), 3: float("inf")}.get(number)
        return plain_loss(*args) * (1.0 if bad is None else bad)

    monkeypatch.setattr(train_adapters, "calibration_loss", sometimes)
    done = train(program, view, Training(), 6, Nothing())
    assert (done.skipped, len(done.losses)) == (3, 3)
    assert all(bool(p.isfinite().all()) for p in view.model.parameters())
    monkeypatch.setattr(train_adapters, "calibration_loss", lambda *args: plain_loss(*args) * float("nan"))
    with pytest.raises(GraphPruneError, match="None of 3 training steps"):
        train(program, view, Training(), 3, Nothing())


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
def test_every_step_has_the_rate_of_the_schedule(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are skipped have theirs too."""
    program, view = adapted()
    program.options.data = DATA
    seen: list[float] = []
    step, loss, calls = torch.optim.AdamW.step, train_adapters.calibration_loss, iter(range(6))

    def noting(optimizer: torch.optim.AdamW, closure: Any = None) -> Any:
        seen.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    monkeypatch.setattr(
        train_adapters, "calibration_loss", lambda *args: loss(*args) * (float("nan") if next(calls) == 2 else 1.0)
    )
    train(program, view, Training(lr=0.02, schedule=schedule, warmup_steps=2), 6, Nothing())
    expected = {
        "cosine": [0.01 * (1 + math.cos(math.pi * n / 4)) for n in range(4)],
        "linear": [0.02 * (1 - n / 4) for n in range(4)],
        "constant_with_warmup": [0.02] * 4,
    }[schedule]
    expected = [0.0, 0.01, *expected]
    assert seen == pytest.approx([rate for n, rate in enumerate(expected) if n != 2])


def test_what_cannot_be_reached_is_refused_before_training() -> None:
    said: list[str] = []
    with pytest.raises(GraphPruneError, match="cannot be reached"):
        graphprune.compile(plain(), 0.99, method="lorashear", data=DATA, progress=said.append)
    assert not any("training" in one for one in said)


@pytest.mark.parametrize("step", [train_loraprune(LoraPrune(2)), train_lhspg(Lhspg(saliency={"magnitude": 1}))])
def test_what_no_adapter_says_anything_of_is_refused_before_training(step: Pass) -> None:
    model = get_peft_model(plain("llama"), LoraConfig(target_modules=["q_proj", "k_proj"]))
    with pytest.raises(GraphPruneError, match="cannot be scored: no layer that it belongs to has LoRA"):
        graphprune.compile(model, 0.2, passes=(score_by("l2"), allocate_budget("uniform"), step), data=DATA)
    kept = graphprune.compile(
        model, 0.05, passes=(score_by("l2"), allocate_budget("uniform"), step), data=DATA, exclude=["*.mlp"]
    )
    assert graphprune.report(kept).oracle_error < 1e-5


def test_training_wants_data_and_a_copy() -> None:
    with pytest.raises(GraphPruneError, match="give data="):
        graphprune.compile(plain(), 0.2, method="loraprune")
    with pytest.raises(GraphPruneError, match="cannot prune in place"):
        graphprune.compile(plain(), 0.2, method="loraprune", data=DATA, inplace=True)
    sizes = {**SIZES, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 48}
    ragged = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    passes = (allocate_budget("uniform"), train_loraprune())
    with pytest.raises(GraphPruneError, match="leave that out"):
        graphprune.compile(ragged, 0.3, passes=passes, data=DATA, inner_axes=True)
    with pytest.raises(GraphPruneError, match="optimizer is one of adamw, sgd"):
        Training(optimizer="lion")


def test_a_trainer_of_transformers_trains_it(tmp_path: Path) -> None:
    config = Lhspg(**QUICK)
    view, watcher, counts = half_space(config)
    rows = [{"input_ids": row, "labels": row} for row in DATA.repeat(5, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=config.steps,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    before = copy.deepcopy(next(iter(view.trainable().values())))
    Trainer(view.model, arguments, train_dataset=rows, callbacks=[watcher.callback()]).train()  # type: ignore[arg-type]
    assert watcher.zero == sum(counts.values())
    assert not torch.equal(before, next(iter(view.trainable().values())))


def test_bf16_autocast() -> None:
    training = Training(autocast=True)
    pruned = graphprune.compile(plain(), 0.2, passes=lhspg(Lhspg(**QUICK, training=training)), data=DATA)
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.float32}


def test_the_schedule_of_loraprune_is_cubic() -> None:
    config = LoraPrune(steps=100)
    assert config.sparsity(10) == 0
    assert config.sparsity(50) == pytest.approx(1 - 0.5**3)
    assert config.sparsity(90) == config.sparsity(100) == 1


def test_masks_follow_the_average_of_the_scores_and_may_open_again() -> None:
    view = adapted()[1]
    counts = {name: len(gates) // 2 for name, gates in view.gates.items()}
    masks = _Masks(view, counts, LoraPrune(steps=10, every=1, warmup=0.0, cooldown=0.0))
    train_adapters.calibration_loss(view.model, {"input_ids": TOKENS}, 0).backward()
    masks.before_step()
    name = "model.layers.0.mlp.gate_proj.weight[0]"
    first = masks._scores[name].clone()
    masks.after_step()
    assert (view.gates[name] == 0).sum() == round((1 - 0.9**3) * 24)
    assert set((view.gates[name] == 0).nonzero()[:, 0].tolist()) == set(first.argsort()[:7].tolist())
    for parameter in view.trainable().values():
        parameter.grad *= torch.rand_like(parameter) * 5
    masks.before_step()
    again = masks._scores[name]
    assert not torch.equal(first, again)
    masks._scores[name] = -first
    masks.after_step()
    assert view.gates[name][first.argsort()[0]] == 1
    assert view.gates[name][first.argsort()[-1]] == 0


def test_what_a_plan_removes_fades() -> None:
    """LoRA that does nothing yet does not change what its model is pruned by."""
    plan = graphprune.report(graphprune.compile(plain(), 0.2, method="ppm", data=DATA)).plan
    faded = graphprune.report(graphprune.compile(plain(), 0.2, method="lorashear", data=DATA)).plan
    assert faded.keep == plan.keep


def test_sharded_by_fsdp2(tmp_path: Path) -> None:
    """In a loop of one's own over a model that fully_shard has taken over, every period chooses and fades."""
    if not torch.distributed.is_available():
        pytest.skip("this build of PyTorch has no torch.distributed")
    from torch.distributed.fsdp import fully_shard

    config = Lhspg(**QUICK, saliency={"magnitude": 1.0, "taylor-first": 1.0})
    results = []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for sharded in (False, True):
            view, watcher, counts = half_space(config)
            if sharded:
                mesh = torch.distributed.init_device_mesh("cpu", (1,))
                for block in view.model.base_model.model.model.layers:
                    fully_shard(block, mesh=mesh)
                fully_shard(view.model, mesh=mesh)
            optimizer = torch.optim.SGD(view.trainable().values(), lr=0.01)
            watcher.attach(optimizer)
            for step in range(config.steps):
                train_adapters.calibration_loss(
                    view.model, {"input_ids": DATA[step % 12 : step % 12 + 1]}, 0
                ).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert watcher.zero == sum(counts.values())
            results.append(view.gates)
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_settings_of_training_are_for_methods_that_train() -> None:
    for method, settings in (("loraprune", LoraPrune(steps=2)), ("lorashear", Lhspg(warmup_steps=2))):
        *before, last = passes_of(method, settings)
        *usual, usually = passes_of(method)
        assert before == usual
        assert last.name == usually.name
        assert last is not usually
    with pytest.raises(GraphPruneError, match="'slimgpt' does not train: settings are for loraprune, lorashear"):
        passes_of("slimgpt", LoraPrune(steps=2))
