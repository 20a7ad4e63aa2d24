"""Draw the node groups of a model: ``python tools/viz_graph.py MODEL -o graph.html``, as ``graphprune viz`` does."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from graphprune import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    return cli.main(["viz", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
