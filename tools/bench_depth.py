"""How tracing, inferring and planning grow with depth: a Llama of 80 layers beside one of 8, on the meta device.

    python tools/bench_depth.py [--repeats 5]

Both are planned in turns in one process, after one warm-up. Exits with 1 when 80 layers cost more than 3 times what 8
cost.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from graphprune.compiler import _program
from graphprune.ir.program import Options
from graphprune.passes import pipelines, run_passes
from graphprune.passes.methods import passes_of

DEPTHS = (8, 80)
LIMIT = 3.0


def build(layers: int) -> LlamaForCausalLM:
    """A Llama with the widths of 70B and any depth, without weights."""
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28_672,
        num_attention_heads=64,
        num_key_value_heads=8,
        num_hidden_layers=layers,
        vocab_size=128_256,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def plan(model: LlamaForCausalLM) -> dict[str, float]:
    """Seconds of every pass from the trace to the plan, and of all together."""
    program = _program(model, Options(ratio=0.2, method="random"), None)
    start = time.perf_counter()
    seconds = run_passes(program, pipelines.plan(passes_of("random")))
    return {**seconds, "all": time.perf_counter() - start}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    models = {layers: build(layers) for layers in DEPTHS}
    plan(build(2))
    runs: dict[int, list[dict[str, float]]] = {layers: [] for layers in DEPTHS}
    for _ in range(repeats):
        for layers, model in models.items():
            runs[layers].append(plan(model))
    middle = {n: {key: statistics.median(run[key] for run in found) for key in found[0]} for n, found in runs.items()}
    table = Table("pass", *(f"{layers} layers" for layers in DEPTHS), "ratio")
    for key in middle[DEPTHS[0]]:
        few, many = (middle[layers][key] for layers in DEPTHS)
        table.add_row(key, f"{few:.3f} s", f"{many:.3f} s", f"{many / max(few, 1e-4):.2f}")
    Console().print(table)
    return int(middle[DEPTHS[1]]["all"] > LIMIT * middle[DEPTHS[0]]["all"])


if __name__ == "__main__":
    sys.exit(main())
