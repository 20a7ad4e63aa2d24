"""A tiny model and rows of made tokens to recover on; as a script, a run in processes of its own."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune
from graphprune.data.corpus import Corpus
from graphprune.passes.add_adapters import Adapters
from graphprune.recovery.recover import recover_on
from graphprune.recovery.settings import Recovery

WORDS = 40
QUICK: dict[str, Any] = {
    "adapters": Adapters(rank=4),
    "lr": 1e-2,
    "batch": 4,
    "rows_at_once": 4,
    "round_steps": 3,
    "rounds": 3,
    "warmup_steps": 0,
}


class Made:
    """Rows that repeat a pattern of their source; every second row is shorter."""

    def __init__(self, source: int, rows: int, first: int = 0):
        self.source, self.rows, self.first = source, rows, first

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.source + row + self.first)
        start = int(torch.randint(0, WORDS, (), generator=generator))
        ids = (start + (1 + self.source) * torch.arange(16 - 4 * (row % 2))) % WORDS
        labels = ids.clone()
        labels[:3] = -100
        return {"input_ids": ids, "labels": labels}


def corpora(instruct: bool = False) -> list[Corpus]:
    return [Corpus(f"source{n}", False, Made(n, 30), Made(n, 8, 500), f"made {n}") for n in range(2)] + (
        [Corpus("answers", True, Made(5, 30), Made(5, 8, 500), "made 5")] if instruct else []
    )


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=WORDS, **sizes)).eval()


def main(folder: Path, options: dict[str, Any]) -> None:
    """Recover into ``folder``; the first process writes what came of it to ``result.json``."""
    dense = llama()
    pruned = graphprune.compile(dense, 0.2, method="magnitude")
    settings = Recovery(**{**QUICK, **options})
    found = recover_on(pruned, corpora(instruct=True), folder, dense=dense, settings=settings)
    with torch.no_grad():
        logits = found.model(torch.arange(10)[None]).logits
    result = {"stages": [asdict(stage) for stage in found.stages], "logits": logits.tolist()}
    from accelerate import PartialState

    if PartialState().is_main_process:
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
