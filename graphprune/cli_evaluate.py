"""The commands ``graphprune eval MODEL …`` and ``graphprune lm_eval …``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.cli_common import new_command, write_text
from graphprune.cli_device import device_of
from graphprune.cli_progress import Say, progress
from graphprune.errors import GraphPruneError

if TYPE_CHECKING:
    from graphprune.evaluate import Evaluation

_EXAMPLES = """examples:
  graphprune eval some-org/some-model smaller --text test.jsonl --tokens 20480
  graphprune eval smaller --tasks arc_easy hellaswag --limit 100 --json -o smaller.json
  graphprune eval model.gguf smaller --latency --memory
"""
_HARNESS = """The command lm_eval, unchanged, with one more model type that loads what graphprune wrote:
  graphprune lm_eval run --model graphprune --model_args pretrained=DIR --tasks arc_easy
  graphprune lm_eval ls tasks
"""
_BATCH_SIZES = (1, 8)


def add_commands(commands: Any) -> None:
    """Add both to the subparsers ``commands``."""
    parser = new_command(
        commands, "eval", _eval, "measure models side by side: size, perplexity, tasks, latency, memory", _EXAMPLES
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a folder, a hub name or a .gguf file; the first is the reference",
    )
    parser.add_argument("--text", nargs="+", metavar="FILE", help="text for perplexity; of .jsonl the field 'text'")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[128, 2048], metavar="N", help="tokens per window (default 128 2048)"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="use only the first N tokens of the text")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="tasks, groups or tags of lm-eval")
    parser.add_argument("--include-path", metavar="DIR", help="folder with more lm-eval tasks")
    parser.add_argument("--limit", type=float, metavar="N", help="rows per task; below 1 a share of them")
    parser.add_argument("--latency", action="store_true", help="time prefill and decode at batch 1 and 8")
    parser.add_argument("--memory", action="store_true", help="peak memory of a prefill")
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens for both of these (default 128)")
    parser.add_argument("--device", help="cpu, cuda, … (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="load the weights in this dtype")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the JSON here too; must not exist")

    harness = commands.add_parser(
        "lm_eval",
        help="lm-evaluation-harness with a model type for what graphprune wrote",
        description=_HARNESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prefix_chars="\0",  # every option is lm_eval's own
        add_help=False,
    )
    harness.set_defaults(run=_lm_eval)
    harness.add_argument("arguments", nargs=argparse.REMAINDER)


def _lm_eval(options: argparse.Namespace) -> None:
    from graphprune.evaluate.harness import run_command

    run_command(options.arguments)


def _eval(options: argparse.Namespace) -> None:
    from rich.console import Console

    from graphprune.data.calibration import read_texts
    from graphprune.evaluate import Tasks, comparison

    output = Path(options.output) if options.output else None
    if output and output.exists():
        raise GraphPruneError(f"{output} exists already; give a file that does not.")
    text = "\n\n".join(read_texts(options.text)) if options.text else None
    limit = options.limit if options.limit is None or options.limit < 1 else int(options.limit)
    tasks = Tasks(options.tasks, include_path=options.include_path, limit=limit) if options.tasks else None
    found: dict[str, Evaluation] = {}
    with progress(options, keep=True) as say:
        for name, title in zip(options.models, _titles(options.models), strict=True):
            found[title] = _evaluate(options, name, text, tasks, say)
            if output:  # after each: the next may fail, hours later
                write_text(output, _as_json(found) + "\n")
    if options.json:
        print(_as_json(found))
    else:
        Console().print(comparison(found))


def _evaluate(options: argparse.Namespace, name: str, text: str | None, tasks: Any, say: Say) -> Evaluation:
    """Load one model, measure it, and let it go."""
    import torch

    from graphprune.evaluate import evaluate
    from graphprune.io.models import load_model

    say(f"{name}: loading")
    model, tokenizer = load_model(name, dtype=getattr(torch, options.dtype) if options.dtype else None)
    return evaluate(
        model.to(device_of(options.device)),
        tokenizer,
        text=text,
        lengths=options.lengths,
        tokens=options.tokens,
        tasks=tasks or (),
        batch_sizes=_BATCH_SIZES if options.latency else (),
        memory=options.memory,
        prompt=options.prompt,
        folder=name,
        progress=lambda what: say(f"{name}: {what}"),
    )


def _titles(names: list[str]) -> list[str]:
    """The last part of every name; the whole of it where that is not enough to tell them apart."""
    if len(set(names)) < len(names):
        raise GraphPruneError("The same model is given twice.")
    short = [Path(name).name or name for name in names]
    return [one if short.count(one) == 1 else name for one, name in zip(short, names, strict=True)]


def _as_json(found: dict[str, Evaluation]) -> str:
    return json.dumps({title: one.to_dict() for title, one in found.items()}, indent=1, allow_nan=False)
