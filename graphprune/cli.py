"""The command line: ``graphprune prune MODEL --ratio 0.2 -o DIR``, ``inspect``, ``viz``, ``eval``, …"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphprune import cli_card, cli_evaluate, cli_knowledge, cli_report, cli_shear, cli_stream, cli_viz
from graphprune.errors import GraphPruneError

_EXAMPLES = """examples:
  graphprune inspect model.gguf
  graphprune prune model.gguf --ratio 0.2 -o smaller --method slimgpt --data text.txt
  graphprune prune some-org/some-model --ratio 0.3 -o smaller --include '*.mlp' --round-to 64
"""
_DATA = "calibration texts: .txt or .jsonl files (field 'text'), or 'snippets' (default), 'sampled', or 'random'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 an error that was explained, 2 wrong usage."""
    options = _parser().parse_args(argv)
    try:
        options.run(options)
    except GraphPruneError as error:
        print(f"graphprune: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"graphprune: interrupted, {options.interrupted}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="graphprune",
        description="Prune a model: a smaller dense model of the same class, proven equal to the masked original.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(interrupted="nothing was written")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    prune = commands.add_parser("prune", help="remove a share of the parameters and save the result")
    prune.set_defaults(run=_prune)
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
    prune.add_argument("--json", action="store_true", help="print the report as JSON")
    cli_stream.add_options(prune)

    inspect = commands.add_parser("inspect", help="show what hangs together, what is pinned and why")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("model", metavar="MODEL", help="a folder, a name on the hub, or a .gguf file")
    inspect.add_argument("--inner-axes", action="store_true", help="count inner factors as prunable")
    inspect.add_argument("--width", action="store_true", help="count what is normalised as prunable")
    inspect.add_argument("--experts", action="store_true", help="count whole experts of mixtures as prunable")

    cli_viz.add_command(commands)
    cli_knowledge.add_command(commands)
    cli_shear.add_commands(commands)
    cli_evaluate.add_commands(commands)
    cli_report.add_command(commands)
    cli_card.add_command(commands)
    return parser


def _inspect(options: argparse.Namespace) -> None:
    import graphprune
    from graphprune.io.models import load_model

    model, _ = load_model(options.model)
    found = graphprune.inspect(model, inner_axes=options.inner_axes, width=options.width, experts=options.experts)
    print(found)


def _prune(options: argparse.Namespace) -> None:
    import torch
    from rich.console import Console

    import graphprune
    from graphprune.evaluate.macs import count_macs, positions
    from graphprune.io.folder import save
    from graphprune.io.models import load_model
    from graphprune.trace.inputs import example_inputs_for

    output = Path(options.output)
    if output.exists():
        raise GraphPruneError(f"{output} exists already; give a folder that does not.")
    if options.stream:
        cli_stream.run(options)
        return
    choices = plan_choices(options)
    console = Console(stderr=True)
    with console.status(f"loading {options.model}") as status:
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
            progress=status.update,
        )
        status.update(f"writing {output}")
        save(pruned, output, tokenizer=tokenizer, max_shard_size=options.max_shard_size, portable=options.portable)
    found = graphprune.report(pruned)
    facts = summary(found, (macs, count_macs(pruned, inputs) // positions(inputs)))
    if options.json:
        if found.fields is not None:
            facts |= {"fields": found.fields, "unsaid": found.unsaid}
        print(json.dumps({**facts, "widths": found.widths, "skipped": found.skipped, "output": str(output)}, indent=1))
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
