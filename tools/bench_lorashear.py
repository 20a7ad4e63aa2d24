"""LHSPG and LoRAPrune against pruning first and tuning afterwards, and what LoRAPrune's scores are and cost.

    python tools/bench_lorashear.py MODEL --data DIR [--parts quality correlation memory] [--tokens 60000]

MODEL is a causal language model, DIR holds ``calib/c4.jsonl`` and ``wikitext2/wikitext2_raw_test_rows.jsonl``.

**quality**: the same tokens of C4, the same LoRA and optimizer, the same final size (20% of all parameters gone),
WikiText-2 in windows of 128. Magnitude and LLM-Pruner prune at once (LLM-Pruner by the first 16k of these tokens) and
then tune with all of them; LoRAPrune prunes while it trains on the first half, and tunes on with the other; LHSPG is
one run over as many tokens, in which fades what ppm would remove by the first 16k. For comparison ppm, then tuned. Each
line is printed when it is there.

**correlation**: Spearman's rank correlation, per layer, of LoRAPrune's scores (Eq. 10 on Eq. 9) and the same scores
from the true gradient of the merged weight, after ``--warm`` steps of training: the paper's Figure 4.

**memory**: the peak, over the loaded model and in a process of its own, of LoRAPrune's scores on one batch, over that
of LLM-Pruner's on a plain backward pass that holds all gradients. Limit: 0.6.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_quality import calibration_rows, evaluation_text
from bench_scores import in_lean_process, peak_over
from rich.console import Console
from rich.table import Table
from torch import nn

import graphprune
from graphprune.compiler import _program
from graphprune.evaluate import perplexity
from graphprune.io.models import load_model
from graphprune.ir.program import Options
from graphprune.passes import pipelines, run_passes
from graphprune.passes.adapted import Adapted
from graphprune.passes.add_adapters import Adapters, add_adapters
from graphprune.passes.allocate_budget import allocate_budget
from graphprune.passes.base import Pass
from graphprune.passes.guided_scores import guided_scores
from graphprune.passes.methods import METHODS
from graphprune.passes.score import score_by
from graphprune.passes.score.loss import calibration_loss
from graphprune.passes.select_structures import select_structures
from graphprune.passes.train_adapters import Nothing, Training, train
from graphprune.passes.train_lhspg import Lhspg, train_lhspg
from graphprune.passes.train_loraprune import LoraPrune, train_loraprune
from graphprune.passes.tune_adapters import tune_adapters
from graphprune.trace.adapters import LowRank

LENGTH, ROWS, SCORED = 128, 4, 32  # tokens of a row, rows of a batch, batches that LLM-Pruner scores on
PARTS = ("memory", "correlation", "quality")
MOST_MEMORY = 0.6
Batches = list[dict[str, torch.Tensor]]


def lhspg(steps: int, training: Training) -> Pass:
    """LHSPG over so many steps: most of them after the last period, since a short run has few."""
    periods, each = 4, max(1, steps // 24)
    warmup = max(1, steps // 20)
    config = Lhspg(
        warmup_steps=warmup,
        periods=periods,
        period_steps=each,
        final_steps=steps - warmup - periods * each,
        training=training,
    )
    return train_lhspg(config)


def quality(arguments: argparse.Namespace, console: Console) -> None:
    model, tokenizer = load_model(arguments.model, dtype=torch.float32)
    rows = calibration_rows(arguments.data, tokenizer, arguments.tokens // LENGTH // ROWS * ROWS, LENGTH)
    batches: Batches = [{"input_ids": part} for part in rows.split(ROWS)]
    text, steps, training = evaluation_text(arguments.data), len(batches), Training(lr=arguments.lr)
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{steps} steps of {ROWS} × {LENGTH} tokens")

    def measured(name: str, made: Callable[[], nn.Module]) -> nn.Module:
        start = time.perf_counter()
        pruned = made()
        seconds = time.perf_counter() - start
        found = perplexity(pruned, tokenizer, text, length=LENGTH, tokens=arguments.text_tokens)
        share = 1 - sum(parameter.numel() for parameter in pruned.parameters()) / size
        console.print(f"{name:44} {share:7.2%} removed   perplexity {found:10.2f}   {seconds:5.0f} s")
        return pruned

    def pruned(*passes: Pass, data: Any = batches) -> nn.Module:
        return graphprune.compile(model, arguments.ratio, passes=passes, data=data)

    def tuned(start: nn.Module, data: Batches) -> nn.Module:
        passes = (tune_adapters(len(data), training=training),)
        return graphprune.compile(start, arguments.ratio, passes=passes, data=data)

    scores = batches[:SCORED]
    once = (allocate_budget("sparing"), select_structures)
    measured("dense", lambda: model)
    prior = [pruned_by(step, scores) for step in METHODS["ppm"]]
    measured("LHSPG", lambda: pruned(*prior, lhspg(steps, training)))
    for name, criterion in (("LLM-Pruner", "taylor-first"), ("magnitude", "l2")):
        found = measured(f"{name}, at once", lambda c=criterion: pruned(score_by(c), *once, data=scores))  # type: ignore[misc]
        measured(f"{name}, then tuned", lambda f=found: tuned(f, batches))  # type: ignore[misc]
    found = measured("ppm, at once", lambda: graphprune.compile(model, arguments.ratio, data=scores))
    measured("ppm, then tuned", lambda: tuned(found, batches))
    half = steps // 2
    config = LoraPrune(steps=half, training=training)
    found = measured(
        "LoRAPrune, half", lambda: pruned(allocate_budget("sparing"), train_loraprune(config), data=batches[:half])
    )
    measured("LoRAPrune, then tuned with the other half", lambda: tuned(found, batches[half:]))


def pruned_by(step: Pass, data: Batches) -> Pass:
    """``step`` on other data than the passes after it."""

    def run(program: Any) -> None:
        whole, program.batches = program.batches, None
        given, program.options.data = program.options.data, data
        step(program)
        program.batches, program.options.data = whole, given

    return Pass(step.name, run, step.requires, step.ensures)


# -------------------------------------------------------------------------------------------------------- correlation


def correlation(arguments: argparse.Namespace, console: Console) -> None:
    model, tokenizer = load_model(arguments.model, dtype=torch.float32)
    rows = calibration_rows(arguments.data, tokenizer, ROWS * (arguments.warm + 8), LENGTH)
    batches: Batches = [{"input_ids": part} for part in rows.split(ROWS)]
    program = _program(add_adapters(model, Adapters()), Options(data=batches[: arguments.warm]), None)
    run_passes(program, pipelines.ANALYSE)
    view = Adapted(program)
    if arguments.warm:
        train(program, view, Training(), arguments.warm, Nothing())
    for layer in view.layers.values():
        layer.base.weight.requires_grad_(True)
    for batch in batches[arguments.warm :]:
        calibration_loss(view.model, batch, 0).backward()  # type: ignore[no-untyped-call]
    guided, true = guided_scores(view), guided_scores(view, _own_gradient)
    table = Table("block", *(kinds := ("self_attn", "mlp")), title="Spearman's rank correlation")
    for block in range(model.config.num_hidden_layers):
        cells = []
        for kind in kinds:
            name = next(n for n in guided if f"layers.{block}.{kind}." in n)
            cells.append(f"{spearman(guided[name], true[name]):.2f}")
        table.add_row(str(block), *cells)
    console.print(table)
    for kind in kinds:
        found = [spearman(guided[n], true[n]) for n in guided if f".{kind}." in n]
        console.print(f"{kind}: mean {sum(found) / len(found):.2f} of {len(found)} layers")


def _own_gradient(layer: LowRank) -> torch.Tensor:
    """That of the weight itself, in shape ``(out, in)``."""
    gradient: Any = layer.base.weight.grad
    return gradient.T if layer.across else gradient


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """The correlation of the ranks of two vectors."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


# ------------------------------------------------------------------------------------------------------------- memory


def peak(name: str, what: str) -> int:
    """Bytes over the loaded model that the scores take on one batch."""
    model, _ = load_model(name, dtype=torch.float32)
    batch = {"input_ids": torch.randint(0, model.config.vocab_size, (1, LENGTH)), "use_cache": False}
    view = None
    if what == "guided":
        program = _program(add_adapters(model, Adapters()), Options(), None)
        run_passes(program, pipelines.ANALYSE)
        view = Adapted(program)

    def work() -> None:
        calibration_loss(view.model if view else model, batch, 0).backward()  # type: ignore[no-untyped-call]
        if view is not None:
            guided_scores(view)
            return
        for parameter in model.parameters():
            if parameter.grad is not None and parameter.ndim > 1:
                values = (parameter.detach() * parameter.grad).abs_()
                values.sum(0), values.sum(1)

    return peak_over(model, work)


def memory(arguments: argparse.Namespace, console: Console) -> float:
    found = {}
    for what in ("guided", "full"):
        command = [sys.executable, __file__, str(arguments.model), "--data", str(arguments.data), "--peak", what]
        found[what] = int(in_lean_process(command))
    ratio = found["guided"] / found["full"]
    console.print(
        f"peak over the loaded model: LoRAPrune {found['guided'] / 1e6:.0f} MB, LLM-Pruner with full gradients "
        f"{found['full'] / 1e6:.0f} MB: {ratio:.2f} (wanted ≤ {MOST_MEMORY})"
    )
    return ratio


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL")
    add("--data", type=Path, required=True, metavar="DIR")
    add(
        "--parts", nargs="+", choices=("quality", "correlation", "memory"), default=["memory", "correlation", "quality"]
    )
    add("--ratio", type=float, default=0.2)
    add("--tokens", type=int, default=60_000, help="to train on (default %(default)s)")
    add("--text-tokens", type=int, default=20_000, help="to measure perplexity on (default %(default)s)")
    add("--lr", type=float, default=1e-3)
    add("--warm", type=int, default=8, help="steps before scores are compared (default %(default)s)")
    add("--peak", choices=("guided", "full"), help=argparse.SUPPRESS)  # in the process of its own
    arguments = parser.parse_args(argv)
    if arguments.peak:
        print(peak(arguments.model, arguments.peak))
        return 0
    console, code = Console(width=120), 0
    if "memory" in arguments.parts:
        code = int(memory(arguments, console) > MOST_MEMORY)
    if "correlation" in arguments.parts:
        correlation(arguments, console)
    if "quality" in arguments.parts:
        quality(arguments, console)
    return code


if __name__ == "__main__":
    sys.exit(main())
