"""What every command takes besides its own options, and what all of them do alike."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graphprune.errors import GraphPruneError

LEVELS = ("error", "warning", "info", "debug")
# Of how a command is run, not of what it does: run.yaml leaves them out.
NAMES = ("config", "json", "log_level", "debug")


def new_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], what: str, examples: str
) -> argparse.ArgumentParser:
    """Add a command to the subparsers ``commands``: ``run`` does it, the help says ``what``, with ``examples``."""
    raw = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, epilog=examples, formatter_class=raw)
    parser.set_defaults(run=run)
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add them to the parser of a command."""
    add = parser.add_argument_group("common").add_argument
    add("--config", metavar="FILE", help="take options from this .yaml file; those that are given here win")
    add("--json", action="store_true", help="print the outcome as JSON, and nothing else, to stdout")
    add(
        "--log-level",
        choices=LEVELS,
        default="info",
        help="what goes to stderr besides errors: warnings, progress (info, the default), every step as a line (debug)",
    )
    add("-v", dest="log_level", action="store_const", const="debug", help="--log-level debug")
    add("-q", dest="log_level", action="store_const", const="warning", help="--log-level warning: no progress")
    add("--debug", action="store_true", help="show where in the code an error comes from")


@contextmanager
def libraries_at(level: str) -> Iterator[None]:
    """Let the libraries warn, or not, as ``--log-level`` says."""
    with warnings.catch_warnings():
        if level == "error":
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def print_json(data: Any) -> None:
    """The outcome for ``--json``; numbers that are not finite as text."""
    from graphprune.evaluate.evaluation import finite

    print(json.dumps(finite(data), indent=1, allow_nan=False))


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole or as it was. Raises :class:`GraphPruneError` when that cannot be."""
    from graphprune.io.atomic import replace_file

    try:
        replace_file(path, text)
    except OSError as error:
        raise GraphPruneError(f"{path} cannot be written: {error.strerror or error}.") from error
