"""Everything about one model in one place."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.evaluate.macs import count_macs, positions
from graphprune.evaluate.memory import peak_memory, peak_memory_of
from graphprune.evaluate.perplexity import perplexity
from graphprune.evaluate.size import checkpoint_bytes, parameter_bytes
from graphprune.evaluate.tasks import Scores, Tasks, average
from graphprune.evaluate.timing import Latency, latency
from graphprune.io.checked_json import of_kind, read_json, take
from graphprune.trace.inputs import example_inputs_for, normalise


@dataclass
class Evaluation:
    """What was measured; what was not asked for is None or empty.

    Attributes:
        parameters: their number, tied ones once.
        parameter_bytes: what they take in memory.
        macs: multiply-accumulates of a forward per token, or per sample for a model that does not read tokens.
        checkpoint_bytes: of the weight files on disk.
        perplexity: tokens per window → perplexity, infinity when the model is broken.
        tasks: lm-eval task → metric → value.
        task_average: of acc_norm or acc (:func:`average`).
        latency: one entry per batch size.
        peak_memory_bytes: of the prefill of one prompt: weights, activations, KV cache.
    """

    parameters: int
    parameter_bytes: int
    macs: int
    checkpoint_bytes: int | None = None
    perplexity: dict[int, float] = field(default_factory=dict)
    tasks: Scores = field(default_factory=dict)
    latency: list[Latency] = field(default_factory=list)
    peak_memory_bytes: int | None = None

    @property
    def task_average(self) -> float | None:
        return average(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which has no infinity: that is the text ``"inf"``."""
        plain = {
            **vars(self),
            "perplexity": {str(length): value for length, value in self.perplexity.items()},
            "task_average": self.task_average,
            "latency": [one.to_dict() for one in self.latency],
        }
        return finite(plain)

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Evaluation:
        """Read what :meth:`to_dict` made. Raises :class:`GraphPruneError` naming ``where`` for anything else."""
        of_kind(data, dict, where)
        number, count = (int, float, str), (int, type(None))
        try:
            return cls(
                parameters=take(data, "parameters", int, where),
                parameter_bytes=take(data, "parameter_bytes", int, where),
                macs=take(data, "macs", int, where),
                checkpoint_bytes=take(data, "checkpoint_bytes", count, where),
                perplexity={
                    int(length): float(of_kind(value, number, where))
                    for length, value in take(data, "perplexity", dict, where).items()
                },
                tasks={
                    task: {
                        metric: float(of_kind(value, number, where))
                        for metric, value in of_kind(metrics, dict, where).items()
                    }
                    for task, metrics in take(data, "tasks", dict, where).items()
                },
                latency=[_latency(of_kind(one, dict, where), where) for one in take(data, "latency", list, where)],
                peak_memory_bytes=take(data, "peak_memory_bytes", count, where),
            )
        except ValueError as error:  # a text that is no number
            raise GraphPruneError(f"{where} is damaged: {error}.") from None


def read_evaluations(path: str | os.PathLike[str]) -> dict[str, Evaluation]:
    """The file that ``graphprune eval -o`` wrote: title → evaluation. Raises :class:`GraphPruneError`."""
    return {title: Evaluation.from_dict(one, f"{path}: {title}") for title, one in read_json(Path(path)).items()}


def _latency(data: dict[str, Any], where: str) -> Latency:
    decode = take(data, "decode_ms", (int, float, type(None)), where)
    prefill = float(take(data, "prefill_ms", (int, float), where))
    return Latency(
        take(data, "batch", int, where),
        take(data, "prompt", int, where),
        prefill,
        decode if decode is None else float(decode),
    )


def finite(data: Any) -> Any:
    """``data`` for JSON: what is not finite as text."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


def evaluate(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    text: str | Sequence[str] | None = None,
    lengths: Sequence[int] = (128, 2048),
    tokens: int | None = None,
    tasks: Tasks | Sequence[str] = (),
    include_path: str | os.PathLike[str] | None = None,
    limit: int | float | None = None,
    batch_sizes: Sequence[int] = (),
    memory: bool = False,
    prompt: int = 128,
    folder: str | os.PathLike[str] | None = None,
    example_inputs: Any = None,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure a model, on the device where it is. It is left as it was.

    Args:
        tokenizer: of the model; needed for ``text`` and ``tasks``.
        text: to take the perplexity of; several texts are joined by an empty line, as the pruning papers join WikiText.
        lengths: tokens per window, one perplexity for each.
        tokens: use only the first so many tokens of the text.
        tasks: names of lm-eval tasks, or :class:`Tasks`. include_path, limit: see there.
        batch_sizes: measure latency at these.
        memory: measure peak memory; on the CPU that needs ``folder``.
        prompt: tokens of the prompt for latency and memory.
        folder: where the model is saved (or its .gguf file, or name), for the bytes of its checkpoint.
        example_inputs: as for :func:`graphprune.compile`, to count MACs on; made up for Hugging Face models.
        progress: called with what is measured next.

    Raises:
        GraphPruneError: when the text is shorter than one window, a task or its data is missing, or the model cannot do
            what is asked.
    """
    say = progress or (lambda _: None)
    if tasks and not isinstance(tasks, Tasks):
        say("finding the tasks")
        tasks = Tasks(tasks, include_path=include_path, limit=limit)
    say("counting")
    first = next(model.parameters(), None)
    if first is None:
        raise GraphPruneError(f"{type(model).__name__} has no parameters.")
    given = example_inputs is not None
    inputs = normalise(example_inputs) if given else example_inputs_for(model, first.device, first.dtype)
    found = Evaluation(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        parameter_bytes=parameter_bytes(model),
        macs=count_macs(model, inputs) // positions(inputs),
        checkpoint_bytes=None if folder is None else checkpoint_bytes(folder),
    )
    if text is not None:
        joined = text if isinstance(text, str) else "\n\n".join(text)
        for length in lengths:
            what = f"perplexity in windows of {length} tokens"
            say(what)
            found.perplexity[length] = perplexity(
                model, tokenizer, joined, length=length, tokens=tokens, progress=_after(say, what)
            )
    for batch in batch_sizes:
        say(f"latency at batch {batch}")
        found.latency.append(latency(model, batch=batch, prompt=prompt))
    if memory:
        say("peak memory")
        found.peak_memory_bytes = _peak_memory(model, first, folder, prompt)
    if isinstance(tasks, Tasks):
        say(f"tasks {', '.join(tasks.names)}")
        found.tasks = tasks.scores(model, tokenizer)
    return found


def _after(say: Callable[[str], None], what: str) -> Callable[[str], None]:
    """Says how far it is with what is being done."""
    return lambda how_far: say(f"{what}: {how_far}")


def _peak_memory(model: nn.Module, first: torch.Tensor, folder: str | os.PathLike[str] | None, prompt: int) -> int:
    if first.device.type == "cuda":
        return peak_memory(model, prompt=prompt)
    if folder is None:
        raise GraphPruneError("Peak memory on the CPU is that of a process of its own: give folder=, the saved model.")
    return peak_memory_of(str(folder), prompt=prompt, dtype=first.dtype)
