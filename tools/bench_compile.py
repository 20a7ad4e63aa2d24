"""Time and memory of ``graphprune.compile`` beside torch-pruning and a bare ``torch.export``.

    python tools/bench_compile.py [--repeats 3] [--big] [--check] [--json result.json]

Everything is measured in one run on one machine, on the same random decoder. Every measurement is a process of its
own (``--stage``), so that its memory peak is its own, and the stages take turns, so that a busy minute of the machine
does not fall on one of them. Before the clock starts, every stage does its own work once on a tiny model: imports and
first-call caches are nobody's time and nobody's memory (``--cold`` leaves that out). Memory is the peak of the resident
set during the work, over what was resident when the model had been made.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RATIO = 0.2
STAGES = ("export", "compile", "compile-inplace", "torch-pruning")
BIG = "big"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int


SIZES = {
    "full": Sizes(32, 1024, 2816, 16, 16, 32_000),
    "small": Sizes(2, 64, 176, 4, 4, 128),
    "big": Sizes(80, 8192, 28_672, 64, 8, 128_256),  # torch-pruning cannot do it: on meta, so without weights
    "big-small": Sizes(3, 64, 176, 4, 2, 128),
}


@dataclass(frozen=True)
class Target:
    """A number that must not be above ``limit``."""

    name: str
    limit: float
    unit: str
    value: float | None

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.value <= self.limit


# ---------------------------------------------------------------------------------------------------- the stages


def build(sizes: Sizes, device: str = "cpu") -> Any:
    """A random float32 Llama in eval mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
        use_cache=False,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).eval()


def bare_export(model: Any) -> Any:
    """``torch.export`` and nothing else, on the very inputs that ``compile`` finds."""
    import torch

    from graphprune.trace.inputs import example_inputs_for

    args, kwargs = example_inputs_for(model, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        return torch.export.export(model, args, kwargs, strict=False)


def graphprune_compile(model: Any, **options: Any) -> Any:
    import graphprune

    return graphprune.compile(model, RATIO, **options)


def torch_pruning(model: Any) -> Any:
    """torch-pruning as its LLM example does it, on what ``compile`` prunes: whole heads and FFN channels, in place.

    The residual width stays: what writes to it is ignored. Head counts come in whole heads, so the FFN ratio is the one
    that makes the removed parameters ``RATIO`` of all.
    """
    import torch
    import torch_pruning as tp

    config = model.config
    heads, ignored = {}, [model.lm_head, model.model.embed_tokens]
    for layer in model.model.layers:
        attention = layer.self_attn
        heads[attention.q_proj] = config.num_attention_heads
        heads[attention.k_proj] = heads[attention.v_proj] = config.num_key_value_heads
        ignored += [attention.o_proj, layer.mlp.down_proj]
    head_ratio, ffn_ratio = matching_ratios(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lists every norm weight
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs={"input_ids": torch.zeros(1, 8, dtype=torch.long)},
            importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
            global_pruning=False,
            pruning_ratio=ffn_ratio,
            ignored_layers=ignored,
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=head_ratio,
            root_module_types=[torch.nn.Linear],
        )
        pruner.step()
    for layer in model.model.layers:
        layer.self_attn.num_key_value_groups = 1
    return model


def matching_ratios(model: Any) -> tuple[float, float]:
    """(share of heads, share of FFN channels) that together remove ``RATIO`` of all parameters."""
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    total = sum(parameters.values())
    attention = sum(n for name, n in parameters.items() if "self_attn" in name)
    ffn = sum(n for name, n in parameters.items() if ".mlp." in name)
    count = model.config.num_attention_heads
    head_ratio = round(RATIO * total / (attention + ffn) * count) / count
    return head_ratio, (RATIO * total - head_ratio * attention) / ffn


def run_stage(name: str, sizes: Sizes, cold: bool) -> dict[str, float]:
    """Do one stage in this process, and measure it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work: Callable[[Any], Any] = {
            "export": bare_export,
            "compile": graphprune_compile,
            "compile-inplace": lambda model: graphprune_compile(model, inplace=True),
            "torch-pruning": torch_pruning,
            BIG: lambda model: graphprune_compile(model, method="random"),
        }[name]
        device = "meta" if name == BIG else "cpu"
        if cold:
            import graphprune.compiler  # noqa: F401  (the libraries are not the model's memory)
        else:
            work(build(SIZES["big-small" if name == BIG else "small"], device))
        return _measured(work, build, sizes, device)


def _measured(work: Callable[[Any], Any], make: Callable[..., Any], sizes: Sizes, device: str) -> dict[str, float]:
    from graphprune.reporting import REPORT_ATTRIBUTE

    gc.collect()
    libraries = resident()
    model = make(sizes, device)
    before = sum(p.numel() for p in model.parameters())
    loaded = resident()
    forget_peak()
    start, busy = time.perf_counter(), time.process_time()
    result = work(model)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    top = peak()
    found = {
        "seconds": seconds,
        "cpu_seconds": busy,
        "over_loaded_bytes": max(top - loaded, 0),
        "over_libraries_bytes": max(top - libraries, 0),
        "peak_bytes": top,
        "loaded_bytes": loaded,
    }
    if hasattr(result, "config"):
        after = sum(p.numel() for p in result.parameters())
        found |= {"ratio": 1 - after / before, "pruned_bytes": 4 * after}
    done = getattr(result, REPORT_ATTRIBUTE, None)
    if done is not None:
        found |= {f"pass {name}": spent for name, spent in done.seconds.items()}
    return found


def resident() -> int:
    """Bytes of this process in memory now."""
    return _status("VmRSS") or peak()


def peak() -> int:
    """The most bytes of this process in memory, since :func:`forget_peak` where the system can forget."""
    high = _status("VmHWM")
    if high is not None:
        return high
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Let the peak start again at what is resident now; where it cannot, that of making the model remains in it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


# ------------------------------------------------------------------------------------------------- the comparison


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every stage in a process of its own, in turns; returns stage → list of measurements, or why there is none."""
    stages = [BIG] if arguments.big else list(STAGES)
    results: dict[str, Any] = {stage: [] for stage in stages}
    if "torch-pruning" in results and importlib.util.find_spec("torch_pruning") is None:
        results["torch-pruning"] = "not installed"
    for turn in range(arguments.repeats):
        for stage in stages:
            if isinstance(results[stage], list):
                print(f"  {stage}, {turn + 1} of {arguments.repeats}", file=sys.stderr, flush=True)
                results[stage].append(_in_own_process(stage, arguments))
    return results


def _in_own_process(stage: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--stage", stage]
    command += ["--small"] * arguments.small + ["--cold"] * arguments.cold + ["--big"] * arguments.big
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The stage {stage} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def medians(runs: list[dict[str, float]] | str) -> dict[str, float] | None:
    """The median of every number over the runs of a stage; None for a stage that was not run."""
    if isinstance(runs, str):
        return None
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def targets_of(middle: dict[str, dict[str, float] | None]) -> list[Target]:
    """What has to hold, with what was measured; a value is None where torch-pruning is not there to compare with."""
    if BIG in middle:
        big = middle[BIG] or {}
        planning = sum(spent for name, spent in big.items() if name.startswith("pass ") and name != "pass rewrite")
        return [
            Target("trace, infer and plan", 30.0, "s", planning),
            Target("peak over the libraries", 2.0, "GB", big["over_libraries_bytes"] / 1e9),
        ]

    def over_other(stage: str, field: str) -> float | None:
        other = middle["torch-pruning"]
        return None if other is None else need(stage)[field] / max(other[field], 1e-9)

    def need(stage: str) -> dict[str, float]:
        return middle[stage] or {}

    over_export = need("compile")["seconds"] / need("export")["seconds"]
    over_pruned = need("compile")["over_loaded_bytes"] / need("compile")["pruned_bytes"]
    over_loaded, whole = (over_other("compile-inplace", field) for field in ("over_loaded_bytes", "peak_bytes"))
    return [
        Target("time: compile / torch-pruning", 0.5, "×", over_other("compile", "seconds")),
        Target("time: in place / torch-pruning", 0.5, "×", over_other("compile-inplace", "seconds")),
        Target("peak over the loaded model: in place / torch-pruning", 0.8, "×", over_loaded),
        Target("peak of the whole process: in place / torch-pruning", 0.8, "×", whole),
        Target("time: compile / bare export", 2.5, "×", over_export),
        Target("peak of compile over the loaded model / pruned weights", 1.15, "×", over_pruned),
    ]


def show(results: dict[str, Any], middle: dict[str, dict[str, float] | None], targets: list[Target]) -> None:
    """Print what was measured, what the passes took, and the targets."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="Medians (range of the seconds)")
    for column in ("stage", "seconds", "CPU s", "over loaded", "whole process", "removed"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, found in middle.items():
        if found is None:
            table.add_row(stage, results[stage])
            continue
        spent = [run["seconds"] for run in results[stage]]
        removed = f"{found['ratio']:.2%}" if "ratio" in found else ""
        memory = (f"{found[name] / 1e6:,.0f} MB" for name in ("over_loaded_bytes", "peak_bytes"))
        seconds = f"{found['seconds']:.2f} ({min(spent):.2f}–{max(spent):.2f})"
        table.add_row(stage, seconds, f"{found['cpu_seconds']:.2f}", *memory, removed)
    console.print(table)
    passes = Table(title="Seconds per pass")
    names = {name: None for found in middle.values() for name in found or () if name.startswith("pass ")}
    shown = [stage for stage, found in middle.items() if found and any(name in found for name in names)]
    for column in ("pass", *shown):
        passes.add_column(column, justify="left" if column == "pass" else "right")
    for name in names:
        cells = ((middle[stage] or {}).get(name) for stage in shown)
        passes.add_row(name[5:], *("" if cell is None else f"{cell:.2f}" for cell in cells))
    console.print(passes)
    verdicts = Table(title="Targets")
    for column in ("", "measured", "at most", "met"):
        verdicts.add_column(column, justify="left" if not column else "right")
    for target in targets:
        value = "not installed" if target.value is None else f"{target.value:.2f} {target.unit}"
        met = {None: "?", True: "yes", False: "NO"}[target.met]
        verdicts.add_row(target.name, value, f"{target.limit:g} {target.unit}", met)
    console.print(verdicts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 1 when ``--check`` is given and a target is missed."""
    arguments = _parser().parse_args(argv)
    size = ("big-small" if arguments.small else "big") if arguments.big else ("small" if arguments.small else "full")
    if arguments.stage:
        print(json.dumps(run_stage(arguments.stage, SIZES[size], arguments.cold)))
        return 0
    results = run_all(arguments)
    middle = {stage: medians(runs) for stage, runs in results.items()}
    targets = targets_of(middle)
    show(results, middle, targets)
    if arguments.json:
        kept = {
            "sizes": asdict(SIZES[size]),
            "runs": results,
            "medians": middle,
            "targets": [{**asdict(target), "met": target.met} for target in targets],
        }
        arguments.json.write_text(json.dumps(kept, indent=2) + "\n")
    return int(arguments.check and any(target.met is not True for target in targets))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--big", action="store_true", help="instead: plan an 80-layer model of 70B parameters on meta")
    parser.add_argument("--repeats", type=_positive, default=3, help="runs of every stage (default 3); medians count")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed or not measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement there")
    parser.add_argument("--cold", action="store_true", help="no warm-up: first-call costs count")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that the tool itself runs")
    parser.add_argument("--stage", choices=(*STAGES, BIG), help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number, at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
