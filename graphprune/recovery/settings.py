"""How a pruned model is trained back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from graphprune.errors import GraphPruneError
from graphprune.passes.add_adapters import Adapters

MIXING = ("dynamic", "uniform")


@dataclass(frozen=True)
class Recovery:
    """Settings of :func:`graphprune.recovery.recover.recover` (LoRAShear, arXiv 2310.18356, Alg. 5).

    Attributes:
        adapters: the LoRA that trains; on every linear layer.
        lr: learning rate of AdamW, with ``warmup_steps`` and then a cosine over all rounds of a stage.
        batch: rows per step, over all processes together.
        rows_at_once: rows per forward and process; as many steps of accumulation as make up ``batch``.
        round_steps: steps between two measurements, after each of which the mixture is new.
        rounds: the most rounds of a stage.
        patience: rounds in a row without a better mean validation loss after which a stage ends.
        threshold: what counts as better, in nats.
        mixing: ``"dynamic"``: sources by how much worse than the full model they are; ``"uniform"``: all alike.
        floor: share of every round that is spread evenly, whatever the losses, so that no source starves.
        repeats: a source takes no larger share than goes so many times through its rows in all ``rounds``, while others
            have rows left: few rows seen many times teach little (arXiv 2305.16264), yet their loss, which no longer
            falls, would draw ever more of every round.
        distill: weight of the divergence from the dense model's predictions; the loss of the text has the rest.
        temperature: of both predictions in that divergence.
        max_norm: gradients are scaled down to this norm.
        bf16: run forward in bfloat16 by autocast.
        gradient_checkpointing: compute activations again in backward.
        checkpoint_steps: also keep the state every so many steps within a round; 0 is only after rounds.
        report_to: trackers of accelerate, such as ``("tensorboard",)``.
        seed: of the order of rows, of the adapters and of dropout.
        trainer: more arguments of ``transformers.TrainingArguments``, such as ``{"fsdp": …}`` or ``{"deepspeed": …}``.
    """

    adapters: Adapters = field(default_factory=Adapters)
    lr: float = 1e-3
    warmup_steps: int = 5
    batch: int = 8
    rows_at_once: int = 8
    round_steps: int = 25
    rounds: int = 20
    patience: int = 2
    threshold: float = 0.0
    mixing: str = "dynamic"
    floor: float = 0.5
    repeats: float = 4.0
    distill: float = 0.0
    temperature: float = 1.0
    max_norm: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    checkpoint_steps: int = 0
    report_to: tuple[str, ...] = ()
    seed: int = 0
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mixing not in MIXING:
            raise GraphPruneError(f"mixing is one of {', '.join(MIXING)}, not {self.mixing!r}.")
        for name in ("floor", "distill"):
            if not 0 <= getattr(self, name) <= 1:
                raise GraphPruneError(f"{name} is between 0 and 1, not {getattr(self, name)}.")
        if not self.repeats > 0:
            raise GraphPruneError(f"repeats is more than 0, not {self.repeats}.")
        for name in ("batch", "rows_at_once", "round_steps", "rounds", "patience"):
            if getattr(self, name) < 1:
                raise GraphPruneError(f"{name} is at least 1, not {getattr(self, name)}.")

    @property
    def round_rows(self) -> int:
        """Rows of a round."""
        return self.batch * self.round_steps

    def deciding(self) -> dict[str, Any]:
        """The settings that decide what comes out, rather than how it is run: a run goes on when these are the same."""
        how = ("rows_at_once", "checkpoint_steps", "report_to", "trainer")
        return {name: value for name, value in asdict(self).items() if name not in how}

    def accumulation(self, processes: int) -> int:
        """Forwards of one process per step.

        Raises :class:`GraphPruneError` when ``batch`` is no multiple of what all processes run at once.
        """
        at_once = self.rows_at_once * processes
        if self.batch % at_once:
            raise GraphPruneError(
                f"batch={self.batch} is no multiple of the {at_once} rows that {processes} processes run at once "
                f"(rows_at_once={self.rows_at_once} each)."
            )
        return self.batch // at_once
