"""The commands ``graphprune shear MODEL …`` and ``graphprune recover PRUNED …``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graphprune import cli_config
from graphprune.cli_common import new_command, print_json
from graphprune.cli_device import device_of
from graphprune.cli_progress import Say, progress
from graphprune.errors import GraphPruneError

_SHEAR = """examples:
  graphprune shear some-org/some-model --ratio 0.2 -o run --data corpora/ --instruct alpaca.jsonl
  graphprune shear model.gguf --ratio 0.2 -o run --data c4.jsonl books.jsonl --rounds 6 --text test.jsonl
  graphprune shear model.gguf --ratio 0.2 -o run --data corpora/ --dry-run
The same command goes on where it was interrupted. In several processes: accelerate launch -m graphprune shear …
"""
_RECOVER = """examples:
  graphprune recover smaller --dense some-org/some-model -o recovered --data corpora/ --instruct alpaca.jsonl
  graphprune recover smaller --mixing uniform -o recovered --data c4.jsonl --rounds 4
  accelerate launch -m graphprune recover smaller --dense some-org/some-model -o recovered --data corpora/
The same command goes on where it was interrupted; what it needs for that is in -o's sibling ending in .run.
"""


_GOES_ON = "the same command goes on from here"


def add_commands(commands: Any) -> None:
    """Add both to the subparsers ``commands``."""
    shear = new_command(
        commands, "shear", _shear, "prune, train back and measure, in one resumable run (LoRAShear)", _SHEAR
    )
    shear.set_defaults(interrupted=_GOES_ON)
    shear.add_argument("model", metavar="MODEL", help="a folder, a name on the hub, or a .gguf file")
    shear.add_argument("-o", "--output", required=True, metavar="RUN", help="folder of the run; goes on if it exists")
    shear.add_argument("--ratio", type=float, required=True, help="parameters to remove / all parameters")
    shear.add_argument("--method", default="lorashear", help="lorashear (default), or any method of graphprune prune")
    shear.add_argument("--samples", type=int, default=128, help="rows to calibrate and fade on (default 128)")
    shear.add_argument(
        "--unprunable-ratio", type=float, default=0.0, metavar="G", help="share of node groups to leave whole (γ)"
    )
    shear.add_argument("--text", nargs="+", metavar="FILE", help="text to measure perplexity on")
    shear.add_argument("--lengths", nargs="+", type=int, default=[128, 2048], metavar="N", help="tokens per window")
    shear.add_argument("--tokens", type=int, metavar="N", help="use only the first N tokens of the text")
    shear.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="tasks of lm-eval to measure")
    shear.add_argument("--include-path", metavar="DIR", help="folder with more lm-eval tasks")
    shear.add_argument("--limit", type=int, metavar="N", help="rows per task")
    shear.add_argument("--device", help="where it prunes and measures (default: cuda where there is one)")
    shear.add_argument("--dry-run", action="store_true", help="print the stages, the sizes and a time, and do nothing")
    _add_recovery(shear)

    recover = new_command(commands, "recover", _recover, "train a pruned model back to what it knew", _RECOVER)
    recover.set_defaults(interrupted=_GOES_ON)
    recover.add_argument("model", metavar="PRUNED", help="a folder that graphprune wrote")
    recover.add_argument("--dense", metavar="MODEL", help="the model before it was pruned: what was lost")
    recover.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write; must not exist")
    _add_recovery(recover)


def _add_recovery(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("recovery").add_argument
    add("--data", nargs="+", metavar="PATH", help="a folder with a file per source, or files: .jsonl, .txt")
    add("--instruct", nargs="+", metavar="PATH", help="instructions: rows of Alpaca's fields, or of messages")
    add("--length", type=int, default=128, help="tokens per row (default 128)")
    add("--validation", type=int, default=16, metavar="N", help="rows held out of every source (default 16)")
    add("--most", type=int, metavar="N", help="train on at most N tokens of every source")
    add("--lr", type=float, default=1e-3, help="learning rate (default 1e-3)")
    add("--rank", type=int, default=8, help="of LoRA (default 8)")
    add("--batch", type=int, default=8, help="rows per step, over all processes (default 8)")
    add("--rows-at-once", type=int, metavar="N", help="rows per forward and process (default: the batch)")
    add("--round-steps", type=int, default=25, metavar="N", help="steps between two measurements (default 25)")
    add("--rounds", type=int, default=20, metavar="N", help="the most rounds of a stage (default 20)")
    add("--patience", type=int, default=2, metavar="N", help="rounds without gain that end a stage (default 2)")
    add("--mixing", choices=("dynamic", "uniform"), default="dynamic", help="how sources share a round")
    add("--floor", type=float, default=0.5, help="share of a round that all sources have alike (default 0.5)")
    add("--repeats", type=float, default=4.0, metavar="N", help="most times through a source's rows (default 4)")
    add("--distill", type=float, default=0.0, metavar="W", help="weight of the full model's predictions (default 0)")
    add("--checkpoint-steps", type=int, default=0, metavar="N", help="also keep the state every N steps of a round")
    add("--bf16", action="store_true", help="train in bfloat16 by autocast")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--report-to", nargs="+", default=[], metavar="NAME", help="trackers: tensorboard, wandb, …")
    add("--seed", type=int, default=0)
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="load the weights in this dtype")


def _settings(options: argparse.Namespace) -> Any:
    from graphprune.passes.add_adapters import Adapters
    from graphprune.recovery.settings import Recovery

    return Recovery(
        adapters=Adapters(rank=options.rank, alpha=2 * options.rank),
        lr=options.lr,
        batch=options.batch,
        rows_at_once=options.rows_at_once or options.batch,
        round_steps=options.round_steps,
        rounds=options.rounds,
        patience=options.patience,
        mixing=options.mixing,
        floor=options.floor,
        repeats=options.repeats,
        distill=options.distill,
        bf16=options.bf16,
        gradient_checkpointing=options.gradient_checkpointing,
        checkpoint_steps=options.checkpoint_steps,
        report_to=tuple(options.report_to),
        seed=options.seed,
    )


def _given(paths: list[str] | None) -> Any:
    """One path by itself: a folder is then one source per file."""
    return paths[0] if paths and len(paths) == 1 else paths


@contextmanager
def _progress(options: argparse.Namespace) -> Iterator[Say]:
    """That of the first process; the others are silent."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        with progress(options, keep=True) as say:
            yield say
    else:
        yield lambda text: None


def _loaded(name: str, options: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    from graphprune.io.models import load_model

    model, tokenizer = load_model(name, dtype=getattr(torch, options.dtype) if options.dtype else None)
    if tokenizer is None:
        raise GraphPruneError(f"{name} has no tokenizer, and recovery reads text.")
    return model, tokenizer


def _shear(options: argparse.Namespace) -> None:
    from accelerate import PartialState
    from rich.console import Console

    from graphprune.data.texts import read_texts
    from graphprune.evaluate.tasks import Tasks
    from graphprune.recovery.dry_run import forecast
    from graphprune.recovery.shear import Measures, Shear, shear

    what = Shear(
        ratio=options.ratio,
        method=options.method,
        unprunable_ratio=options.unprunable_ratio,
        samples=options.samples,
        length=options.length,
        validation=options.validation,
        most=options.most,
        seed=options.seed,
        recovery=_settings(options),
    )
    if not options.data:
        raise GraphPruneError("shear wants --data: pretraining text to calibrate and train on.")
    tasks = Tasks(options.tasks, include_path=options.include_path, limit=options.limit) if options.tasks else None
    text = "\n\n".join(read_texts(options.text)) if options.text else None
    model, tokenizer = _loaded(options.model, options)
    model.to(device_of(options.device))
    measures = Measures(text, options.lengths, options.tokens, tasks)
    if options.dry_run:
        found = forecast(model, Path(options.output), what, _given(options.data), _given(options.instruct), measures)
        if options.json:
            print_json(asdict(found))
        else:
            print(found)
        return
    with _progress(options) as say:
        done = shear(
            model,
            options.output,
            what,
            tokenizer=tokenizer,
            data=_given(options.data),
            instruct=_given(options.instruct),
            measures=measures,
            progress=say,
        )
    if not PartialState().is_main_process:
        return
    cli_config.write_run(options, Path(options.output))
    if options.json:
        print_json({"output": options.output, "stages": _told(done.stages), "evaluations": done.evaluations})
    else:
        Console().print((Path(options.output) / "report.md").read_text(encoding="utf-8").partition("\n## Settings")[0])


def _told(stages: list[Any]) -> list[dict[str, Any]]:
    """What became of the stages of recovery, without the loss of every step."""
    return [{**asdict(stage), "means": stage.means, "steps": len(stage.steps)} for stage in stages]


def _recover(options: argparse.Namespace) -> None:
    from accelerate import PartialState

    from graphprune.io.folder import save
    from graphprune.recovery.recover import recover

    output = Path(options.output)
    if output.exists():
        raise GraphPruneError(f"{output} exists already; give a folder that does not.")
    run = output.with_name(f"{output.name}.run")
    model, tokenizer = _loaded(options.model, options)
    dense = _loaded(options.dense, options)[0] if options.dense else None
    with _progress(options) as say:
        found = recover(
            model,
            run,
            data=_given(options.data),
            instruct=_given(options.instruct),
            tokenizer=tokenizer,
            dense=dense,
            settings=_settings(options),
            length=options.length,
            validation=options.validation,
            most=options.most,
            progress=say,
        )
    if not PartialState().is_main_process:
        return
    save(found.model, output, tokenizer=tokenizer)
    cli_config.write_run(options, output)
    if options.json:
        print_json({"output": str(output), "stages": _told(found.stages)})
        return
    for stage in found.stages:
        first, best = stage.means[0], stage.means[stage.best]
        print(f"{stage.name}: mean validation loss {first:.4f} → {best:.4f} (round {stage.best})")
    print(f"written to {output}; {run} holds tokens, checkpoints and logs, and is no longer needed")
