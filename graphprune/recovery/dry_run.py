"""What a run would do, what would come out of it, and about how long it would take."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.compiler import compile
from graphprune.data.sources import check_names, sources_of
from graphprune.errors import GraphPruneError
from graphprune.recovery.shear import EVALUATION, MODEL, PRUNED, TOKENS, Measures, Shear
from graphprune.reporting import report
from graphprune.trace.skeleton import copy_structure

_BACKWARD = 3.0  # forward and backward, in forwards


@dataclass(frozen=True)
class Work:
    """One stage of a run: where its result is or will be, whether it is there, and the seconds that it takes."""

    name: str
    place: str
    done: bool
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """What a run would do.

    Attributes:
        parameters: before and after.
        widths: before, after, and how many groups have both.
        work: the stages.
        seconds: of what is left to do, at most, on this machine and in one process.
    """

    parameters: tuple[int, int]
    widths: list[tuple[int, int, int]]
    work: list[Work]
    seconds: float

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [
            f"parameters      {before:,} → {after:,} ({1 - after / before:.2%} removed)",
            "widths          " + ", ".join(f"{a} → {b} ×{n}" for a, b, n in self.widths),
            "",
        ]
        for one in self.work:
            takes = "done" if one.done else f"about {_spoken(one.seconds)}"
            lines.append(f"{one.name:<34} {takes:>16}   {one.place}")
        return "\n".join(
            [*lines, "", f"left to do: at most about {_spoken(self.seconds)} on this machine, in one process"]
        )


def forecast(model: nn.Module, folder: Path, what: Shear, data: Any, instruct: Any, measures: Measures) -> Forecast:
    """The stages with what is there of them already, the sizes before and after, and a time from one timed forward.

    Sizes are those of an allocation without data; a method that measures may spread them otherwise. Nothing is written.

    Raises :class:`GraphPruneError` as the run would for sources that are not there and a ratio that cannot be reached.
    """
    texts, instructions = sources_of(data), [] if instruct is None else sources_of(instruct, instruct=True)
    check_names([*texts, *instructions])
    chosen = {"allocation": "sparing", **what.compile}
    small = report(compile(_without_weights(model), what.ratio, method="random", **chosen))
    second = _seconds_per_token(model, what)
    stages = _stages(folder, what, len(texts), len(instructions), second, measures, small.ratio)
    work = [Work(name, str(place), place.exists(), seconds) for name, place, seconds in stages]
    return Forecast(
        parameters=(small.parameters_before, small.parameters_after),
        widths=[(before, after, count) for (before, after), count in _widths(small.widths).items()],
        work=work,
        seconds=sum(one.seconds for one in work if not one.done),
    )


def _without_weights(model: nn.Module) -> nn.Module:
    def on_meta(tensor: torch.Tensor) -> torch.Tensor:
        empty = torch.empty_like(tensor, device="meta")
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    return copy_structure(model, on_meta)


def _widths(widths: dict[str, tuple[int, int]]) -> dict[tuple[int, int], int]:
    """(before, after) → how many groups."""
    counts: dict[tuple[int, int], int] = {}
    for before, after in widths.values():
        counts[before, after] = counts.get((before, after), 0) + 1
    return counts


def _seconds_per_token(model: nn.Module, what: Shear) -> float:
    """Of a forward of the dense model on a batch of random tokens."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "vocab_size"):
        raise GraphPruneError(f"{type(model).__name__} is no language model: recovery trains on text.")
    ids = torch.randint(0, config.vocab_size, (what.recovery.rows_at_once, what.length))
    ids = ids.to(next(model.parameters()).device)
    with torch.no_grad():
        model(input_ids=ids[:1])
        start = time.perf_counter()
        model(input_ids=ids)
        if ids.device.type != "cpu":
            torch.accelerator.synchronize(ids.device)
    return (time.perf_counter() - start) / ids.numel()


def _stages(
    folder: Path, what: Shear, texts: int, instructions: int, second: float, measures: Measures, removed: float
) -> list[tuple[str, Path, float]]:
    """Name, where its result is, seconds."""
    r, rest = what.recovery, 1 - removed
    rows = 4 * what.length  # of a batch while pruning
    trained = what.lhspg.steps * rows * _BACKWARD if what.method == "lorashear" else 0
    prune = second * (2 * what.samples * what.length + trained)
    round_of = r.round_steps * r.batch * what.length * (_BACKWARD * rest + (1 if r.distill else 0))

    def recover(sources: int) -> float:
        measured = what.validation * what.length * sources
        return second * (r.rounds * (round_of + measured * rest) + measured * (1 + rest))

    tokens = (measures.tokens or 300_000) * len(measures.lengths) if measures.text else 0
    found = [
        ("tokens", folder / TOKENS, 0.0),
        (f"prune ({what.method})", folder / PRUNED, prune),
        (f"recover, pretraining ({texts} sources)", folder / "recovery" / "pretraining" / "stage.json", recover(texts)),
    ]
    if instructions:
        place = folder / "recovery" / "instruct" / "stage.json"
        found.append((f"recover, instruct ({instructions} sources)", place, recover(instructions)))
    return [
        *found,
        ("write the model", folder / MODEL, 0.0),
        ("measure (without tasks)", folder / EVALUATION, second * tokens * (1 + 2 * rest)),
    ]


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
