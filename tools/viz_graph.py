"""Draw the node groups of a model: ``python tools/viz_graph.py MODEL -o graph.html``, as ``graphprune viz`` does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from graphprune.cli_viz import EXAMPLES, add_options, draw
from graphprune.errors import GraphPruneError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Draw which parameter dimensions of a model hang together, and why.",
        epilog=EXAMPLES.replace("graphprune viz", "python tools/viz_graph.py"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    try:
        draw(parser.parse_args(argv))
    except GraphPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
