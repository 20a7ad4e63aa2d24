"""What scores cost, over plain passes of the same model over the same data.

    python tools/bench_scores.py MODEL [--samples 32] [--length 128] [--repeats 3]

Taylor scores of first order over a plain forward and backward for all parameters (limit 1.3), statistics of activations
over a plain forward (limit 1.2): every prunable axis, random tokens in batches of 4 rows, in turns in one process. The
seconds are those of the CPU, summed over its threads, so that other work on the machine counts less. Exits with 1 when
a ratio of the medians is over its limit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from graphprune.compiler import _program
from graphprune.evaluate.memory import _CLEAR, _kilobytes
from graphprune.io.models import load_model
from graphprune.ir.program import Options, Program
from graphprune.passes import pipelines, run_passes
from graphprune.passes.build_node_groups import weight_contractions
from graphprune.passes.score import score_by
from graphprune.passes.score.activations import InputMoments, run_calibration
from graphprune.trace.skeleton import names

Batches = list[dict[str, Any]]


def forward(model: nn.Module, batches: Batches) -> None:
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def forward_backward(model: nn.Module, batches: Batches) -> None:
    """The mean loss and the gradients of all parameters, as a training step has them."""
    for batch in batches:
        (model(**batch, labels=batch["input_ids"], use_cache=False).loss / len(batches)).backward()
    for parameter in model.parameters():
        parameter.grad = None


def analysed(model: nn.Module, batches: Batches) -> Program:
    program = _program(model, Options(method="taylor-first", data=batches), None)
    run_passes(program, pipelines.ANALYSE)
    return program


def statistics_of(program: Program, batches: Batches) -> None:
    held = names(program.model)
    norms = InputMoments(held[name] for _, name, _ in weight_contractions(program))
    run_calibration(program.model, batches, norms, program.need("trace").written, program.device)


def in_turns(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """The CPU seconds of every run of each piece of work, one after the other and again."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, run in work.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return seconds


def peak_over(model: nn.Module, work: Callable[[], object]) -> int:
    """Bytes that the resident memory of this process rises by, at most, while ``work`` is done with a loaded model."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.sum()  # a file that is only mapped would be read later
    before = _kilobytes("VmRSS")
    _CLEAR.write_text("5")  # the most that ever was is what is now
    work()
    return 1024 * (_kilobytes("VmHWM") - before)


def in_lean_process(command: Sequence[str]) -> str:
    """The last line that a command prints whose allocator gives memory back at once: its peak is what is in use."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    model, _ = load_model(options.model)
    model.eval()
    ids = torch.randint(0, model.config.vocab_size, (options.samples, options.length))
    batches: Batches = [{"input_ids": rows} for rows in ids.split(4)]
    program = analysed(model, batches)
    work: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(model, batches),
        "activation statistics": lambda: statistics_of(program, batches),
        "forward and backward": lambda: forward_backward(model, batches),
        "taylor-first": lambda: run_passes(program, (score_by("taylor-first"),)),
    }
    seconds = in_turns(work, options.repeats)
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    table = Table("", "CPU seconds, median", "all", "ratio", "limit")
    late = False
    for name, over, limit in (
        ("forward", None, None),
        ("activation statistics", "forward", 1.2),
        ("forward and backward", None, None),
        ("taylor-first", "forward and backward", 1.3),
    ):
        ratio = middle[name] / middle[over] if over else None
        late = late or (ratio is not None and limit is not None and ratio > limit)
        found = " ".join(f"{s:.2f}" for s in seconds[name])
        table.add_row(name, f"{middle[name]:.2f}", found, f"{ratio:.2f}" if ratio else "", str(limit or ""))
    Console().print(table)
    return int(late)


if __name__ == "__main__":
    sys.exit(main())
