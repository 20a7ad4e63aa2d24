"""Train a pruned model back to what it knew: LoRAShear's dynamic knowledge recovery (arXiv 2310.18356, Alg. 5)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from graphprune.data.corpus import Corpus, prepare
from graphprune.data.sources import check_names, sources_of
from graphprune.data.texts import Say, silent
from graphprune.errors import GraphPruneError
from graphprune.io import fingerprint
from graphprune.io.atomic import replace_file
from graphprune.io.checked_json import of_kind, read_json, take
from graphprune.passes.add_adapters import add_adapters
from graphprune.recovery.checkpoints import last_whole
from graphprune.recovery.mixture import Weights
from graphprune.recovery.run_folder import belongs_to
from graphprune.recovery.settings import Recovery
from graphprune.recovery.trainer import RecoveryTrainer, losses_in
from graphprune.reporting import REPORT_ATTRIBUTE, Report
from graphprune.trace.adapters import has_adapters
from graphprune.trace.quiet import REFUSALS
from graphprune.trace.skeleton import frozen_copy

STAGES = ("pretraining", "instruct")
_ADAPTER, DONE = "adapter.safetensors", "stage.json"


@dataclass
class Round:
    """One round of recovery.

    Attributes:
        weights: source → share of the round's rows, as the losses before it made them.
        losses: source → validation loss after it, in nats per token.
    """

    weights: Weights
    losses: dict[str, float]


@dataclass
class Stage:
    """What became of one stage.

    Attributes:
        name: ``"pretraining"`` or ``"instruct"``.
        dense: source → validation loss of the full model, in nats per token; None where it was not given.
        start: the same of the pruned model before the first round.
        rounds: what every round was mixed by, and the losses after it.
        steps: (number of the step, training loss).
        best: number of rounds after which the model was taken; 0 is as it came.
    """

    name: str
    dense: dict[str, float] | None
    start: dict[str, float]
    rounds: list[Round] = field(default_factory=list)
    steps: list[tuple[int, float]] = field(default_factory=list)  # number, training loss
    best: int = 0

    @property
    def means(self) -> list[float]:
        """The mean loss over the sources, before the first round and after every round."""
        found = [self.start, *(one.losses for one in self.rounds)]
        return [sum(losses.values()) / len(losses) for losses in found]

    def told(self) -> str:
        """In a sentence."""
        means, sources = self.means, ", ".join(self.start)
        return (
            f"LoRA, stage {self.name}: {len(self.steps)} steps in {len(self.rounds)} rounds on {sources}; "
            f"mean validation loss {means[0]:.4f} before and {means[self.best]:.4f} after, in nats per token"
        )


@dataclass
class Recovered:
    """A pruned model with what it learned merged into its weights (``model``), and how it learned it (``stages``)."""

    model: nn.Module
    stages: list[Stage]


def recover(
    model: nn.Module,
    folder: str | Path,
    *,
    data: Any = None,
    instruct: Any = None,
    tokenizer: Any,
    dense: nn.Module | None = None,
    settings: Recovery | None = None,
    length: int = 512,
    validation: int = 64,
    most: int | None = None,
    progress: Say | None = None,
) -> Recovered:
    """Train a pruned model back to what it knew, on texts: :func:`recover_on` what is made of them.

    Args:
        model: a causal language model; it is not changed.
        folder: for tokens, checkpoints and logs; the same call goes on where an interrupted one stopped.
        data, instruct: pretraining and instruction sources, either or both: what
            :func:`graphprune.data.sources.sources_of` takes, such as a folder with a file for every source.
        tokenizer: of the model.
        dense: the model before it was pruned, which says what was lost.
        settings: see :class:`Recovery`.
        length, validation, most: tokens per row, rows held out per source, and the most tokens to train on per source;
            :func:`graphprune.data.corpus.prepare`.
        progress: called with what is being done.

    Raises :class:`GraphPruneError` as these functions do.
    """
    given = [(data, False), (instruct, True)]
    sources = [source for what, instructs in given if what is not None for source in sources_of(what, instructs)]
    if not sources:
        raise GraphPruneError("There is nothing to train on: give data= or instruct=, or both.")
    check_names(sources)
    options: dict[str, Any] = {"length": length, "validation": validation, "most": most, "progress": progress}
    corpora = prepare(sources, tokenizer, Path(folder, "tokens"), **options)
    return recover_on(model, corpora, folder, dense=dense, settings=settings, progress=progress)


def recover_on(
    model: nn.Module,
    corpora: Sequence[Corpus],
    folder: str | Path,
    *,
    dense: nn.Module | None = None,
    settings: Recovery | None = None,
    progress: Say | None = None,
) -> Recovered:
    """Train LoRA on a mixture of sources that follows what the model lost on them, and merge it.

    LoRAShear's dynamic knowledge recovery (arXiv 2310.18356, Alg. 5).
    A stage over the pretraining sources comes first, then one over those of instructions. In each, rounds of
    ``round_steps`` are mixed by how far the validation loss of every source is above that of ``dense``, the model
    before it was pruned; a stage ends when the mean validation loss no longer falls (``patience``), and the best round
    is kept.

    Runs in one process, or in several under ``accelerate launch`` (then every process calls it with the same
    arguments). What it has done is kept in ``folder``: the same call goes on where an interrupted one stopped, with the
    same losses. The model is not changed.

    Args:
        model: a causal language model; pruned or not.
        corpora: what to train on; :func:`graphprune.data.corpus.prepare`.
        folder: for checkpoints and logs.
        dense: the full model, for ``mixing="dynamic"`` and for distillation. Only its losses are wanted otherwise.
        settings: see :class:`Recovery`.
        progress: called with what is being done.

    Raises :class:`GraphPruneError` for a folder of another run, for settings that need ``dense`` without it, and when
    the model cannot run the rows.
    """
    settings, folder = settings or Recovery(), Path(folder)
    if dense is None and (settings.mixing == "dynamic" or settings.distill):
        raise GraphPruneError("mixing='dynamic' and distill= compare with the full model: give dense=.")
    if not corpora:
        raise GraphPruneError("There is nothing to train on: corpora= is empty.")
    if has_adapters(model):
        raise GraphPruneError("The model has adapters already: merge them (compile(…, merge=True)) before recovery.")
    run = _Run(folder, settings, progress or silent)
    run.begin(model, corpora)
    stages, adapter = [], None
    for name, instruct in zip(STAGES, (False, True), strict=True):
        of_stage = [corpus for corpus in corpora if corpus.instruct is instruct]
        if of_stage:
            try:
                stages.append(run.stage(name, _adapted(model, settings, adapter), of_stage, dense))
            except (*REFUSALS, OSError) as error:
                raise GraphPruneError(
                    f"Recovery stopped in the stage {name}: {type(error).__name__}: {error}. What was done is kept in "
                    f"{folder}; the same call goes on from there."
                ) from error
            adapter = folder / name / _ADAPTER if stages[-1].best else adapter
    merged = _merged(model, _adapted(model, settings, adapter))
    _report_training(model, merged, stages)
    return Recovered(merged, stages)


def _report_training(model: nn.Module, merged: nn.Module, stages: list[Stage]) -> None:
    """The report of the pruned model, with what it was trained on, for the trained one."""
    done: Report | None = getattr(model, REPORT_ATTRIBUTE, None)
    if done is not None:
        told = [*done.training, *(stage.told() for stage in stages)]
        object.__setattr__(merged, REPORT_ATTRIBUTE, replace(done, training=told))


def _adapted(model: nn.Module, settings: Recovery, adapter: Path | None) -> Any:
    """A copy of the model that shares its weights, with LoRA: as kept in a file, or new and doing nothing."""
    from peft import set_peft_model_state_dict

    adapted = add_adapters(model, settings.adapters, settings.seed)
    if adapter is not None:
        set_peft_model_state_dict(adapted, load_file(adapter))
    return adapted


def _merged(model: nn.Module, adapted: Any) -> nn.Module:
    """The model inside with the adapters in its weights, which train, and are in the mode, as those of ``model``."""
    merged = adapted.merge_and_unload(safe_merge=True).train(model.training)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(wanted[name])
    return merged


@dataclass
class _Run:
    """A folder with a checkpoint for every stage, and files that say what they belong to."""

    folder: Path
    settings: Recovery
    say: Say

    def begin(self, model: nn.Module, corpora: Sequence[Corpus]) -> None:
        """Note what the run is of, or check that it is the same as before."""
        settings = json.dumps(self.settings.deciding(), sort_keys=True)
        of = fingerprint.fingerprint(fingerprint.of_model(model), settings, *(corpus.fingerprint for corpus in corpora))
        belongs_to(self.folder, of, self.settings.deciding())

    def stage(self, name: str, adapted: nn.Module, corpora: list[Corpus], dense: nn.Module | None) -> Stage:
        """Train through a stage, or what is left of it; the adapters of its best round are in a file then."""
        folder = self.folder / name
        if (folder / DONE).exists():
            return read_stage(folder / DONE)
        before = None if dense is None else self._losses(folder / "dense.json", f"{name}: full model", dense, corpora)
        start = self._losses(folder / "start.json", f"{name}: before", adapted, corpora)
        trainer = RecoveryTrainer(
            adapted,
            corpora,
            self.settings,
            folder,
            start=start,
            dense=before,
            teacher=frozen_copy(dense) if dense is not None and self.settings.distill else None,
            callbacks=[_Progress(self.say, name)],
        )
        with trainer.accelerator.main_process_first():  # it removes what is not whole
            found = last_whole(folder)
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
        stage = _stage(name, trainer, before, start)
        if trainer.accelerator.is_main_process:
            if stage.best:
                best = folder / Path(str(trainer.state.best_model_checkpoint)).name
                _copy(best / "adapter_model.safetensors", folder / _ADAPTER)
            replace_file(folder / DONE, json.dumps(asdict(stage)))
        trainer.accelerator.wait_for_everyone()
        return stage

    def _losses(self, path: Path, what: str, model: nn.Module, corpora: list[Corpus]) -> dict[str, float]:
        """The validation losses of a model, measured once."""
        if path.exists():
            held = take(read_json(path), "losses", dict, str(path))
            return {name: float(of_kind(loss, (int, float), str(path))) for name, loss in held.items()}
        self.say(f"{what}: measuring {', '.join(corpus.name for corpus in corpora)}")
        # On a copy: what accelerate has prepared to be measured it does not prepare to be trained in parallel.
        untracked = replace(self.settings, report_to=())
        trainer = RecoveryTrainer(frozen_copy(model), corpora, untracked, path.parent)
        metrics = trainer.evaluate()
        losses = {corpus.name: metrics[f"eval_{corpus.name}_loss"] for corpus in corpora}
        if trainer.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps({"losses": losses}))
        trainer.accelerator.wait_for_everyone()
        return losses


def _stage(name: str, trainer: RecoveryTrainer, dense: dict[str, float] | None, start: dict[str, float]) -> Stage:
    log = trainer.state.log_history
    losses = [found for entry in log if (found := losses_in(entry)) is not None]
    rounds = [Round(weights, after) for weights, after in zip(trainer.mixtures(), losses, strict=False)]
    steps = [(int(entry["step"]), float(entry["loss"])) for entry in log if "loss" in entry]
    stage = Stage(name, dense, start, rounds, steps)
    stage.best = stage.means.index(min(stage.means))
    return stage


def read_stage(path: Path) -> Stage:
    """A stage that is done. Raises :class:`GraphPruneError` for a file that is no such."""
    held, where = read_json(path), str(path)
    rounds = [
        Round(take(one, "weights", dict, where), take(one, "losses", dict, where))
        for one in take(held, "rounds", list, where)
    ]
    steps = [(int(number), float(loss)) for number, loss in take(held, "steps", list, where)]
    start, best = take(held, "start", dict, where), take(held, "best", int, where)
    return Stage(take(held, "name", str, where), held.get("dense"), start, rounds, steps, best)


def _copy(source: Path, target: Path) -> None:
    """A file that is there with all that is in it, or as it was."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)


class _Progress(TrainerCallback):
    def __init__(self, say: Say, name: str):
        self._say, self._name = say, name

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self._say(f"{self._name}: step {state.global_step} of {state.max_steps}, loss {logs['loss']:.3f}")
        elif state.is_world_process_zero and logs and "eval_mean_loss" in logs:
            self._say(f"{self._name}: step {state.global_step}, mean validation loss {logs['eval_mean_loss']:.3f}")
