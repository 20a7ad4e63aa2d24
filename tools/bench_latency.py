"""Latency and memory of models pruned by 20% and 50% beside the dense one.

    python tools/bench_latency.py [MODEL] -o FOLDER [--repeats 5] [--check] [--json result.json]

Without MODEL a random Llama of 1.1B parameters; with one, that (.cache/SmolLM2-135M-Instruct.Q4_1.gguf). Ratios are of
all parameters, embeddings and head included; these stay as they are, so the layers lose more. Plans are random and for
stock transformers (`deploy="transformers"`): a random plan is as fast as any other of its sizes. FOLDER keeps the
checkpoints, so that a run that was interrupted goes on: 10 GB for the random model, which also wants 6 GB of memory.

Every measurement is a process of its own (`--stage`), which loads a checkpoint with stock from_pretrained. The stages
take turns, so that a busy minute of the machine does not fall on one of them, and what counts is the median over the
turns of what a stage took over what the dense model took in the same turn. Prefill is one forward of a prompt, decode
one more token with the KV cache, both at batch 1 and medians of their process.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench_compile import SIZES, Sizes, Target, _positive, build, forget_peak, medians, peak, resident

STAGES = {"dense": 0.0, "minus-20": 0.2, "minus-50": 0.5}
LIMITS = {"minus-20": 0.85, "minus-50": 0.60}  # of the latency and the peak of the dense model
BILLION = Sizes(layers=22, hidden=2048, ffn=5632, heads=32, kv_heads=4, vocabulary=32_000)
TIMES = ("prefill_ms", "decode_ms")


def make(stage: str, arguments: argparse.Namespace) -> None:
    """Write the checkpoint of a stage."""
    import torch

    import graphprune
    from graphprune.io.atomic import new_folder
    from graphprune.io.models import load_model

    dtype = getattr(torch, arguments.dtype)
    if arguments.model:
        model, _ = load_model(arguments.model, dtype=dtype)
    else:
        model = build(SIZES["small"] if arguments.small else BILLION).to(dtype)
        model.config.use_cache = True
    ratio, folder = STAGES[stage], arguments.output / stage
    if not ratio:
        with new_folder(folder) as partial:
            model.save_pretrained(partial)
        return
    options = {"deploy": "transformers", "width": arguments.width, "method": "random", "inplace": True, "verify": False}
    small = graphprune.compile(model, ratio, **options)
    print(f"  {stage}: {graphprune.report(small).deployed()}", file=sys.stderr)
    graphprune.save(small, folder)


def measure(stage: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Load a checkpoint in this process, and time it."""
    import torch
    from transformers import AutoModelForCausalLM

    from graphprune.evaluate import checkpoint_bytes, latency

    warm = build(SIZES["small"])
    warm.config.use_cache = True
    latency(warm, prompt=4, new_tokens=1, repeats=1)  # imports are nobody's memory
    del warm
    gc.collect()
    libraries = resident()
    forget_peak()
    model = AutoModelForCausalLM.from_pretrained(arguments.output / stage, dtype=getattr(torch, arguments.dtype))
    found = latency(model, prompt=arguments.prompt, new_tokens=arguments.tokens, repeats=arguments.prefills)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "prefill_ms": found.prefill_ms,
        "decode_ms": found.decode_ms or float("nan"),
        "checkpoint_bytes": checkpoint_bytes(arguments.output / stage) or 0,
        "peak_bytes": max(peak() - libraries, 0),
    }


def run_all(arguments: argparse.Namespace, given: list[str]) -> dict[str, list[dict[str, float]]]:
    """Stage → what every turn measured."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        if not (arguments.output / stage / "config.json").is_file():
            print(f"  making {stage}", file=sys.stderr, flush=True)
            _in_own_process("--make", stage, given)
    runs: dict[str, list[dict[str, float]]] = {stage: [] for stage in STAGES}
    for turn in range(arguments.repeats):
        for stage in STAGES:
            print(f"  {stage}, {turn + 1} of {arguments.repeats}", file=sys.stderr, flush=True)
            runs[stage].append(json.loads(_in_own_process("--stage", stage, given).splitlines()[-1]))
    return runs


def _in_own_process(what: str, stage: str, given: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, __file__, *given, what, stage], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{what} {stage} failed.")
    return done.stdout


def over_dense(runs: dict[str, list[dict[str, float]]], stage: str, field: str) -> float:
    """The median over the turns of a stage's number over that of the dense model in the same turn."""
    return statistics.median(one[field] / dense[field] for one, dense in zip(runs[stage], runs["dense"], strict=True))


def targets_of(runs: dict[str, list[dict[str, float]]]) -> list[Target]:
    """What has to hold, with what was measured."""
    targets = []
    for stage, limit in LIMITS.items():
        for field in (*TIMES, "peak_bytes"):
            targets.append(Target(f"{stage}: {field} / dense", limit, "×", over_dense(runs, stage, field)))
        left = 1 - STAGES[stage]
        targets.append(
            Target(f"{stage}: bytes on disk / dense", left + 0.02, "×", over_dense(runs, stage, "checkpoint_bytes"))
        )
    return targets


def show(runs: dict[str, list[dict[str, float]]], targets: list[Target]) -> None:
    """Print what was measured, and the targets."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="Medians (range)")
    for column in ("", "parameters", "prefill ms", "decode ms", "on disk", "peak over the libraries"):
        table.add_column(column, justify="right" if column else "left")
    for stage, found in runs.items():
        middle = medians(found) or {}
        times = (
            f"{middle[name]:.1f} ({min(run[name] for run in found):.1f}–{max(run[name] for run in found):.1f})"
            for name in TIMES
        )
        memory = (f"{middle[name] / 1e6:,.0f} MB" for name in ("checkpoint_bytes", "peak_bytes"))
        table.add_row(stage, f"{middle['parameters']:,.0f}", *times, *memory)
    console.print(table)
    verdicts = Table(title="Targets")
    for column in ("", "measured", "at most", "met"):
        verdicts.add_column(column, justify="right" if column else "left")
    for target in targets:
        verdicts.add_row(target.name, f"{target.value:.3f} ×", f"{target.limit:g} ×", "yes" if target.met else "NO")
    console.print(verdicts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 1 when ``--check`` is given and a target is missed."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(given)
    if arguments.make:
        make(arguments.make, arguments)
        return 0
    if arguments.stage:
        print(json.dumps(measure(arguments.stage, arguments)))
        return 0
    runs = run_all(arguments, given)
    targets = targets_of(runs)
    show(runs, targets)
    if arguments.json:
        kept = {"runs": runs, "targets": [{**asdict(target), "met": target.met} for target in targets]}
        arguments.json.write_text(json.dumps(kept, indent=2) + "\n")
    return int(arguments.check and not all(target.met for target in targets))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder, hub name or .gguf file (default: random)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="keeps the checkpoints")
    parser.add_argument("--repeats", type=_positive, default=5, help="turns (default 5); medians count")
    parser.add_argument("--prompt", type=_positive, default=128, help="tokens of the prompt (default 128)")
    parser.add_argument("--tokens", type=_positive, default=32, help="tokens decoded in a turn (default 32)")
    parser.add_argument("--prefills", type=_positive, default=5, help="prefills in a turn (default 5)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--width", action="store_true", help="also prune the residual width, and with it the embeddings"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement there")
    parser.add_argument("--small", action="store_true", help="a tiny random model, to see that the tool itself runs")
    parser.add_argument("--make", choices=tuple(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=tuple(STAGES), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
