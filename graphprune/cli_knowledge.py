"""The command ``graphprune knowledge MODEL --data … -o plot.png``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from graphprune.cli_common import new_command, write_text
from graphprune.cli_progress import progress
from graphprune.errors import GraphPruneError

_EXAMPLES = """examples:
  graphprune knowledge model.gguf --data text.jsonl -o plot.png
  graphprune knowledge some-org/some-model --data text.jsonl --ratios 0.25 0.5 -o plot.svg knowledge.json
"""


def add_command(commands: Any) -> None:
    """Add it to the subparsers ``commands``."""
    parser = new_command(
        commands,
        "knowledge",
        _knowledge,
        "mask every node group alone and show what the model loses with it",
        _EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a name on the hub, or a .gguf file")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="evaluation texts, as those of graphprune prune")
    parser.add_argument(
        "-o", "--output", nargs="+", default=[], metavar="FILE", help="a plot, or .json; must not exist"
    )
    parser.add_argument(
        "--ratios",
        nargs="+",
        type=float,
        default=[0.1, 0.3, 0.5],
        metavar="R",
        help="shares of a group to mask (default 0.1 0.3 0.5)",
    )
    parser.add_argument("--samples", type=int, default=8, help="rows of data (default 8)")
    parser.add_argument("--length", type=int, default=128, help="tokens per row (default 128)")
    parser.add_argument("--include", nargs="+", default=[], metavar="PATTERN", help="measure only these modules")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="never measure these modules")
    parser.add_argument("--inner-axes", action="store_true", help="also measure channels of every head and the like")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="load the weights in this dtype")
    parser.add_argument(
        "--device", nargs="+", metavar="NAME", help="devices to measure on, side by side: cuda:0 cuda:1"
    )
    parser.add_argument("--cache", metavar="DIR", help="folder for what was measured (default ~/.cache/graphprune)")
    parser.add_argument("--no-cache", action="store_true", help="measure all of it again, and keep nothing")


def _knowledge(options: argparse.Namespace) -> None:
    import torch

    import graphprune
    from graphprune.data.calibration import MADE
    from graphprune.data.texts import data_of
    from graphprune.io.loss_cache import CACHE
    from graphprune.io.models import load_model

    outputs = [Path(name) for name in options.output]
    for output in outputs:
        if output.exists():
            raise GraphPruneError(f"{output} exists already; give a file that does not.")
    data = data_of(options.data, MADE)
    with progress(options) as say:
        say(f"loading {options.model}")
        model, tokenizer = load_model(options.model, dtype=getattr(torch, options.dtype) if options.dtype else None)
        found = graphprune.knowledge(
            model,
            data=data,
            tokenizer=tokenizer,
            ratios=options.ratios,
            samples=options.samples,
            length=options.length,
            seed=options.seed,
            include=options.include,
            exclude=options.exclude,
            inner_axes=options.inner_axes,
            cache=None if options.no_cache else options.cache or CACHE,
            devices=options.device,
            progress=say,
        )
    print(found.to_json() if options.json else found)
    for output in outputs:
        if output.suffix == ".json":
            write_text(output, found.to_json() + "\n")
        else:
            found.plot(output)
