"""The command ``graphprune report DIR -o report.html``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from graphprune.cli_common import new_command, print_json, write_text
from graphprune.errors import GraphPruneError

_EXAMPLES = """examples:
  graphprune report smaller -o report.html
  graphprune report run --json
  graphprune report smaller --evaluation evaluation.json --knowledge knowledge.json -o report.html
"""


def add_command(commands: Any) -> None:
    """Add it to the subparsers ``commands``."""
    parser = new_command(
        commands, "report", _report, "show what was done to a pruned model and what came of it", _EXAMPLES
    )
    parser.add_argument("folder", metavar="DIR", help="what prune, shear or recover wrote")
    parser.add_argument("-o", "--output", metavar="FILE", help="a page, .html; written anew")
    parser.add_argument("--evaluation", nargs="+", default=[], metavar="FILE", help="what graphprune eval -o wrote")
    parser.add_argument("--knowledge", metavar="FILE", help="what graphprune knowledge -o wrote as .json")


def _report(options: argparse.Namespace) -> None:
    from graphprune.html_report import collect, show, to_html

    output = Path(options.output) if options.output else None
    if output is not None and output.suffix != ".html":
        raise GraphPruneError(f"{output} must end in .html: the report is a page.")
    found = collect(options.folder, options.evaluation, options.knowledge)
    if options.json:
        print_json(found.to_dict())
    else:
        show(found)
    if output is not None:
        write_text(output, to_html(found))
