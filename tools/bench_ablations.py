"""The ablations of the SlimGPT paper (arXiv 2412.18110, section 4.3) on a small model.

    python tools/bench_ablations.py MODEL --data DIR [--samples 64] [--length 256] [--tokens 20000]

Perplexity on WikiText-2 (windows of 128) after pruning with one thing changed at a time; DIR is that of
``tools/bench_quality.py``. Printed are both sides of every comparison and whether the paper's side is better. Exits
with 1 when one is not.

- *grouped Cholesky*: heads (of grouped-query attention: whole KV groups) cost what removing all their columns costs,
  computed again after each, against the sum over columns of the first H⁻¹; 6% of all parameters from the attention.
- *dynamic group size* of FFN channels against 128 at a time; 20% of all parameters from the FFNs.
- *log-increasing* ratios over depth against uniform ones, and uniform against decreasing ones; 20% from the FFNs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_quality import calibration_rows, evaluation_text
from rich.console import Console
from rich.table import Table

import graphprune
from graphprune.evaluate import perplexity
from graphprune.io.models import load_model
from graphprune.passes.allocate_budget import allocate_budget
from graphprune.passes.prune_in_order import prune_by_obs

Options = dict[str, Any]

_HEADS: Options = {"ratio": 0.06, "include": ["*.self_attn"], "skip_first": 3, "skip_last": 2}
_FFN: Options = {"ratio": 0.2, "include": ["*.mlp"]}


def _variant(allocation: str = "uniform", **how: Any) -> Options:
    return {"passes": (allocate_budget(allocation), prune_by_obs(**how))}


VARIANTS: dict[str, Options] = {
    "heads, grouped Cholesky": {**_HEADS, **_variant()},
    "heads, first H⁻¹": {**_HEADS, **_variant(grouped_cholesky=False)},
    "FFN, dynamic groups, uniform": {**_FFN, **_variant()},
    "FFN, groups of 128": {**_FFN, **_variant(group=128)},
    "FFN, log-increasing": {**_FFN, **_variant("log-increasing")},
    "FFN, log-decreasing": {**_FFN, **_variant("log-decreasing")},
}
# The paper's side, the other side.
COMPARED = (
    ("heads, grouped Cholesky", "heads, first H⁻¹"),
    ("FFN, dynamic groups, uniform", "FFN, groups of 128"),
    ("FFN, log-increasing", "FFN, dynamic groups, uniform"),
    ("FFN, dynamic groups, uniform", "FFN, log-decreasing"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=20_000)
    options = parser.parse_args(arguments)
    text = evaluation_text(options.data)
    model, tokenizer = load_model(options.model, dtype=torch.float32)
    rows = calibration_rows(options.data, tokenizer, options.samples, options.length)
    data = [{"input_ids": batch} for batch in rows.split(4)]
    found: dict[str, float] = {}
    for name, how in VARIANTS.items():
        pruned = graphprune.compile(model, data=data, verify=False, **how)
        found[name] = perplexity(pruned, tokenizer, text, length=128, tokens=options.tokens)
        print(f"{name}: {found[name]:.2f}", file=sys.stderr, flush=True)
    table = Table("the paper's", "perplexity", "instead", "perplexity ", "better")
    for better, worse in COMPARED:
        says = "yes" if found[better] < found[worse] else "NO"
        table.add_row(better, f"{found[better]:.2f}", worse, f"{found[worse]:.2f}", says)
    Console().print(table)
    return int(any(found[better] >= found[worse] for better, worse in COMPARED))


if __name__ == "__main__":
    sys.exit(main())
