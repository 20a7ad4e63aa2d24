"""What SlimGPT costs over what it cannot do without, in time and in memory.

    python tools/bench_slimgpt.py MODEL [--ratio 0.2] [--samples 64] [--length 256] [--repeats 3]

**Time**: the passes that make the plan, over a floor of three parts measured in turns with them: one forward over the
same data through the blocks (without the head, which nobody needs), the products XᵀX for every matrix that loses
columns, and a Cholesky factorisation with the inverse of every one of them. Seconds are those of the CPU, summed over
its threads. Limit: 2 times the floor.

**Memory**: the peak of these passes over the loaded model, over one block's weights, all that this block computes for
the data, and its Hessians. In a process of its own, whose allocator gives memory back as soon as it is free, so that
the peak is that of what is in use. Limit: 1.

Random tokens. Exits with 1 when a figure is over its limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench_scores import Batches, forward, in_lean_process, in_turns, peak_over
from rich.console import Console
from rich.table import Table
from torch import nn

from graphprune.compiler import _program
from graphprune.io.models import load_model
from graphprune.ir.program import NodeGroup, Options, Program
from graphprune.passes import pipelines, run_passes
from graphprune.passes.methods import METHODS

MOST_TIME, MOST_MEMORY = 2.0, 1.0


def planned(model: nn.Module, batches: Batches, ratio: float) -> Program:
    """A program that is ready for the passes of SlimGPT."""
    program = _program(model, Options(ratio=ratio, method="slimgpt", data=batches), None)
    run_passes(program, pipelines.ANALYSE)
    return program


def pruned_columns(program: Program) -> list[int]:
    """The number of columns of every matrix that loses some."""
    counts = program.need("counts")
    return list(columns_of(program, [group for group in program.need("prunable") if counts.get(group.name)]).values())


def columns_of(program: Program, groups: list[NodeGroup]) -> dict[str, int]:
    """Name of every matrix that consumes one of the groups → how many columns it has."""
    tensors = program.need("axes").tensors
    consumed = {(member.tensor, member.dim) for group in groups for member in group.members if member.consumes}
    return {name: tensors[name][dim].size for name, dim in sorted(consumed)}


def products(columns: list[int], batches: Batches) -> None:
    for size in columns:
        hessian = torch.zeros(size, size)
        seen = torch.randn(batches[0]["input_ids"].numel(), size)
        for _ in batches:
            hessian.addmm_(seen.T, seen)


def factorisations(columns: list[int]) -> None:
    for size in columns:
        torch.cholesky_inverse(torch.linalg.cholesky(torch.eye(size)))


def seconds_of(model: Any, batches: Batches, ratio: float, repeats: int) -> dict[str, float]:
    """Medians of CPU seconds, by part."""
    program = planned(model, batches, ratio)
    run_passes(program, METHODS["slimgpt"][:1])  # how many go of which is all that the floor needs
    columns = pruned_columns(program)
    work: dict[str, Callable[[], object]] = {
        "slimgpt": lambda: run_passes(program, METHODS["slimgpt"]),
        "forward without the head": lambda: forward(model.base_model, batches),
        "Hessian products": lambda: products(columns, batches),
        "factorisations": lambda: factorisations(columns),
    }
    return {name: statistics.median(seconds) for name, seconds in in_turns(work, repeats).items()}


# ------------------------------------------------------------------------------------------------------------- memory


def memory_of(model: nn.Module, batches: Batches, ratio: float) -> dict[str, int]:
    """Bytes: the peak of the passes over the loaded model, and the parts of what it may be."""
    program = planned(model, batches, ratio)
    over = peak_over(model, lambda: run_passes(program, METHODS["slimgpt"]))
    block = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)[0]
    mine = {id(p) for p in block.parameters()}
    inside = {name for name, p in model.named_parameters() if id(p) in mine}
    columns = columns_of(program, program.need("prunable"))
    return {
        "peak": over,
        "block": sum(p.numel() * p.element_size() for p in block.parameters()),
        "activations": activations(model, block, batches),
        "Hessians": sum(4 * size**2 for name, size in columns.items() if name in inside),
    }


def activations(model: Any, block: nn.Module, batches: Batches) -> int:
    """Bytes of everything that the modules of a block return for the data."""
    sizes: list[int] = []

    def count(module: nn.Module, args: Any, out: Any) -> None:
        tensors = out if isinstance(out, tuple) else (out,)
        sizes.extend(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

    handles = [module.register_forward_hook(count) for module in block.modules()]
    try:
        forward(model.base_model, batches[:1])
    finally:
        for handle in handles:
            handle.remove()
    return sum(sizes) * len(batches)


# ---------------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)  # in the process of its own
    options = parser.parse_args(arguments)
    model, _ = load_model(options.model)
    model.eval()
    ids = torch.randint(0, model.config.vocab_size, (options.samples, options.length))
    batches: Batches = [{"input_ids": rows, "use_cache": False} for rows in ids.split(4)]
    if options.memory:
        print(json.dumps(memory_of(model, batches, options.ratio)))
        return 0
    seconds = seconds_of(model, batches, options.ratio, options.repeats)
    floor = sum(seconds.values()) - seconds["slimgpt"]
    given = sys.argv[1:] if arguments is None else list(arguments)
    command = [sys.executable, __file__, *given, "--memory"]
    memory = json.loads(in_lean_process(command))
    bound = sum(memory.values()) - memory["peak"]
    table = Table("", "CPU seconds, median", "ratio")
    for name, found in seconds.items():
        table.add_row(name, f"{found:.2f}", f"{found / floor:.2f} of the floor")
    Console().print(table)
    table = Table("", "MB", "ratio")
    for name, size in memory.items():
        table.add_row(name, f"{size / 1e6:,.0f}", f"{size / bound:.2f} of the bound")
    Console().print(table)
    return int(seconds["slimgpt"] > MOST_TIME * floor or memory["peak"] > MOST_MEMORY * bound)


if __name__ == "__main__":
    sys.exit(main())
