"""Plan the pruning of a Llama-70B without its weights: shapes on the meta device are enough.

    python examples/plan_70b.py

Everything but the scores comes from the graph, so the structure of a plan, its size and its ratio are known before a
gigabyte is read. Which indices go is random here: scores want weights. About ten seconds and well under a gigabyte.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=80)
    layers = parser.parse_args().layers
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": layers, "vocab_size": 128256}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    start = time.perf_counter()
    small = graphprune.compile(model, 0.2, method="random", round_to=64, skip_first=3, skip_last=2)
    report = graphprune.report(small)
    print(
        f"{report}\nplanned in {time.perf_counter() - start:.1f} s, all on the {next(small.parameters()).device} device"
    )
    widths = sorted({(before, after) for before, after in report.widths.values()})
    print(f"axes of {len(widths)} kinds: {', '.join(f'{before} → {after}' for before, after in widths)}")
    print(f"in bfloat16: {2 * report.parameters_before / 1e9:.0f} GB → {2 * report.parameters_after / 1e9:.0f} GB")
    print(f"the plan as JSON: {len(report.plan.to_json()) / 1e6:.1f} MB; replay it with graphprune prune --plan")


if __name__ == "__main__":
    main()
