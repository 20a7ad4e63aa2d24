"""The ``Trainer`` of transformers with a mixture that follows the losses. One of its epochs is one round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.data import ConcatDataset
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from graphprune.data.corpus import Corpus
from graphprune.recovery.checkpoints import Checkpoints
from graphprune.recovery.mixture import Losses, MixedRows, Weights, by_degradation, uniform, within
from graphprune.recovery.settings import Recovery

IGNORED = -100
_MEAN = "eval_mean_loss"


def losses_in(entry: Mapping[str, Any]) -> dict[str, float] | None:
    """Source → validation loss of an entry of the log that was written after a round; None of another entry."""
    return entry.get("eval_losses")


class RecoveryTrainer(Trainer):
    """Trains on rounds of a mixture of sources and measures all of them after each.

    The loss is the mean over all tokens of a step, in all processes, that count; see :class:`Recovery` for ``distill``.
    ``start`` are the losses before the first round, ``dense`` those of the full model, which ``teacher`` is.
    """

    def __init__(
        self,
        model: nn.Module,
        corpora: Sequence[Corpus],
        settings: Recovery,
        folder: Path,
        *,
        start: Losses | None = None,
        dense: Losses | None = None,
        teacher: nn.Module | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.corpora, self.settings = list(corpora), settings
        self.start, self.dense = start, dense
        super().__init__(
            model,
            _arguments(settings, folder),
            data_collator=padded,
            train_dataset=ConcatDataset([corpus.train for corpus in corpora]),  # type: ignore[misc]
            eval_dataset={corpus.name: corpus.validation for corpus in corpora},
            compute_metrics=_mean_loss,
            callbacks=[
                EarlyStoppingCallback(settings.patience, settings.threshold),
                Checkpoints(settings.checkpoint_steps),
                *callbacks,
            ],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # so that the tokens of a whole step are counted, in all processes
        self.teacher = None if teacher is None else teacher.eval().to(self.args.device)

    def mixtures(self) -> list[Weights]:
        """The weights of every round so far, and of the one to come."""
        measured = [found for entry in self.state.log_history if (found := losses_in(entry)) is not None]
        rounds = [self.start or {}, *measured]
        if self.settings.mixing == "uniform" or self.dense is None:
            wanted = [uniform([corpus.name for corpus in self.corpora])] * len(rounds)
        else:
            wanted = [by_degradation(losses, self.dense, self.settings.floor) for losses in rounds]
        all_rows = self.settings.rounds * self.settings.round_rows
        most = {corpus.name: self.settings.repeats * len(corpus.train) / all_rows for corpus in self.corpora}
        return [within(weights, most) for weights in wanted]

    def _get_train_sampler(self, train_dataset: Any = None) -> MixedRows:
        sizes = {corpus.name: len(corpus.train) for corpus in self.corpora}
        return MixedRows(sizes, self.settings.round_rows, self.settings.seed, self.mixtures)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum over the tokens that count, over their number in the whole step."""
        labels = inputs["labels"]
        logits = _logits(model, inputs)
        loss = token_losses(logits, labels).sum()
        if self.teacher is not None and self.settings.distill and model.training:
            with torch.no_grad():
                wanted = _logits(self.teacher, inputs)
            apart = _divergence(logits, wanted, labels, self.settings.temperature)
            loss = (1 - self.settings.distill) * loss + self.settings.distill * apart
        count = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return loss / count * (1 if num_items_in_batch is None else self.accelerator.num_processes)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """For every row the sum of its losses, and how many tokens that are."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.no_grad():
            losses = token_losses(_logits(model, inputs), labels)
        return None, losses.sum(1), (labels[:, 1:] != IGNORED).sum(1)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, Any]:
        """The mean loss per token of every source, and the mean over the sources."""
        losses = {}
        for corpus in self.corpora:
            loader = self.get_eval_dataloader(corpus.validation)  # type: ignore[arg-type]
            found = self.evaluation_loop(loader, corpus.name, prediction_loss_only=False)
            losses[corpus.name] = float((found.metrics or {})["eval_token_loss"])
        metrics: dict[str, Any] = {f"eval_{name}_loss": loss for name, loss in losses.items()}
        metrics[_MEAN] = sum(losses.values()) / len(losses)
        if self.is_in_train:
            metrics |= {f"weight_{name}": weight for name, weight in self.mixtures()[-1].items()}
        self.log(metrics)
        entry: dict[str, Any] = self.state.log_history[-1]
        entry["eval_losses"] = losses
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _arguments(settings: Recovery, folder: Path) -> TrainingArguments:
    plain: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": settings.rounds,
        "per_device_train_batch_size": settings.rows_at_once,
        "per_device_eval_batch_size": settings.rows_at_once,
        "learning_rate": settings.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.warmup_steps,
        "max_grad_norm": settings.max_norm,
        "bf16": settings.bf16,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 3,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": _MEAN,
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,
        "remove_unused_columns": False,
        "report_to": list(settings.report_to) or "none",
        "seed": settings.seed,
        "data_seed": settings.seed,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
        "label_names": ["labels"],
    }
    if settings.gradient_checkpointing:
        plain["activation_checkpointing"] = True
    arguments = TrainingArguments(**{**plain, **settings.trainer})
    arguments.gradient_accumulation_steps = settings.accumulation(arguments.world_size)
    return arguments


def padded(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows of different lengths as a batch: ``input_ids``, ``attention_mask`` and ``labels`` of ``(rows, longest)``."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> torch.Tensor:
        return torch.stack([nn.functional.pad(row[name], (0, longest - len(row[name])), value=value) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": filled("input_ids", 0), "attention_mask": mask, "labels": filled("labels", IGNORED)}


def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every next token, float32 of shape ``(rows, length − 1)``; 0 where none counts."""
    targets = labels[:, 1:]
    flat = cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(targets.shape)


def _divergence(logits: torch.Tensor, wanted: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """The sum over the tokens that count of KL(wanted ‖ logits) · temperature²."""
    counts = labels[:, 1:] != IGNORED
    found, aim = (log_softmax(x[:, :-1][counts].float() / temperature, -1) for x in (logits, wanted))
    return kl_div(found, aim, reduction="sum", log_target=True) * temperature**2


def _mean_loss(found: EvalPrediction) -> dict[str, float]:
    losses, counts = (numpy.asarray(values, dtype="float64") for values in (found.predictions, found.label_ids))
    return {"token_loss": float(losses.sum() / counts.sum())}
