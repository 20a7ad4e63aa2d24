"""The command line: ``graphprune prune MODEL --ratio 0.2 -o DIR``, ``inspect``, ``viz``, ``eval``, …"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import graphprune
from graphprune import (
    cli_card,
    cli_completion,
    cli_config,
    cli_evaluate,
    cli_export,
    cli_knowledge,
    cli_report,
    cli_shear,
    cli_stream,
    cli_viz,
)
from graphprune.cli_common import add_common, libraries_at, new_command, print_json
from graphprune.cli_progress import progress
from graphprune.errors import GraphPruneError, first_line

_EXAMPLES = """examples:
  graphprune inspect model.gguf
  graphprune prune model.gguf --ratio 0.2 -o smaller --method slimgpt --data text.txt
  graphprune eval model.gguf smaller --text test.jsonl
  graphprune COMMAND --help

exit codes: 0 done, 1 an error that was explained, 2 wrong usage, 130 interrupted
"""
_PRUNE = """examples:
  graphprune prune some-org/some-model --ratio 0.2 -o smaller
  graphprune prune model.gguf --ratio 0.3 -o smaller --method slimgpt --data text.jsonl --samples 64 --length 256
  graphprune prune some-org/some-model --ratio 0.3 -o smaller --include '*.mlp' --round-to 64
  graphprune prune --config smaller/run.yaml --ratio 0.4 -o smallest
"""
_INSPECT = """examples:
  graphprune inspect model.gguf
  graphprune inspect some-org/some-model --width --json
"""
_DATA = "calibration texts: .txt or .jsonl files (field 'text'), or 'snippets' (default), 'sampled', or 'random'"
_NOTHING = "nothing was written"
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0 done, 1 an error that was explained, 130 interrupted. Wrong usage exits with 2. With ``--debug`` errors are
    raised.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    debug, options = "--debug" in argv, None
    try:
        parser, commands = _parsers()
        options = cli_config.parse(parser, commands, argv)
        debug = debug or getattr(options, "debug", False)
        with libraries_at(getattr(options, "log_level", "info")):
            options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"graphprune: interrupted, {getattr(options, 'interrupted', _NOTHING)}", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # what reads has enough, as head does; Python would say so once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        explained = isinstance(error, GraphPruneError)
        unexpected = f"unexpected {type(error).__name__}: {first_line(error)} (--debug shows where)"
        print(f"graphprune: {error if explained else unexpected}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    return _parsers()[0]


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole parser, and those of its commands by name."""
    parser = argparse.ArgumentParser(
        prog="graphprune",
        description="Prune a model: a smaller dense model of the same class, proven equal to the masked original.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(interrupted=_NOTHING)
    parser.add_argument("--version", action="version", version=f"graphprune {graphprune.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    prune = new_command(commands, "prune", _prune, "remove a share of the parameters and save the result", _PRUNE)
    prune.add_argument("model", metavar="MODEL", help="a folder, a name on the hub, or a .gguf file")
    prune.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write; must not exist")
    prune.add_argument("--ratio", type=float, help="parameters to remove / all parameters, between 0 and 1")
    prune.add_argument("--plan", metavar="FILE", help="replay a plan (JSON) instead of --ratio")
    prune.add_argument("--method", default="ppm", help="ppm (default), wanda-sp, flap, slimgpt, magnitude, random, …")
    prune.add_argument("--data", nargs="+", metavar="FILE", help=_DATA)
    prune.add_argument("--samples", type=int, help="rows of calibration data (default 32; 8 of snippets)")
    prune.add_argument("--length", type=int, default=128, help="tokens per row (default 128)")
    prune.add_argument("--allocation", metavar="NAME", help="how the budget is spread: uniform, global, …")
    prune.add_argument(
        "--aggregation",
        choices=("sum", "prod", "max", "last"),
        default="last",
        help="how Taylor scores of the slices of a structure become one (default last)",
    )
    prune.add_argument(
        "--unprunable-ratio",
        type=float,
        default=0.0,
        metavar="G",
        help="leave this share of the node groups whole, those that the model loses most with (default 0)",
    )
    prune.add_argument("--round-to", type=int, default=1, metavar="N", help="keep widths multiples of N")
    prune.add_argument("--include", nargs="+", default=[], metavar="PATTERN", help="prune only these modules")
    prune.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="never prune these modules")
    prune.add_argument("--skip-first", type=int, default=0, metavar="N", help="spare the first N blocks")
    prune.add_argument("--skip-last", type=int, default=0, metavar="N", help="spare the last N blocks")
    prune.add_argument("--inner-axes", action="store_true", help="also prune channels of every head and the like")
    prune.add_argument(
        "--width", action="store_true", help="also prune the residual width, and what else is normalised"
    )
    prune.add_argument("--experts", action="store_true", help="also prune whole experts of mixtures")
    prune.add_argument(
        "--deploy",
        choices=("transformers",),
        help="shrink only what the config of the model can say, so that stock from_pretrained loads the result",
    )
    prune.add_argument(
        "--portable",
        action="store_true",
        help="write a modelling file too: stock from_pretrained(…, trust_remote_code=True) then loads the result",
    )
    prune.add_argument("--seed", type=int, default=0)
    prune.add_argument("--device", metavar="NAME", help="where data runs, such as cuda; weights come block by block")
    prune.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="load the weights in this dtype")
    prune.add_argument("--no-verify", action="store_true", help="skip the proof against the masked original")
    cli_stream.add_options(prune)

    inspect = new_command(commands, "inspect", _inspect, "show what hangs together, what is pinned and why", _INSPECT)
    inspect.add_argument("model", metavar="MODEL", help="a folder, a name on the hub, or a .gguf file")
    inspect.add_argument("--inner-axes", action="store_true", help="count inner factors as prunable")
    inspect.add_argument("--width", action="store_true", help="count what is normalised as prunable")
    inspect.add_argument("--experts", action="store_true", help="count whole experts of mixtures as prunable")

    cli_viz.add_command(commands)
    cli_knowledge.add_command(commands)
    cli_shear.add_commands(commands)
    cli_evaluate.add_commands(commands)
    cli_report.add_command(commands)
    cli_export.add_command(commands)
    cli_card.add_command(commands)
    for command in commands.choices.values():
        if command.add_help:  # all but lm_eval, whose options are its own
            add_common(command)
    cli_completion.add_command(commands, parser)
    return parser, dict(commands.choices)


def _inspect(options: argparse.Namespace) -> None:
    from graphprune.io.models import load_model

    with progress(options) as say:
        say(f"loading {options.model}")
        model, _ = load_model(options.model)
        say("tracing")
        found = graphprune.inspect(model, inner_axes=options.inner_axes, width=options.width, experts=options.experts)
    if options.json:
        print_json(found.to_dict())
    else:
        print(found)


def _prune(options: argparse.Namespace) -> None:
    output = Path(options.output)
    if output.exists():
        raise GraphPruneError(f"{output} exists already; give a folder that does not.")
    if options.stream:
        cli_stream.run(options)
    else:
        _prune_in_memory(options, output)
    cli_config.write_run(options, output)


def _prune_in_memory(options: argparse.Namespace, output: Path) -> None:
    import torch

    from graphprune.evaluate.macs import count_macs, positions
    from graphprune.io.folder import save
    from graphprune.io.models import load_model
    from graphprune.trace.inputs import example_inputs_for

    choices = plan_choices(options)
    with progress(options) as say:
        say(f"loading {options.model}")
        model, tokenizer = load_model(options.model, dtype=getattr(torch, options.dtype) if options.dtype else None)
        first = next(model.parameters())
        inputs = example_inputs_for(model, first.device, first.dtype)
        macs = count_macs(model, inputs) // positions(inputs)
        pruned = graphprune.compile(
            model,
            options.ratio,
            method=options.method,
            tokenizer=tokenizer,
            aggregation=options.aggregation,
            unprunable_ratio=options.unprunable_ratio,
            verify=not options.no_verify,
            inplace=True,
            **choices,
            progress=say,
        )
        say(f"writing {output}")
        save(pruned, output, tokenizer=tokenizer, max_shard_size=options.max_shard_size, portable=options.portable)
    found = graphprune.report(pruned)
    facts = summary(found, (macs, count_macs(pruned, inputs) // positions(inputs)))
    if options.json:
        if found.fields is not None:
            facts |= {"fields": found.fields, "unsaid": found.unsaid}
        print_json({**facts, "widths": found.widths, "skipped": found.skipped, "output": str(output)})
    else:
        print_tables(found, facts)
        print(f"written to {output}")


_PLAN_CHOICES = (
    *("allocation", "round_to", "include", "exclude", "skip_first", "skip_last", "inner_axes", "width", "experts"),
    *("samples", "length", "seed", "device", "deploy"),
)


def plan_choices(options: argparse.Namespace) -> dict[str, Any]:
    """The options of ``prune`` that mean the same in memory and with ``--stream``, as arguments."""
    from graphprune import Plan
    from graphprune.data.calibration import MADE
    from graphprune.data.texts import data_of
    from graphprune.io.checked_json import read_text

    return {
        "plan": Plan.from_json(read_text(options.plan)) if options.plan else None,
        "data": data_of(options.data, MADE),
        **{name: getattr(options, name) for name in _PLAN_CHOICES},
    }


def summary(report: Any, macs: tuple[int, int] | None = None) -> dict[str, Any]:
    """The figures of a report as plain data: parameters, MACs and bytes before and after, oracle error, seconds."""
    return {
        "parameters": [report.parameters_before, report.parameters_after],
        **({} if macs is None else {"macs": list(macs)}),
        "bytes": [report.bytes_before, report.bytes_after],
        "ratio": report.ratio,
        "oracle_error": report.oracle_error,
        "seconds": report.total_seconds,
    }


def print_tables(report: Any, facts: dict[str, Any]) -> None:
    """What was done, and the widths per layer, as two tables; plain text when piped."""
    from rich.console import Console
    from rich.table import Table

    from graphprune.reporting import widths_by_block

    console = Console()
    table = Table("", "before", "after", "change")
    for name, title in (("parameters", "parameters"), ("macs", "MACs per token"), ("bytes", "bytes")):
        if name not in facts:
            continue
        before, after = facts[name]
        table.add_row(title, f"{before:,}", f"{after:,}", f"{after / before - 1:+.2%}")
    console.print(table)
    error = "not verified" if report.oracle_error is None else f"{report.oracle_error:.1e}"
    console.print(f"oracle error {error} of the largest output, {report.total_seconds:.1f} s")
    if report.fields is not None:
        console.print(report.deployed())
    columns, rows = widths_by_block(report.widths)
    if rows:
        widths = Table("block", *columns, title="widths that changed")
        for block, cells in rows:
            widths.add_row(block, *cells)
        console.print(widths)


if __name__ == "__main__":
    sys.exit(main())
