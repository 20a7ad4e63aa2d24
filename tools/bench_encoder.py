"""What an encoder is calibrated on: real text, or what the compiler makes itself.

    python tools/bench_encoder.py MODEL --data DIR [--ratio 0.1]

MODEL is a folder with a text encoder, such as all-MiniLM-L6-v2, and its tokenizer; DIR holds ``calib/c4.jsonl``.
Printed is how near the embeddings of the pruned model (mean over the tokens) are to the dense ones: the mean cosine
over 256 texts that were not calibrated on, and how often the nearest other text is the same one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import normalize

import graphprune
from graphprune.data.calibration import read_texts, token_rows
from graphprune.io.models import load_model

METHODS = ("magnitude", "wanda-sp", "ppm", "flap", "llm-pruner")
TEXTS, LENGTH, SAMPLES = 256, 64, 32


def embeddings(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Unit vectors, float32 of shape ``(rows, width)``."""
    with torch.no_grad():
        found = [model(input_ids=part).last_hidden_state.mean(1) for part in rows.split(32)]
    return normalize(torch.cat(found).float(), dim=-1)


def nearest(vectors: torch.Tensor) -> torch.Tensor:
    """The number of the nearest other row, for every row."""
    return (vectors @ vectors.T).fill_diagonal_(-1).argmax(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--ratio", type=float, default=0.1)
    arguments = parser.parse_args(argv)
    model, tokenizer = load_model(arguments.model, dtype=torch.float32)
    texts = read_texts([arguments.data / "calib" / "c4.jsonl"])
    held_out = token_rows(texts[len(texts) // 2 :], tokenizer, TEXTS, LENGTH, 1)
    inputs: dict[str, Any] = {
        "text": token_rows(texts[: len(texts) // 2], tokenizer, SAMPLES, LENGTH, 0),
        "random (made)": "random",
    }
    dense = embeddings(model, held_out)
    table = Table("method", "calibrated on", "mean cosine", "same nearest", title=f"{arguments.ratio:.0%} removed")
    for method in METHODS:
        for name, data in inputs.items() if method != "magnitude" else [("nothing", None)]:
            small = graphprune.compile(model, arguments.ratio, method=method, data=data, samples=SAMPLES, length=LENGTH)
            found = embeddings(small, held_out)
            same = (nearest(found) == nearest(dense)).float().mean()
            table.add_row(method, name, f"{(found * dense).sum(1).mean():.3f}", f"{same:.1%}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
