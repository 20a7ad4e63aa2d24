"""``graphprune prune FOLDER --stream``: a checkpoint larger than memory, from folder to folder."""

from __future__ import annotations

import argparse
import json

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
    from rich.console import Console

    import graphprune
    from graphprune.cli import print_tables, read_text
    from graphprune.data.calibration import MADE
    from graphprune.data.texts import data_of

    for name in _NOT_STREAMED:
        if getattr(options, name):
            raise GraphPruneError(
                f"--{name.replace('_', '-')} runs the whole model: leave it out, or leave out --stream."
            )
    options.interrupted = "the same command goes on from what is written"
    plan = graphprune.Plan.from_json(read_text(options.plan)) if options.plan else None
    with Console(stderr=True).status(f"reading {options.model}") as status:
        found = graphprune.stream(
            options.model,
            options.output,
            options.ratio,
            plan=plan,
            method=options.method,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            max_shard_size=options.max_shard_size,
            deploy=options.deploy,
            allocation=options.allocation,
            round_to=options.round_to,
            include=options.include,
            exclude=options.exclude,
            skip_first=options.skip_first,
            skip_last=options.skip_last,
            inner_axes=options.inner_axes,
            width=options.width,
            experts=options.experts,
            seed=options.seed,
            data=data_of(options.data, MADE),
            samples=options.samples,
            length=options.length,
            device=options.device,
            progress=status.update,
        )
    facts = {
        "parameters": [found.parameters_before, found.parameters_after],
        "bytes": [found.bytes_before, found.bytes_after],
        "ratio": found.ratio,
        "oracle_error": found.oracle_error,
        "seconds": found.total_seconds,
    }
    if options.json:
        more = {"widths": found.widths, "skipped": found.skipped, "output": options.output}
        print(json.dumps({**facts, **more}, indent=1))
    else:
        print_tables(found, facts)
        print(f"written to {options.output}; not proven: the weights were never in memory together")
