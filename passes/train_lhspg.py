"""LHSPG, LoRA half-space projected gradient: fade the redundant structures while adapters take over what they knew.

LoRAShear (arXiv 2310.18356), Algorithm 4. The page that has it is missing from public copies; what is built here
follows the text around it and the half-space projection of its authors' optimizers (OTO).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback

from graphprune.errors import GraphPruneError
from graphprune.ir.program import Program
from graphprune.passes.adapted import Adapted, Part
from graphprune.passes.add_adapters import Adapters, check_adapted, training_pass
from graphprune.passes.base import Pass
from graphprune.passes.guided_scores import add, average, weighted_gradients
from graphprune.passes.train_adapters import Training, attach, train
from graphprune.trace.adapters import LowRank

CRITERIA = ("magnitude", "average-magnitude", "cosine", "taylor-first", "taylor-second", "prior")


@dataclass(frozen=True)
class Lhspg:
    """The settings of LHSPG, by the names of the paper (LoRAShear, arXiv 2310.18356, Alg. 4).

    Attributes:
        warmup_steps: ``T_w``, steps before the first structures are chosen.
        periods: ``P``; each takes an equal share of the structures that are still to go, the least salient.
        period_steps: ``T_p``, steps in which the structures of a period fade, linearly, to zero.
        final_steps: ordinary steps after the last period.
        epsilon: ``ε`` of the half-space: a structure whose trial iterate has less than this share of its old self in
            its old direction is set to zero at once.
        saliency: weights of the criteria, each divided by its norm over the structures of a group: ``"magnitude"``,
            ``"average-magnitude"`` (over the number of its weights), ``"cosine"`` (1 + cos of weight and update),
            ``"taylor-first"``, ``"taylor-second"`` (on LoRA-guided gradients, averaged over the steps so far), and
            ``"prior"``, what the passes before this one say: their plan if they made one (what it keeps is salient),
            or else their scores.
        decay: λ of the moving average of the Taylor criteria.
        adapters: LoRA that a model without any gets.
        training: how it trains.
    """

    warmup_steps: int = 5
    periods: int = 4
    period_steps: int = 5
    final_steps: int = 80
    epsilon: float = 0.0
    saliency: Mapping[str, float] = field(default_factory=lambda: {"prior": 1.0})
    decay: float = 0.9
    adapters: Adapters = field(default_factory=Adapters)
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        unknown = set(self.saliency) - set(CRITERIA)
        if unknown:
            raise GraphPruneError(f"There is no saliency {min(unknown)!r}. Criteria: {', '.join(CRITERIA)}.")
        if self.periods < 1 or self.period_steps < 1:
            raise GraphPruneError("LHSPG needs at least one period of at least one step.")
        if not 0 <= self.epsilon < 1:
            raise GraphPruneError(f"epsilon of the half-space is in [0, 1), not {self.epsilon}.")

    @property
    def steps(self) -> int:
        """Steps of the optimizer in all."""
        return self.warmup_steps + self.periods * self.period_steps + self.final_steps


class HalfSpace:
    """LHSPG around the steps of any optimizer: :func:`attach` it, or give :meth:`callback` to a ``Trainer``.

    ``counts`` says how many structures of each group go, ``prior`` has the scores of the criterion of that name.
    """

    def __init__(self, adapted: Adapted, counts: dict[str, int], config: Lhspg, prior: dict[str, torch.Tensor] | None):
        self._adapted, self._counts, self._config = adapted, counts, config
        self._prior = {name: scores.to(adapted.device) for name, scores in (prior or {}).items()}
        self._step = 0
        self._fading = {name: torch.zeros_like(adapted.gates[name], dtype=torch.bool) for name in counts}
        self._taylor: dict[str, dict[str, torch.Tensor]] = {"taylor-first": {}, "taylor-second": {}}
        self._before: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if config.saliency.get("prior") and counts.keys() - self._prior.keys():
            raise GraphPruneError(
                "LHSPG takes the criterion 'prior' from the passes before it, and none of them scores or plans: put "
                "score_by(…) in front of it, or give other weights as saliency."
            )

    def attach(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        """Act around every step of ``optimizer``; returns handles that remove it."""
        return attach(self, optimizer)

    def callback(self) -> TrainerCallback:
        """A callback for a ``transformers.Trainer`` over ``adapted.model``."""
        return _Callback(self)

    @property
    def zero(self) -> int:
        """How many structures are exactly zero."""
        return sum(int((self._adapted.gates[name] == 0).sum()) for name in self._counts)

    def before_step(self) -> None:
        """With the gradients at hand: learn from them, and remember what the fading structures were."""
        if any(self._config.saliency.get(name) for name in self._taylor):
            self._average_taylor()
        if self._in_period():
            self._before = {path: _copies(layer) for path, layer in self._adapted.layers.items()}

    def after_step(self) -> None:
        """After the step of the base optimizer: choose at the beginning of a period, and fade."""
        at = self._step - self._config.warmup_steps
        self._step += 1
        if not 0 <= at < self._config.periods * self._config.period_steps:
            return
        period, step = divmod(at, self._config.period_steps)
        if step == 0:
            self._choose(period)
        left = self._config.period_steps - step
        self._fade((left - 1) / left)

    def _in_period(self) -> bool:
        at = self._step - self._config.warmup_steps
        return 0 < at < self._config.periods * self._config.period_steps and at % self._config.period_steps > 0

    def _choose(self, period: int) -> None:
        """Move the least salient of what is still important to the redundant, for good."""
        saliency = self.saliency()
        last = period == self._config.periods - 1
        for name, count in self._counts.items():
            wanted = count if last else count * (period + 1) // self._config.periods
            fading = self._fading[name]
            scores = saliency[name].masked_fill(fading, float("inf"))
            fading[scores.argsort(stable=True)[: max(0, wanted - int(fading.sum()))]] = True

    def _fade(self, factor: float) -> None:
        """Scale the redundant by ``factor``; set those that leave their half-space to zero."""
        leaving = self._leaving(factor) if factor and self._before else {}
        for name, fading in self._fading.items():
            gates = self._adapted.gates[name]
            gates[fading] *= factor
            if name in leaving:
                gates[fading & leaving[name]] = 0

    def _leaving(self, factor: float) -> dict[str, torch.Tensor]:
        """Where ``⟨x̂, x⟩ < ε‖x‖²`` for the trial iterate ``x̂ = factor·x + Δ`` of the merged weight ``x``."""
        inner: dict[str, torch.Tensor] = {}
        norms: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for layer, parts in self._adapted.parts_by_layer():
                a, b = self._before[layer.path]
                old = (b @ a).mul_(layer.scaling)
                moved = layer.update().sub_(old)
                x = old.add_(layer.weight())
                moved.mul_(x)
                x.square_()
                for name, part in parts:
                    add(inner, name, part.sums(moved))
                    add(norms, name, part.sums(x))
        return {name: factor * norms[name] + inner[name] < self._config.epsilon * norms[name] for name in inner}

    def saliency(self) -> dict[str, torch.Tensor]:
        """Name of a group → the weighted sum of its criteria, float32 of shape ``(size,)``; the least goes first."""
        weights = {name: weight for name, weight in self._config.saliency.items() if weight}
        found: dict[str, dict[str, torch.Tensor]] = {"prior": self._prior, **self._taylor}
        if weights.keys() & {"magnitude", "average-magnitude", "cosine"}:
            found |= _of_weights(self._adapted)
        total: dict[str, torch.Tensor] = {}
        for criterion, weight in weights.items():
            for name in self._counts:
                if name in found[criterion]:
                    values = found[criterion][name].float()
                    add(total, name, weight * values / values.norm().clamp(min=torch.finfo(torch.float32).tiny))
        return total

    def _average_taylor(self) -> None:
        first: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for values, parts in weighted_gradients(self._adapted):
                for name, part in parts:
                    add(first, name, part.sums(values))
        for name, values in first.items():
            average(self._taylor["taylor-first"], name, values.abs(), self._config.decay)
            average(self._taylor["taylor-second"], name, values.square() / 2, self._config.decay)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything but the gates, which :class:`Adapted` has."""
        found = {"step": torch.tensor(self._step), **{f"fading.{n}": mask for n, mask in self._fading.items()}}
        for kind, held in self._taylor.items():
            found |= {f"{kind}.{name}": scores for name, scores in held.items()}
        return found

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._step = int(state["step"])
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if kind == "fading":
                self._fading[name].copy_(value)
            elif kind in self._taylor:
                self._taylor[kind][name] = value.to(self._adapted.device)


class _Callback(TrainerCallback):
    def __init__(self, half_space: HalfSpace):
        self._half_space = half_space

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._half_space.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._half_space.after_step()


def _copies(layer: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = layer.factors()
    return a.clone(), b.clone()


def _of_weights(adapted: Adapted) -> dict[str, dict[str, torch.Tensor]]:
    """The criteria that weights and adapters alone give."""
    sums: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in ("x", "w", "d", "wd", "n")}
    with torch.no_grad():
        for layer, parts in adapted.parts_by_layer():
            weight, update = layer.weight().float(), layer.update().float()
            kinds = {
                "x": (weight + update).square_(),
                "w": weight.square(),
                "d": update.square(),
                "wd": weight * update,
            }
            for name, part in parts:
                for kind, values in kinds.items():
                    add(sums[kind], name, part.sums(values))
                add(sums["n"], name, _owned(part, weight))
    magnitude = {name: values.sqrt() for name, values in sums["x"].items()}
    tiny = torch.finfo(torch.float32).tiny
    return {
        "magnitude": magnitude,
        "average-magnitude": {name: values / sums["n"][name] for name, values in magnitude.items()},
        "cosine": {
            name: 1 + sums["wd"][name] / (sums["w"][name] * sums["d"][name]).sqrt().clamp(min=tiny)
            for name in magnitude
        },
    }


def _owned(part: Part, weight: torch.Tensor) -> torch.Tensor:
    """How many weights every structure owns there."""
    size, each = part.blocks.shape
    return torch.full((size,), float(each * weight.shape[0 if part.reads else 1]), device=weight.device)


def _prior(program: Program) -> dict[str, torch.Tensor] | None:
    """What the passes so far say of each structure, the less the sooner it goes."""
    if program.plan is None:
        return program.scores
    found = {}
    for group in program.need("prunable"):
        kept = torch.ones(group.size) if group.name not in program.plan.keep else torch.zeros(group.size)
        kept[torch.tensor(program.plan.keep.get(group.name, []), dtype=torch.long)] = 1
        found[group.name] = kept
    return found


def train_lhspg(config: Lhspg | None = None) -> Pass:
    """A pass that removes ``counts`` structures of every group: they fade period by period while the adapters train.

    LHSPG of LoRAShear (arXiv 2310.18356, Alg. 4, which public copies lack; see this module); ``config`` has its
    settings. When it ends exactly these structures are zero, so erasing them changes nothing.
    """
    config = config or Lhspg()

    def run(program: Program, adapted: Adapted, counts: dict[str, int]) -> None:
        if not config.saliency.get("prior"):
            check_adapted(adapted, counts)
        train(program, adapted, config.training, config.steps, HalfSpace(adapted, counts, config, _prior(program)))

    return training_pass("train_lhspg", run, config.adapters)
