"""The command ``graphprune report DIR -o report.html``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from graphprune.errors import GraphPruneError

_EXAMPLES = """examples:
  graphprune report smaller -o report.html
  graphprune report run --json
  graphprune report smaller --evaluation evaluation.json --knowledge knowledge.json -o report.html
"""


def add_command(commands: Any) -> None:
    """Add it to the subparsers ``commands``."""
    parser = commands.add_parser(
        "report",
        help="show what was done to a pruned model and what came of it",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_report)
    parser.add_argument("folder", metavar="DIR", help="what prune, shear or recover wrote")
    parser.add_argument("-o", "--output", metavar="FILE", help="a page, .html; written anew")
    parser.add_argument("--evaluation", nargs="+", default=[], metavar="FILE", help="what graphprune eval -o wrote")
    parser.add_argument("--knowledge", metavar="FILE", help="what graphprune knowledge -o wrote as .json")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _report(options: argparse.Namespace) -> None:
    from graphprune.html_report import collect, show, to_html

    output = Path(options.output) if options.output else None
    if output is not None and output.suffix != ".html":
        raise GraphPruneError(f"{output} must end in .html: the report is a page.")
    found = collect(options.folder, options.evaluation, options.knowledge)
    if options.json:
        print(json.dumps(found.to_dict(), indent=1, allow_nan=False))
    else:
        show(found)
    if output is not None:
        try:
            output.write_text(to_html(found), encoding="utf-8")
        except OSError as error:
            raise GraphPruneError(f"{output} cannot be written: {error}") from error
