"""Writing the picture: the extension of the file says how."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from graphprune.drawing.dot import to_pydot
from graphprune.drawing.graph import Graph
from graphprune.drawing.page import to_html
from graphprune.errors import GraphPruneError

FORMATS = (".dot", ".svg", ".png", ".html")


def write(graph: Graph, path: str | Path) -> None:
    """Draw ``graph`` into the file ``path``: ``.dot`` and ``.html`` need nothing else, ``.svg`` and ``.png`` Graphviz.

    Raises :class:`GraphPruneError` for another extension, without Graphviz, or when the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise GraphPruneError(f"{path.name} must end in {', '.join(FORMATS)}: the extension says what to draw.")
    try:
        path.write_bytes(_content(graph, path.suffix))
    except OSError as error:
        raise GraphPruneError(f"{path} could not be written: {error.strerror}.") from error


def _content(graph: Graph, extension: str) -> bytes:
    if extension == ".html":
        return to_html(graph).encode()
    source = to_pydot(graph).to_string().encode()
    return source if extension == ".dot" else _rendered(source, extension)


def _rendered(source: bytes, extension: str) -> bytes:
    program = shutil.which("dot")
    if program is None:
        raise GraphPruneError(
            f"Drawing {extension} needs the program dot of Graphviz: install it (apt install graphviz, "
            "brew install graphviz, or https://graphviz.org/download), or write a .dot file, which needs nothing."
        )
    done = subprocess.run([program, f"-T{extension[1:]}"], input=source, capture_output=True, check=False)
    if done.returncode:
        raise GraphPruneError(f"Graphviz could not draw the graph: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout
