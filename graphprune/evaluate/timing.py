"""How long a language model takes: prefill of a prompt, and one more token with the KV cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.evaluate.language_model import check_language_model, random_prompt, step
from graphprune.trace.quiet import eval_mode


@dataclass(frozen=True)
class Latency:
    """Medians, in milliseconds.

    Attributes:
        batch: rows at once.
        prompt: tokens in each.
        prefill_ms: one forward of the whole prompt.
        decode_ms: one more token for every row; None for a model that returns no KV cache.
    """

    batch: int
    prompt: int
    prefill_ms: float
    decode_ms: float | None

    @property
    def prefill_tokens_per_second(self) -> float:
        return 1000 * self.batch * self.prompt / self.prefill_ms

    @property
    def decode_tokens_per_second(self) -> float | None:
        return None if self.decode_ms is None else 1000 * self.batch / self.decode_ms

    def to_dict(self) -> dict[str, Any]:
        """Every field and both rates."""
        rates = ("prefill_tokens_per_second", "decode_tokens_per_second")
        return {**asdict(self), **{name: getattr(self, name) for name in rates}}


def latency(model: nn.Module, *, batch: int = 1, prompt: int = 128, new_tokens: int = 32, repeats: int = 5) -> Latency:
    """Time ``model`` on random tokens, on the device where it is.

    Args:
        batch: rows at once.
        prompt: tokens in each.
        new_tokens: tokens decoded, one by one, after the prompt; the median is over these.
        repeats: forwards of the prompt; the median is over these. One more comes first and is not counted.

    Raises:
        GraphPruneError: when ``model`` is not a causal language model for ``prompt + new_tokens + 1`` tokens.
    """
    for name, value in (("batch", batch), ("prompt", prompt), ("new_tokens", new_tokens), ("repeats", repeats)):
        if value < 1:
            raise GraphPruneError(f"{name} must be at least 1, not {value}.")
    check_language_model(model, prompt + new_tokens + 1)
    ids = random_prompt(model, batch, prompt)
    timed = _Timer(ids.device)
    seconds = []
    with eval_mode(model):
        for _ in range(repeats + 1):  # the first one pays for allocations and for choosing kernels
            out, took = timed(lambda: step(model, ids))
            seconds.append(took)
        decode = _decode(model, out, new_tokens, timed)
    return Latency(batch, prompt, _milliseconds(seconds[1:]), None if decode is None else _milliseconds(decode))


def _milliseconds(seconds: list[float]) -> float:
    return 1000 * statistics.median(seconds)


def _decode(model: nn.Module, out: Any, new_tokens: int, timed: _Timer) -> list[float] | None:
    """Seconds of each of ``new_tokens`` greedy steps after ``out``; one more comes first and is not counted."""
    seconds = []
    for _ in range(new_tokens + 1):
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            return None
        out, took = timed(lambda: step(model, out.logits[:, -1:].argmax(-1), cache))  # noqa: B023  (called at once)
        seconds.append(took)
    return seconds[1:]


class _Timer:
    """Calls a function and says how long it took, in seconds, with all of its work on ``device`` done."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, float]:
        self._wait()
        start = time.perf_counter()
        result = function()
        self._wait()
        return result, time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
