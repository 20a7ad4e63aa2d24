"""The command ``graphprune card DIR``."""

from __future__ import annotations

import argparse
from typing import Any


def add_command(commands: Any) -> None:
    """Add it to the subparsers ``commands``."""
    parser = commands.add_parser("card", help="put measurements, a license, … into the README.md of a saved model")
    parser.set_defaults(run=_card)
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
