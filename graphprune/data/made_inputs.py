"""Calibration inputs that nobody has to give: random ones, and text that the model writes itself.

A model that writes its own calibration text: Williams, Chrysostomou and Aletras, Self-calibration for Language Model
Quantization and Pruning (arXiv 2410.17170); from a random first token: Liu et al., LLM-QAT (arXiv 2305.17888).

Generating text takes as many steps as it is long. Many short beginnings side by side take few, and joined into rows
they calibrate as well as long texts do: that is what a call without data gets.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from graphprune.data.forward_arguments import by_name, config_of, first_tensor, known_tokens
from graphprune.errors import GraphPruneError
from graphprune.ir.program import Program
from graphprune.trace.inputs import longest_row, plain_tokens, special_tokens
from graphprune.trace.placement import placed
from graphprune.trace.quiet import REFUSALS, seeded, without_hooks
from graphprune.trace.skeleton import scratch_copy

Batch = dict[str, Any]
# Some models count positions from behind the padding token, so that two of them are never used.
_UNUSED_POSITIONS = 2
_ROWS_AT_ONCE = 4
_TEXTS_AT_ONCE = 32
_SNIPPET = 8  # tokens of a beginning
_SNIPPETS_AT_ONCE = 128
SAMPLES = 32  # rows, where the user does not say how many
_ROWS_OF_SNIPPETS = 8


def made_batches(program: Program) -> list[Batch]:
    """What a call without data calibrates on: snippets where the model writes some, and random inputs elsewhere."""
    try:
        return snippet_batches(program)
    except GraphPruneError:  # it does not continue text, or its generate fails
        return random_batches(program)


def random_batches(program: Program) -> list[Batch]:
    """Random inputs for the model of ``program``: keyword arguments of its forward, drawn with ``options.seed``.

    A model that reads tokens and nothing else gets ``samples`` rows of ``length`` tokens, uniform over its vocabulary
    without the special ones that the config names. Any other gets about ``samples`` items in the shapes of its example
    inputs: normal floats, random tokens and integers, the same masks. Where a model refuses what was made, as one with
    inputs that hang together may, it gets its example inputs.
    """
    example = _example(program)
    generator = torch.Generator().manual_seed(program.options.seed)
    if _reads_only_tokens(program.model, example):
        batches = _token_batches(program, example, generator)
        if _accepts(program, {name: value[:1] for name, value in batches[0].items()}):
            return batches
    batches = _like_example(program, example, generator)
    return batches if _accepts(program, batches[0]) else [example]


def _example(program: Program) -> Batch:
    """The example inputs by name, without what was set for the trace."""
    return {name: value for name, value in by_name(program.model, program.inputs).items() if name != "use_cache"}


def _reads_only_tokens(model: nn.Module, example: Batch) -> bool:
    tensors = {name: value for name, value in example.items() if isinstance(value, torch.Tensor)}
    rows = {name for name, value in tensors.items() if value.ndim == 2 and _is_tokens(model, name, value)}
    masks = {name for name, value in tensors.items() if name == "attention_mask" and bool(value.all())}
    return bool(rows) and rows | masks == tensors.keys() and vocabulary(model) is not None


def _is_tokens(model: nn.Module, name: str, value: torch.Tensor) -> bool:
    integers = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return integers and (name.endswith("input_ids") or name == getattr(model, "main_input_name", None))


def vocabulary(model: nn.Module) -> torch.Tensor | None:
    """The tokens to draw from, int64, or None for a model that does not say what its vocabulary is."""
    if config_of(model) is not None:
        try:
            return plain_tokens(model)
        except GraphPruneError:  # the config has no vocabulary
            return None
    size = known_tokens(model)
    return None if size is None else torch.arange(size)


def _token_batches(program: Program, example: Batch, generator: torch.Generator) -> list[Batch]:
    tokens, shape = _tokens_to_draw(program)
    device = program.device
    names = [
        name
        for name, value in example.items()
        if isinstance(value, torch.Tensor) and _is_tokens(program.model, name, value)
    ]
    rows = {name: _draw(tokens, shape, generator).to(device) for name in names}
    return [
        {name: value[start : start + _ROWS_AT_ONCE] for name, value in rows.items()}
        for start in range(0, shape[0], _ROWS_AT_ONCE)
    ]


def _tokens_to_draw(program: Program) -> tuple[torch.Tensor, tuple[int, int]]:
    """The vocabulary, and how many rows of how many tokens."""
    tokens = vocabulary(program.model)
    assert tokens is not None
    limit = longest_row(program.model) if config_of(program.model) is not None else None
    length = program.options.length
    if limit is not None:
        length = max(1, min(length, limit - _UNUSED_POSITIONS))
    return tokens, (rows_wanted(program), length)


def rows_wanted(program: Program) -> int:
    """``options.samples``, or how many they are when the user leaves it open."""
    return program.options.samples or SAMPLES


def _draw(choice: torch.Tensor, shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> torch.Tensor:
    return choice[torch.randint(0, len(choice), shape, generator=generator)]


def _like_example(program: Program, example: Batch, generator: torch.Generator) -> list[Batch]:
    """Batches in the shapes of the example, as many as reach ``samples`` items."""
    items = [value.shape[0] for value in example.values() if isinstance(value, torch.Tensor) and value.ndim]
    how_many = math.ceil(rows_wanted(program) / max(1, min(items, default=1)))
    make = _Like(program.model, generator)
    return [make(example) for _ in range(how_many)]


class _Like:
    """Another batch like an example: see the methods for what becomes of each kind of tensor."""

    def __init__(self, model: nn.Module, generator: torch.Generator):
        self.model, self.generator = model, generator
        config = config_of(model)
        self.special = torch.tensor(special_tokens(config) if config is not None else [], dtype=torch.long)
        self.tokens = vocabulary(model)

    def __call__(self, example: Batch) -> Batch:
        return {
            name: tree_map_only(torch.Tensor, partial(self._tensor, name), given) for name, given in example.items()
        }

    def _tensor(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if "mask" in name or value.dtype == torch.bool or value.is_complex() or not value.numel():
            return value
        if value.is_floating_point():
            return self._floats(value)
        if _is_tokens(self.model, name, value) and self.tokens is not None:
            return self._drawn_tokens(value, self.tokens)
        return self._integers(value) if config_of(self.model) is None else value

    def _floats(self, value: torch.Tensor) -> torch.Tensor:
        """Normal with the mean and the deviation of the example, or N(0, 1) where it has none.

        Whole numbers among fractions stay: they are padding, or positions that travel with features.
        """
        plain = value.detach().float().cpu()
        whole = plain == plain.round()
        noise = torch.randn(value.shape, generator=self.generator)
        if bool(whole.all()):
            made = noise
        else:
            made = torch.where(whole, plain, noise * plain[~whole].std(correction=0) + plain[~whole].mean())
        return made.to(value.device, value.dtype)

    def _drawn_tokens(self, value: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Random tokens; the special ones stay, such as those that hold the place of an image."""
        plain = value.cpu()
        drawn = _draw(tokens, value.shape, self.generator).to(value.dtype)
        return torch.where(torch.isin(plain, self.special), plain, drawn).to(value.device)

    def _integers(self, value: torch.Tensor) -> torch.Tensor:
        """Uniform between the smallest and the largest of the example.

        Only of a module that says nothing about itself. With a config, integers that are no tokens are grids, boxes,
        positions: they hang together with the rest, and stay.
        """
        low, high = int(value.min()), int(value.max())
        drawn = torch.randint(low, high + 1, value.shape, generator=self.generator)
        return drawn.to(value.device, value.dtype)


def _accepts(program: Program, batch: Batch) -> bool:
    """Whether forward runs on what was made."""
    scratch = scratch_copy(program.model, program.need("trace").written)
    try:
        with torch.no_grad(), without_hooks(scratch), placed(scratch, program.device):
            scratch(**batch)
    except REFUSALS:
        return False
    return True


def sampled_batches(program: Program) -> list[Batch]:
    """``samples`` rows of ``length`` tokens that the model writes itself: each a random first token, and what follows.

    Ancestral sampling (temperature 1, no truncation) with the model's own ``generate`` and its cache, seeded with
    ``options.seed``.

    Raises :class:`GraphPruneError` for a model that does not continue text.
    """
    _check_continues_text(program, "sampled")
    tokens, (samples, length) = _tokens_to_draw(program)
    return _in_batches(_written(program, tokens, samples, length, _TEXTS_AT_ONCE))


def snippet_batches(program: Program) -> list[Batch]:
    """``samples`` rows (by default 8) of ``length`` tokens, joined from beginnings of texts that the model writes.

    Each is a random first token and 7 that follow, as in :func:`sampled_batches`.
    """
    _check_continues_text(program, "snippets")
    tokens, (_, length) = _tokens_to_draw(program)
    numbers = (program.options.samples or _ROWS_OF_SNIPPETS) * length
    snippets = _written(program, tokens, math.ceil(numbers / _SNIPPET), _SNIPPET, _SNIPPETS_AT_ONCE)
    return _in_batches(snippets.flatten()[:numbers].view(-1, length))


def _in_batches(rows: torch.Tensor) -> list[Batch]:
    return [{"input_ids": part} for part in rows.split(_ROWS_AT_ONCE)]


def _check_continues_text(program: Program, data: str) -> None:
    model, example = program.model, _example(program)
    generates = hasattr(model, "generate") and getattr(model, "can_generate", lambda: True)()
    reads_text = first_tensor(example) == "input_ids" and _reads_only_tokens(model, example)
    if not generates or not reads_text or "decoder_input_ids" in example:
        raise GraphPruneError(
            f"data={data!r} is for models that continue text, which {type(model).__name__} does not: "
            "use data='random', or give data."
        )


def _written(program: Program, tokens: torch.Tensor, count: int, length: int, at_once: int) -> torch.Tensor:
    """``count`` texts of ``length`` tokens, int64, each begun with one of ``tokens``."""
    model, options = program.model, program.options
    starts = _draw(tokens, (count, 1), torch.Generator().manual_seed(options.seed))
    scratch: Any = scratch_copy(model, program.need("trace").written)
    texts: list[torch.Tensor] = []
    with torch.no_grad(), without_hooks(scratch), placed(scratch, program.device), seeded(options.seed):
        for part in starts.to(program.device).split(at_once):
            where = f"sampling texts {len(texts) * at_once + 1} to {len(texts) * at_once + len(part)} of {count}"
            texts.append(_continued(program, scratch, part, length, where))
    return torch.cat(texts)


def _continued(program: Program, model: Any, starts: torch.Tensor, length: int, where: str) -> torch.Tensor:
    """(rows, length): each start with what the model says after it; the end of a text does not end a row."""
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    class Progress(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            program.say(f"{where}: {input_ids.shape[1]} of {length} tokens")
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    # In place of the model's own, which would end rows at the end of a text, cut off what is rare, and so on.
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=length - 1, use_cache=True
    )
    try:
        return model.generate(
            input_ids=starts,
            attention_mask=torch.ones_like(starts),
            stopping_criteria=StoppingCriteriaList([Progress()]),
        )
    except REFUSALS as error:
        raise GraphPruneError(
            f"Sampling text: {type(model).__name__}.generate failed ({type(error).__name__}: {error}). "
            "Use data='random', or give data."
        ) from error
