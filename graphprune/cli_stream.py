"""``graphprune prune FOLDER --stream``: a checkpoint larger than memory, from folder to folder."""

from __future__ import annotations

import argparse

from graphprune.cli_common import print_json
from graphprune.cli_progress import progress
from graphprune.errors import GraphPruneError

# What a run that never holds the model cannot do.
_NOT_STREAMED = ("unprunable_ratio",)


def add_options(prune: argparse.ArgumentParser) -> None:
    """Add the options of streaming to the command ``prune``."""
    prune.add_argument(
        "--stream",
        action="store_true",
        help="never hold the model: read, slice and write FOLDER by pieces; nothing is proven, interrupted it goes on",
    )
    prune.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of one weight file at most (default 5GB)"
    )


def run(options: argparse.Namespace) -> None:
    """Prune ``options.model``, a folder, into ``options.output``."""
    import torch

    import graphprune
    from graphprune.cli import plan_choices, print_tables, summary

    for name in _NOT_STREAMED:
        if getattr(options, name):
            raise GraphPruneError(
                f"--{name.replace('_', '-')} runs the whole model: leave it out, or leave out --stream."
            )
    options.interrupted = "the same command goes on from what is written"
    choices = plan_choices(options)
    with progress(options) as say:
        found = graphprune.stream(
            options.model,
            options.output,
            options.ratio,
            method=options.method,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            max_shard_size=options.max_shard_size,
            progress=say,
            **choices,
        )
    facts = summary(found)
    if options.json:
        more = {"widths": found.widths, "skipped": found.skipped, "output": options.output}
        print_json({**facts, **more})
    else:
        print_tables(found, facts)
        print(f"written to {options.output}; not proven: the weights were never in memory together")
