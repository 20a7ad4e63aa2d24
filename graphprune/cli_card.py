"""The command ``graphprune card DIR --evaluation measured.json``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from graphprune.cli_common import new_command, print_json

_EXAMPLES = """examples:
  graphprune card smaller --evaluation measured.json --license apache-2.0
  graphprune card smaller --base-model some-org/some-model
"""


def add_command(commands: Any) -> None:
    """Add it to the subparsers ``commands``."""
    parser = new_command(
        commands, "card", _card, "put measurements, a license, … into the README.md of a saved model", _EXAMPLES
    )
    parser.add_argument("folder", metavar="DIR", help="a folder that graphprune wrote")
    parser.add_argument("--evaluation", metavar="FILE", help="what graphprune eval -o wrote")
    parser.add_argument("--license", metavar="NAME", help="as the hub names it, such as apache-2.0")
    parser.add_argument("--base-model", metavar="NAME", help="the name on the hub of the model before pruning")


def _card(options: argparse.Namespace) -> None:
    from graphprune.evaluate.evaluation import read_evaluations
    from graphprune.io.model_card import update_card

    metadata = {"license": options.license, "base_model": options.base_model}
    update_card(
        options.folder,
        evaluations=read_evaluations(options.evaluation) if options.evaluation else None,
        metadata={name: value for name, value in metadata.items() if value is not None},
    )
    card = str(Path(options.folder, "README.md"))
    if options.json:
        print_json({"output": card})
    else:
        print(f"written to {card}")
