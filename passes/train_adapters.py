"""The training loop of all passes that train adapters: an ordinary one, over an :class:`Adapted` model.

It is plain PyTorch: accelerate's settings are those of a whole process, which belongs to whoever calls the compiler.
Passes act around the steps of the optimizer, so they work in other loops just as well (:func:`attach`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import get_scheduler

from graphprune.data.calibration import calibration_batches
from graphprune.errors import GraphPruneError
from graphprune.ir.program import Program
from graphprune.passes.adapted import Adapted
from graphprune.passes.score.loss import calibration_loss, count_samples
from graphprune.trace.quiet import REFUSALS

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class Training:
    """How adapters train.

    Attributes:
        optimizer: ``"adamw"`` or ``"sgd"``; ``options`` are more arguments of it, such as ``{"momentum": 0.9}``.
        lr: learning rate; ``schedule`` is a name of ``transformers.get_scheduler``, ``warmup_steps`` its warm-up.
        max_norm: gradients are scaled down to this norm.
        autocast: run forward in bfloat16 where PyTorch's autocast does.
        seed: of the order of batches and of dropout.
        checkpoint: a file to keep the state in, every ``checkpoint_steps`` steps. If it is there when training starts,
            it goes on from there; the same settings and data lead to the same result as without a break.
    """

    optimizer: str = "adamw"
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 5
    max_norm: float = 1.0
    autocast: bool = False
    seed: int = 0
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_steps: int = 20

    def __post_init__(self) -> None:
        if self.optimizer not in _OPTIMIZERS:
            raise GraphPruneError(f"optimizer is one of {', '.join(_OPTIMIZERS)}, not {self.optimizer!r}.")


class Watcher(Protocol):
    """What a pass does around every step of the optimizer; its state is tensors by name."""

    def before_step(self) -> None: ...

    def after_step(self) -> None: ...

    def state(self) -> dict[str, torch.Tensor]: ...

    def load_state(self, state: dict[str, torch.Tensor]) -> None: ...


class Nothing:
    """A watcher for ordinary training."""

    def before_step(self) -> None:
        pass

    def after_step(self) -> None:
        pass

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        pass


def attach(watcher: Watcher, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Let ``watcher`` act around every step of ``optimizer``, in anyone's training loop; returns what removes it."""
    return [
        optimizer.register_step_pre_hook(lambda *_: watcher.before_step()),
        optimizer.register_step_post_hook(lambda *_: watcher.after_step()),
    ]


@dataclass
class Trained:
    """What came of it: the mean loss per sample of every step that counted, and the steps that were skipped."""

    losses: list[float] = field(default_factory=list)
    skipped: int = 0


def train(program: Program, adapted: Adapted, settings: Training, steps: int, watcher: Watcher) -> Trained:
    """Train the adapters for so many steps, one batch of ``data=`` each, again and again in another order.

    A step whose loss or gradient is not finite is skipped and counted.

    Raises :class:`GraphPruneError` without data, when the model cannot run it, when no step was finite, and for a
    checkpoint of something else.
    """
    if program.options.data is None:
        raise GraphPruneError(f"{program.options.method!r} trains, and wants text of the user's for it: give data=.")
    batches = calibration_batches(program)
    device = next(adapted.model.parameters()).device
    parameters = list(adapted.trainable().values())
    optimizer = _OPTIMIZERS[settings.optimizer](parameters, lr=settings.lr, **settings.options)  # type: ignore[call-arg]
    hooks = attach(watcher, optimizer)
    done, first = Trained(), 0
    checkpoint = (
        None if settings.checkpoint is None else _Checkpoint(Path(settings.checkpoint), settings, steps, batches)
    )
    generator_state = torch.get_rng_state()
    torch.manual_seed(settings.seed)
    try:
        rates = _learning_rates(settings, steps)
        if checkpoint is not None:
            first = checkpoint.load(adapted, optimizer, watcher, done)
        for step, batch in enumerate(_batches(batches, settings.seed, steps)):
            if step < first:
                continue
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
                loss = calibration_loss(adapted.model, batch, settings.seed) / count_samples(batch)
            if math.isfinite(loss.item()):
                loss.backward()  # type: ignore[no-untyped-call]
                norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_norm)
            if not math.isfinite(loss.item()) or not bool(norm.isfinite()):
                done.skipped += 1
                optimizer.zero_grad()
            else:
                optimizer.step()
                optimizer.zero_grad()
                done.losses.append(loss.item())
            program.say(f"training: step {step + 1} of {steps}, loss {loss.item():.3f}")
            if checkpoint is not None and (step + 1) % settings.checkpoint_steps == 0:
                checkpoint.save(step + 1, adapted, optimizer, watcher, done)
    except REFUSALS as error:
        raise GraphPruneError(f"Training failed: {type(error).__name__}: {error}. The model is unchanged.") from error
    finally:
        torch.set_rng_state(generator_state)
        for hook in hooks:
            hook.remove()
    if not done.losses and steps:
        raise GraphPruneError(f"None of {steps} training steps had a finite loss and gradient. The model is unchanged.")
    return done


def _learning_rates(settings: Training, steps: int) -> list[float]:
    """The rate of every step, those that will be skipped and those of an earlier run among them.

    A stand-in takes the steps: a schedule wants every one of its own to follow one of the optimizer.
    """
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=settings.lr)
    schedule = get_scheduler(settings.schedule, stand_in, settings.warmup_steps, steps)
    rates = []
    for _ in range(steps):
        rates.append(float(schedule.get_last_lr()[0]))
        stand_in.step()
        schedule.step()
    return rates


def _batches(batches: list[dict[str, Any]], seed: int, steps: int) -> Iterator[dict[str, Any]]:
    """``steps`` batches: all of them, in an order of its own every time."""
    generator = torch.Generator().manual_seed(seed)
    left: list[int] = []
    for _ in range(steps):
        left = left or torch.randperm(len(batches), generator=generator).tolist()
        yield batches[left.pop(0)]


class _Checkpoint:
    """One safetensors file with all that training has changed; what it belongs to is in its metadata."""

    def __init__(self, path: Path, settings: Training, steps: int, batches: list[dict[str, Any]]):
        self._path = path
        told = {**asdict(settings), "checkpoint": None, "checkpoint_steps": None, "steps": steps}
        sums = [float(v.double().sum()) for batch in batches for v in batch.values() if isinstance(v, torch.Tensor)]
        self._of = json.dumps({**told, "data": sums}, sort_keys=True)

    def save(
        self, step: int, adapted: Adapted, optimizer: torch.optim.Optimizer, watcher: Watcher, done: Trained
    ) -> None:
        tensors = {f"adapter.{name}": p.detach() for name, p in adapted.trainable().items()}
        tensors |= {f"gate.{name}": gates for name, gates in adapted.gates.items()}
        tensors |= {f"watcher.{name}": value for name, value in watcher.state().items()}
        tensors["random"] = torch.get_rng_state()
        plain: dict[str, Any] = {}
        for number, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{number}.{name}"] = value
                else:
                    plain[f"{number}.{name}"] = value
        told = {"step": step, "losses": done.losses, "skipped": done.skipped, "optimizer": plain}
        partial = self._path.with_name(f".{self._path.name}.partial")
        tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
        save_file(tensors, partial, {"of": self._of, "state": json.dumps(told)})
        os.replace(partial, self._path)

    def load(self, adapted: Adapted, optimizer: torch.optim.Optimizer, watcher: Watcher, done: Trained) -> int:
        """Put everything back; returns the number of steps that are done."""
        if not self._path.exists():
            return 0
        try:
            with safe_open(self._path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise GraphPruneError(f"{self._path} is no checkpoint: {error}. Delete it to train anew.") from error
        if metadata.get("of") != self._of:
            raise GraphPruneError(f"{self._path} is of other settings or data. Delete it, or name another file.")
        state = json.loads(metadata["state"])
        for name, parameter in adapted.trainable().items():
            parameter.data.copy_(tensors[f"adapter.{name}"])
        for name, gates in adapted.gates.items():
            gates.copy_(tensors[f"gate.{name}"])
        watcher.load_state(
            {n.removeprefix("watcher."): value for n, value in tensors.items() if n.startswith("watcher.")}
        )
        held: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                number, _, key = rest.partition(".")
                held.setdefault(int(number), {})[key] = value
        for name, value in state["optimizer"].items():
            number, _, key = name.partition(".")
            held.setdefault(int(number), {})[key] = value
        whole = optimizer.state_dict()
        optimizer.load_state_dict({**whole, "state": held})
        torch.set_rng_state(tensors["random"])
        done.losses, done.skipped = list(state["losses"]), state["skipped"]
        return int(state["step"])
