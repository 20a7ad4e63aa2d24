"""Compile every architecture that transformers registers, and say what became of each.

    python tools/coverage.py                     # everything: COVERAGE.md
    python tools/coverage.py --types llama bert  # some, to the terminal

For each type a small random model is built (:mod:`tiny_models`), pruned by a quarter, and proven by the oracle:

    OK       compiled, proven; generates the same with and without a cache if the dense model does. Where whole heads
             and channels ("outer") do not reach the ratio, inner factors such as channels of every head are pruned too
             ("inner"), then also what norms are taken over ("width")
    WRONG    the oracle or generation disagrees: a bug
    FORWARD  the pruned model does not run: a bug
    BUG      compile raised something that is no GraphPruneError: a bug
    REFUSED  compile said why it cannot
    BUILD    no small model of this type can be built, or run, from a config alone, by transformers itself

Exits with 1 on any WRONG, FORWARD or BUG.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from tiny_models import CannotBuild, non_embedding, tiny_models
from torch import nn
from transformers.models.auto import modeling_auto

import graphprune
from graphprune.errors import GraphPruneError
from graphprune.inspection import Inspection
from graphprune.ir.program import Options, Program
from graphprune.passes import run_passes
from graphprune.passes.pipelines import ANALYSE
from graphprune.trace.inputs import example_inputs_for

INTRODUCTION = """# Coverage

    make coverage

Every model type in the auto classes of transformers, as a small random model made from its own default config, pruned
by a quarter and compared with the masked original.

- *free*: the share of the non-embedding parameters that forward uses which lie on axes that may be pruned;
- *with width*: the same with `width=True`;
- *axes*: what had to be pruned to reach a quarter: whole heads and channels (outer), also inner factors (inner), or
  also what norms are taken over (width);
- *oracle*: the largest difference from the masked original over the largest output;
- *generate*: the logits of four tokens generated with a cache against without one;
- *s*: seconds of processor time of the compile.

BUILD means that no small model can be built or run from a config alone, REFUSED that compile says why it does not
prune; both with the reason. WRONG, FORWARD and BUG would be errors of graphprune."""

RATIO = 0.25
METHOD = "random"
SECONDS = 60  # of processor time, for one type
MEMORY = 8 << 30  # bytes of address space beyond what the parent has
_COMMON = ("llava.modeling_llava", "whisper.modeling_whisper", "clip.modeling_clip")  # these import what most need
BUGS = ("WRONG", "FORWARD", "BUG")
CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
# Where a type is registered several times, the class with the most of it is taken: a whole model before its backbone.
MAPPINGS = (
    CAUSAL,
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
)


@dataclass
class Result:
    """What became of one type.

    ``share``: of the non-embedding parameters that forward uses, those on a free axis; ``share_with_width`` with what
    norms are taken over.
    """

    model_type: str
    cls: str
    status: str
    reason: str = ""
    parameters: int = 0
    share: float = 0.0
    share_with_width: float = 0.0
    ratio: float = 0.0
    error: float = 0.0
    seconds: float = 0.0
    axes: str = "outer"
    generates: str = ""
    unruled: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()


def registered() -> dict[str, tuple[str, bool]]:
    """Model type → (class name, whether it is a causal LM), for every type in any of the auto classes."""
    found: dict[str, tuple[str, bool]] = {}
    others = sorted(name for name in vars(modeling_auto) if name.endswith("MAPPING_NAMES"))
    order = [*MAPPINGS, *(n for n in others if n not in (*MAPPINGS, "CONFIG_MAPPING_NAMES", "MODEL_MAPPING_NAMES"))]
    for mapping in [*order, "MODEL_MAPPING_NAMES"]:
        for model_type, cls in getattr(modeling_auto, mapping).items():
            name = cls if isinstance(cls, str) else cls[0]
            found.setdefault(model_type, (name, mapping == CAUSAL))
    return found


def cover(
    model_type: str, cls_name: str, built: Callable[[Result], None] = lambda result: None, method: str = METHOD
) -> Result:
    """Build, compile and compare one type; never raises. ``built`` is told what is known before compiling."""
    out = Result(model_type, cls_name, "BUILD")
    try:
        model, inputs = _running_model(model_type, getattr(transformers, cls_name))
    except (CannotBuild, ImportError, AttributeError, GraphPruneError) as error:
        out.reason = _line(error)
        return out
    out.parameters = sum(p.numel() for p in model.parameters())
    built(replace(out, status="REFUSED", reason=f"not done within {SECONDS} s"))
    try:
        pruned = _compiled(model, inputs, out, method)
    except GraphPruneError as error:
        out.status, out.reason = _status_of(error), _line(error)
        if "cannot be reached" in out.reason:
            _look(model, inputs, out)
        return out
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the result)
        traceback.print_exc()
        out.status, out.reason = "BUG", f"{type(error).__name__}: {_line(error)}"
        return out
    report = graphprune.report(pruned)
    out.status, out.ratio, out.error = "OK", report.ratio, report.oracle_error or 0.0
    _look(model, inputs, out)
    _generation(model, pruned, out)
    return out


# What may be pruned, tried in this order until the ratio can be reached.
REACH: dict[str, dict[str, bool]] = {
    "outer": {},
    "inner": {"inner_axes": True},
    "width": {"inner_axes": True, "width": True},
}


def _compiled(model: nn.Module, inputs: Any, out: Result, method: str) -> nn.Module:
    for out.axes, options in REACH.items():
        start = time.process_time()
        try:
            pruned = graphprune.compile(model, RATIO, method=method, example_inputs=inputs, **options)
        except GraphPruneError as error:
            if "cannot be reached" not in str(error) or out.axes == list(REACH)[-1]:
                raise
        else:
            break
    out.seconds = time.process_time() - start
    return pruned


def _running_model(model_type: str, cls: type[nn.Module]) -> tuple[nn.Module, dict[str, Any] | None]:
    """The first tiny model whose own forward runs on example inputs, and these if they are not those that it finds."""
    reason: Exception | None = None
    for model in tiny_models(model_type, cls):
        _, found = example_inputs_for(model, torch.device("cpu"), torch.float32)
        for inputs in (None, *_more_rows(model, found)):
            try:
                with torch.no_grad():
                    model(**(inputs or found))
                return model, inputs
            except Exception as error:  # noqa: BLE001  (whatever it is, it is the result)
                reason = reason or error
    raise CannotBuild(f"it does not run: {type(reason).__name__}: {reason}")


def _more_rows(model: nn.Module, inputs: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Sound in several codebooks comes with as many rows for every item of a batch."""
    codebooks = getattr(model.config, "num_codebooks", None)
    if isinstance(codebooks, int) and codebooks > 1:
        yield {k: torch.cat([v] * codebooks) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def _status_of(error: GraphPruneError) -> str:
    text = str(error)
    if "does not compute what" in text:
        return "WRONG"
    if "does not run" in text:
        return "FORWARD"
    return "BUG" if "bug in graphprune" in text else "REFUSED"


def _look(model: nn.Module, inputs: Any, out: Result) -> None:
    found = graphprune.inspect(model, inner_axes=True, example_inputs=inputs)
    unused = {m.tensor for group in found.groups for m in group.members if "not used by forward" in group.pins}
    sizes = {name: size for name, size in non_embedding(model).items() if name not in unused}
    out.share = _free_share(found, sizes)
    wide = Program(model, found.program.inputs, Options(inner_axes=True, width=True), trace=found.program.trace)
    run_passes(wide, ANALYSE[1:])
    out.share_with_width = _free_share(Inspection(wide), sizes)
    out.unruled = tuple(f"{name} ({len(places)}×, {places[0]})" for name, places in found.unruled.items())
    on = {member.tensor for group in found.prunable for member in group.members}
    held: Counter[str] = Counter()
    for group in found.groups:
        if group.name in found.skipped:
            for member in group.members:
                if member.tensor in sizes and member.tensor not in on:
                    held[f"{group.name}: {found.skipped[group.name]}"] += sizes[member.tensor]
    out.pinned = tuple(f"{size:,} {reason}" for reason, size in held.most_common(6))


def _free_share(found: Inspection, sizes: dict[str, int]) -> float:
    on = {member.tensor for group in found.prunable for member in group.members}
    return sum(size for name, size in sizes.items() if name in on) / max(1, sum(sizes.values()))


def _generation(model: nn.Module, pruned: nn.Module, out: Result) -> None:
    """Generation with a cache must give the logits that it gives without, where it does so for the dense model."""
    if not (hasattr(model, "generate") and hasattr(model, "can_generate") and model.can_generate()):
        return
    dense = _same_with_cache(model)
    if dense is not True:
        out.generates = "not by itself"
        return
    found = _same_with_cache(pruned)
    out.generates = "same" if found is True else "differs"
    if found is not True:
        out.status, out.reason = "WRONG", f"generation with a cache differs from without: {found}"


class _Told(transformers.LogitsProcessor):
    """Makes a model write these tokens: with its own, one that repeats itself would show little of its cache."""

    tokens = (23, 101, 54, 167)

    def __init__(self) -> None:
        self._next = iter(self.tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        told = torch.full_like(scores, -torch.inf)
        told[:, next(self._next) % scores.shape[-1]] = 0
        return told


def _same_with_cache(model: nn.Module) -> bool | str:
    _, inputs = example_inputs_for(model, torch.device("cpu"), torch.float32)
    prompt = {name: value[:1] for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    prompt.pop("decoder_input_ids", None)
    prompt.pop("attention_mask", None)
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 1, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with_cache, without = (
                model.generate(**prompt, **options, use_cache=cache, logits_processor=[_Told()])
                for cache in (True, False)
            )
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the result)
        return f"{type(error).__name__}: {_line(error)}"
    if not hasattr(with_cache, "logits"):
        return "gives no logits"
    for a, b in zip(with_cache.logits, without.logits, strict=True):
        if float((a - b).abs().max()) > 1e-3 * max(1.0, float(b.abs().max())):
            return f"logits differ by {float((a - b).abs().max()):.3g}"
    return True


def _line(error: BaseException) -> str:
    cause = error.__cause__ or error.__context__
    if isinstance(error, ImportError) and not str(error).strip() and cause is not None:
        error = cause
    text = re.sub(r"/\S*/(site-packages|lib/python3\.\d+)/", "", str(error))  # nobody's folders
    return re.sub(r"\s+", " ", text)[:400] or type(error).__name__


def _child(model_type: str, cls_name: str, method: str, to: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for the life of this process)
    try:
        result = cover(model_type, cls_name, to.send, method)
    except MemoryError:
        result = Result(model_type, cls_name, "BUILD", "needs more memory than this run gives one model")
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the result)
        result = Result(model_type, cls_name, "BUG", f"{type(error).__name__}: {_line(error)}")
    result.seconds = result.seconds or time.process_time()
    to.send(result)
    to.close()


@dataclass
class _Running:
    """A process, and the last that it said."""

    process: Any
    said: Result

    def result(self) -> Result:
        self.process.join()
        if self.process.exitcode in (0, -signal.SIGXCPU):
            return self.said
        return replace(self.said, status="BUG", reason="its process died")


def cover_all(types: dict[str, tuple[str, bool]], processes: int, method: str = METHOD) -> Iterable[Result]:
    """Every type in a process of its own, forked from this one so that imports are paid once."""
    for name in _COMMON:
        importlib.import_module(f"transformers.models.{name}")
    torch.set_num_threads(1)
    graphprune.compile(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), RATIO, example_inputs=torch.ones(3, 4))
    context = multiprocessing.get_context("fork")
    waiting = list(types.items())
    running: dict[Connection, _Running] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            model_type, (cls_name, _) = waiting.pop(0)
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(model_type, cls_name, method, theirs), daemon=True)
            process.start()
            theirs.close()
            running[mine] = _Running(process, Result(model_type, cls_name, "BUILD", f"not built within {SECONDS} s"))
        for pipe in wait(list(running)):
            try:
                running[pipe].said = pipe.recv()
            except EOFError:
                yield running.pop(pipe).result()


def table(results: list[Result], title: str) -> str:
    """One Markdown section: the counts, then a row per type."""
    counts = Counter(result.status for result in results)
    ok = [result for result in results if result.status == "OK"]
    free = sum(result.share >= 0.95 for result in ok)
    wide = sum(result.share_with_width >= 0.95 for result in ok)
    seconds = sorted(result.seconds for result in ok)
    lines = [
        f"## {title}",
        "",
        f"{len(results)} types: " + ", ".join(f"{n} {s}" for s, n in counts.most_common()) + ".",
    ]
    if ok:
        lines.append(
            f"Of the {len(ok)} OK ones, {free} have at least 95% of the non-embedding parameters that forward uses on "
            f"free axes, {wide} with `width=True`. Median processor time of a compile: "
            f"{seconds[len(seconds) // 2]:.2f} s."
        )
    lines += [
        "",
        "| type | class | | free | with width | ratio | axes | oracle | generate | s | |",
        "|---|---|---|--:|--:|--:|---|--:|---|--:|---|",
    ]
    for r in sorted(results, key=lambda result: result.model_type):
        figures = (
            f"{r.share:.1%} | {r.share_with_width:.1%} | {r.ratio:.3f} | {r.axes} | {r.error:.0e}"
            if r.status == "OK"
            else " | | | | "
        )
        note = (r.reason or (r.pinned[0] if r.share < 0.95 and r.pinned else "")).replace("|", "/")[:160]
        lines.append(
            f"| {r.model_type} | {r.cls} | {r.status} | {figures} | {r.generates} | {r.seconds:.1f} | {note} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="*", help="only these model types, to the terminal")
    parser.add_argument("--causal", action="store_true", help="only causal language models")
    parser.add_argument("--method", default=METHOD, help="how structures are chosen (default %(default)s)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--lines", type=Path, help="write every result there as it comes, as a line of JSON")
    parser.add_argument("--keep", type=Path, help="lines of an earlier run: what was OK there is not compiled again")
    parser.add_argument("-o", "--output", type=Path, help="write the tables there (COVERAGE.md)")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    types = {
        name: value
        for name, value in registered().items()
        if (not options.types or name in options.types) and (value[1] or not options.causal)
    }
    kept = [result for result in _read(options.keep) if result.status == "OK" and result.model_type in types]
    done = {result.model_type for result in kept}
    todo = {name: value for name, value in types.items() if name not in done}
    start = time.perf_counter()
    results = [*kept]
    for result in track(cover_all(todo, options.processes, options.method), total=len(todo), description="Compiling"):
        results.append(result)
        if options.lines:
            with options.lines.open("a") as out:
                out.write(json.dumps(asdict(result)) + "\n")
    causal = [result for result in results if types[result.model_type][1]]
    others = [result for result in results if not types[result.model_type][1]]
    sections = [
        table(part, title) for part, title in ((causal, "Causal language models"), (others, "All others")) if part
    ]
    made = f"transformers {transformers.__version__}, torch {torch.__version__}; {len(todo)} types in "
    made += f"{(time.perf_counter() - start) / 60:.0f} minutes with {options.processes} processes."
    text = "\n\n".join([INTRODUCTION, made, *sections])
    if options.output:
        options.output.write_text(text + "\n")
    else:
        print(text)
    return int(any(result.status in BUGS for result in results))


def _read(path: Path | None) -> list[Result]:
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()] if path else []


if __name__ == "__main__":
    sys.exit(main())
