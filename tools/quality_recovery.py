"""What ``bench_quality --recover`` does: prune, and train back on so many tokens as the paper of each method does.

All see the same number of tokens, those of training while pruning included, in rows of the same length, with the same
:class:`Recovered`:

- lorashear: LHSPG fades what ``ppm`` would remove, for 25 steps; then four fifths of the tokens that are left are text
  of all sources, mixed by what was lost on them, and one fifth are instructions.
- loraprune: half of the tokens while its masks grow (text), the other half instructions.
- llm-pruner, slimgpt: pruned at once, then instructions (Alpaca), as both papers do.
- flap: its paper trains nothing; here it gets the same instructions.
- any other method: pruned at once, then text of all sources, mixed by what was lost on them.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphprune
from graphprune.data.corpus import prepare
from graphprune.data.sources import sources_of
from graphprune.io.fingerprint import fingerprint, of_batches, of_model
from graphprune.passes.add_adapters import Adapters
from graphprune.passes.methods import passes_of
from graphprune.passes.train_adapters import Training
from graphprune.passes.train_lhspg import Lhspg
from graphprune.passes.train_loraprune import LoraPrune
from graphprune.recovery.recover import recover_on
from graphprune.recovery.run_folder import once
from graphprune.recovery.settings import Recovery

TEXTS, INSTRUCTIONS = "calib", "instruct/alpaca_cleaned_first5000.jsonl"
RECOVERED = ("lorashear", "llm-pruner", "loraprune", "slimgpt", "flap")
ROUNDS, VALIDATION = 6, 16
_FADING = Lhspg(warmup_steps=5, periods=4, period_steps=5, final_steps=0)
_TEXT_SHARE = {"lorashear": 0.8, "loraprune": 0.0, "llm-pruner": 0.0, "slimgpt": 0.0, "flap": 0.0}


@dataclass(frozen=True)
class TrainBack:
    """How every method is trained back: on ``recover`` tokens, of which ``texts`` are text rather than instructions.

    The others are as in :class:`Recovery`; without ``texts`` it is as said above.
    """

    recover: int
    seed: int = 0
    batch: int = 8
    rank: int = 8
    lr: float = 1e-3
    distill: float = 0.0
    bf16: bool = False
    texts: float | None = None

    def settings(self, steps: int) -> Recovery:
        """Of a stage of so many steps a round."""
        return Recovery(
            adapters=Adapters(rank=self.rank, alpha=2 * self.rank),
            lr=self.lr,
            batch=self.batch,
            rows_at_once=self.batch,
            round_steps=steps,
            rounds=ROUNDS,
            distill=self.distill,
            bf16=self.bf16,
            seed=self.seed,
        )


def recovered(
    model: nn.Module,
    tokenizer: Any,
    method: str,
    ratio: float,
    rows: torch.Tensor,
    data: Path,
    work: Path,
    how: TrainBack,
) -> nn.Module:
    """``model`` pruned by ``method`` and trained back.

    ``rows`` are what is calibrated on, int64 of shape ``(rows, length)``. ``work`` keeps the tokens, for all cells, and
    until it is finished what this one has done: the same call goes on from there.
    """
    length = rows.shape[1]
    run = work / "runs" / fingerprint(of_model(model), of_batches([{"rows": rows}]), method, str(ratio), repr(how))
    passes, used = _passes(method, how, rows[:4].numel(), run / "prune.safetensors")

    def prune() -> None:
        batches = [{"input_ids": batch} for batch in rows.split(4)]
        small = graphprune.compile(model, ratio, method=method, passes=passes, data=batches, seed=how.seed)
        graphprune.save(small, run / "pruned")

    run.mkdir(parents=True, exist_ok=True)
    once(run / "pruned", prune)
    found = graphprune.load(run / "pruned", device=rows.device)
    left = max(0, how.recover - used)
    texts = left * (_TEXT_SHARE.get(method, 1.0) if how.texts is None else how.texts)
    for given, instruct, share in ((TEXTS, False, texts), (INSTRUCTIONS, True, left - texts)):
        steps = round(share / (how.batch * length) / ROUNDS)
        if steps:
            sources = sources_of(data / given, instruct=instruct)
            corpora = prepare(sources, tokenizer, work / "tokens", length=length, validation=VALIDATION)
            stage = run / ("instruct" if instruct else "texts")
            found = recover_on(found, corpora, stage, dense=model, settings=how.settings(steps)).model
    shutil.rmtree(run)
    return found


def _passes(method: str, how: TrainBack, per_step: int, state: Path) -> tuple[Any, int]:
    """The passes that prune, and how many tokens they train on; ``state`` is for what they have done so far."""
    if method == "lorashear":
        fading = replace(_FADING, training=replace(_FADING.training, seed=how.seed, checkpoint=state))
        return passes_of(method, fading), fading.steps * per_step
    if method == "loraprune":
        steps = max(1, how.recover // 2 // per_step)
        training = Training(lr=how.lr, seed=how.seed, autocast=how.bf16, checkpoint=state)
        return passes_of(method, LoraPrune(steps=steps, training=training)), steps * per_step
    return passes_of(method), 0
