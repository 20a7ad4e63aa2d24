"""LoRAPrune (arXiv 2305.18403): prune step by step while adapters train, by the gradients of the adapters alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from graphprune.ir.program import Program
from graphprune.passes.adapted import Adapted
from graphprune.passes.add_adapters import Adapters, check_adapted, training_pass
from graphprune.passes.base import Pass
from graphprune.passes.guided_scores import average, guided_scores
from graphprune.passes.train_adapters import Training, train


@dataclass(frozen=True)
class LoraPrune:
    """The settings of LoRAPrune (arXiv 2305.18403), by the names of the paper and its code.

    Attributes:
        steps: steps of the optimizer, one batch each.
        every: steps between two masks.
        decay: λ of the moving average of the scores (Eq. 11).
        warmup, cooldown: shares of the steps before the first mask and after the last.
        adapters: LoRA that a model without any gets.
        training: how it trains.
    """

    steps: int = 100
    every: int = 10
    decay: float = 0.9
    warmup: float = 0.1
    cooldown: float = 0.1
    adapters: Adapters = field(default_factory=Adapters)
    training: Training = field(default_factory=Training)

    def sparsity(self, step: int) -> float:
        """The share of what is to go that is masked after ``step`` steps: ``1 − (1 − τ)³``."""
        first, last = self.warmup * self.steps, (1 - self.cooldown) * self.steps
        progress = min(max((step - first) / max(last - first, 1), 0.0), 1.0)
        return 1 - (1 - progress) ** 3


class _Masks:
    """Scores every step, masks every few: a watcher of the training loop."""

    def __init__(self, adapted: Adapted, counts: dict[str, int], config: LoraPrune):
        self._adapted, self._counts, self._config = adapted, counts, config
        self._step = 0
        self._scores: dict[str, torch.Tensor] = {}

    def before_step(self) -> None:
        for name, scores in guided_scores(self._adapted).items():
            average(self._scores, name, scores, self._config.decay)

    def after_step(self) -> None:
        self._step += 1
        if self._step % self._config.every == 0 or self._step == self._config.steps:
            self.mask(self._config.sparsity(self._step))

    def mask(self, share: float) -> None:
        """Mask this share of what is to go, the least important of all, also of those masked before."""
        for name, count in self._counts.items():
            gates = self._adapted.gates[name]
            gates.fill_(1)
            if name in self._scores:
                gates[self._scores[name].argsort(stable=True)[: round(share * count)]] = 0

    def state(self) -> dict[str, torch.Tensor]:
        return {"step": torch.tensor(self._step), **{f"scores.{n}": s for n, s in self._scores.items()}}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._step = int(state["step"])
        self._scores = {n.removeprefix("scores."): s.to(self._adapted.device) for n, s in state.items() if n != "step"}


def train_loraprune(config: LoraPrune | None = None) -> Pass:
    """A pass that removes ``counts`` structures of every group while the adapters train.

    LoRAPrune (arXiv 2305.18403); ``config`` has its settings.

    Scores are moving averages of :func:`guided_scores`; masks multiply what layers read (Eq. 13) and follow a cubic
    schedule; a mask may open again. Base weights are never changed and get no gradient; those of a quantised base are
    made floating point one layer at a time.
    """
    config = config or LoraPrune()

    def run(program: Program, adapted: Adapted, counts: dict[str, int]) -> None:
        check_adapted(adapted, counts)
        masks = _Masks(adapted, counts, config)
        train(program, adapted, config.training, config.steps, masks)
        masks.mask(1.0)

    return training_pass("train_loraprune", run, config.adapters)
