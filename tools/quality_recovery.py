"""What ``bench_quality --recover`` does: prune, and train back on so many tokens as the paper of each method does.

All see the same number of tokens, those of training while pruning included, in rows of the same length:

- lorashear: LHSPG fades what ``ppm`` would remove, for 25 steps; then four fifths of the tokens that are left are text
  of all sources, mixed by what was lost on them, and one fifth are instructions.
- loraprune: half of the tokens while its masks grow (text), the other half instructions.
- llm-pruner, slimgpt: pruned at once, then instructions (Alpaca), as both papers do.
- flap: its paper trains nothing; here it gets the same instructions.
- any other method: pruned at once, then text of all sources, mixed by what was lost on them.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

import graphprune
from graphprune.data.corpus import Corpus, prepare
from graphprune.data.sources import sources_of
from graphprune.passes.methods import METHODS, passes_of
from graphprune.passes.train_adapters import Training
from graphprune.passes.train_lhspg import Lhspg, train_lhspg
from graphprune.passes.train_loraprune import LoraPrune, train_loraprune
from graphprune.recovery.recover import recover_on
from graphprune.recovery.settings import Recovery

TEXTS, INSTRUCTIONS = "calib", "instruct/alpaca_cleaned_first5000.jsonl"
RECOVERED = ("lorashear", "llm-pruner", "loraprune", "slimgpt", "flap")
ROUNDS, BATCH, VALIDATION = 6, 8, 8
_FADING = Lhspg(warmup_steps=5, periods=4, period_steps=5, final_steps=0)
_TEXT_SHARE = {"lorashear": 0.8, "loraprune": 0.0, "llm-pruner": 0.0, "slimgpt": 0.0, "flap": 0.0}


def recovered(
    model: nn.Module, tokenizer: Any, method: str, ratio: float, rows: torch.Tensor, data: Path, tokens: int, seed: int
) -> nn.Module:
    """``model`` pruned by ``method`` and trained back on ``tokens`` tokens.

    ``rows`` are what is calibrated on, int64 of shape ``(rows, length)``.
    """
    length = rows.shape[1]
    batches = [{"input_ids": batch} for batch in rows.split(4)]
    how, used = _passes(method, tokens, rows[:4].numel(), seed)
    pruned = graphprune.compile(model, ratio, method=method, passes=how, data=batches, seed=seed)
    left = max(0, tokens - used)
    texts = left * _TEXT_SHARE.get(method, 1.0)
    with TemporaryDirectory(prefix="recovery-") as folder:
        for given, instruct, share in ((TEXTS, False, texts), (INSTRUCTIONS, True, left - texts)):
            steps = round(share / (BATCH * length) / ROUNDS)
            if steps:
                corpora = _corpora(data / given, instruct, tokenizer, folder, length, seed)
                settings = Recovery(batch=BATCH, rows_at_once=BATCH, round_steps=steps, rounds=ROUNDS, seed=seed)
                pruned = recover_on(pruned, corpora, Path(folder, str(instruct)), dense=model, settings=settings).model
    return pruned


def _corpora(path: Path, instruct: bool, tokenizer: Any, folder: str, length: int, seed: int) -> list[Corpus]:
    sources = sources_of(path, instruct=instruct)
    return prepare(sources, tokenizer, folder, length=length, validation=VALIDATION, seed=seed)


def _passes(method: str, tokens: int, per_step: int, seed: int) -> tuple[Any, int]:
    """The passes that prune, and how many tokens they train on."""
    if method == "lorashear":
        return (*METHODS["ppm"], train_lhspg(_FADING)), _FADING.steps * per_step
    if method == "loraprune":
        steps = max(1, tokens // 2 // per_step)
        settings = LoraPrune(steps=steps, training=Training(seed=seed))
        return (*METHODS["loraprune"][:-1], train_loraprune(settings)), steps * per_step
    return passes_of(method), 0
