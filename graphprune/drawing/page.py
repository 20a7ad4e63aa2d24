"""The graph as one HTML file to look around in: search, zoom, and a panel that says everything about what is chosen."""

from __future__ import annotations

import html
from typing import Any

from graphprune.drawing import words
from graphprune.drawing.graph import Graph
from graphprune.drawing.layout import NARROW, WIDE, Layout, Sizes, lay_out
from graphprune.pages.document import document, resource

_KINDS = {
    "prunable": "may lose indices",
    "pinned": "must stay whole, with the reason",
    "left alone": "not to be pruned as asked",
    "inner": "inner factor, pruned only when asked",
    "rank": "rank of a composed group",
}
_BODY = """<header>
<h1>{name}</h1>
<p id="facts">{facts}</p>
<div id="tools">
<label id="seek">Search
<input id="search" type="search" autocomplete="off" spellcheck="false" placeholder="name, reason, operator">
</label>
<output id="found" for="search"></output>
<span role="group" aria-label="Zoom" id="zoom">
<button type="button" id="out" aria-label="Zoom out">−</button>
<button type="button" id="in" aria-label="Zoom in">+</button>
<button type="button" id="fit">Fit</button>
</span>
</div>
<details id="key"><summary>Key</summary><ul>{key}</ul>
<p>Lines join a tensor to the node groups of its dimensions: solid where the group is produced, dashed where it is
summed away. Tab reaches the graph, arrows move in it, Enter opens, Escape closes, / searches, + − 0 zoom.</p></details>
</header>
<main>
<div id="view" role="region" aria-label="Graph"><div id="paper"><div id="canvas"></div></div></div>
<aside id="panel" aria-label="Details" hidden></aside>
</main>
<noscript><p>This page is drawn by its script: allow it to run.</p></noscript>"""


def to_html(graph: Graph) -> str:
    """``graph`` as a whole page that needs nothing but a browser."""
    name = graph.graph["name"]
    style, script = (resource("graphprune.drawing", f"page.{kind}") for kind in ("css", "js"))
    body = _BODY.format(name=html.escape(name), facts=html.escape(_facts(graph)), key=_key(graph))
    return document(f"{name}: node groups", body, style, script, page_data(graph))


def page_data(graph: Graph) -> dict[str, Any]:
    """What the script draws: nodes with all that is said of them, edges, and places for wide and narrow windows."""
    wide, narrow = lay_out(graph, WIDE), lay_out(graph, NARROW)
    return {
        "nodes": {node: _node(about, wide.depth.get(node, 0)) for node, about in graph.nodes(data=True)},
        "edges": [
            [source, target, about.get("dim"), about.get("consumes", False)]
            for source, target, about in graph.edges(data=True)
        ],
        "wide": _places(wide, WIDE),
        "narrow": _places(narrow, NARROW),
    }


def _facts(graph: Graph) -> str:
    groups = [about for _, about in graph.nodes(data=True) if about["side"] == "group"]
    count = sum(about["count"] for about in groups)
    prunable = sum(about["count"] for about in groups if about["kind"] == "prunable")
    text = f"{count} node groups, {prunable} prunable"
    pruned = [about for about in groups if about["kept"]]
    if pruned:
        total = sum(len(about["kept"]) for about in pruned)
        text += f"; {total} pruned"
    return text


def _key(graph: Graph) -> str:
    there = {about.get("kind") for _, about in graph.nodes(data=True)}
    rows = [
        f'<li><span class="sample {_class(kind)}"></span>{kind}: {why}</li>'
        for kind, why in _KINDS.items()
        if kind in there
    ]
    return "".join(rows)


def _class(kind: str) -> str:
    return kind.replace(" ", "-")


def _places(layout: Layout, sizes: Sizes) -> dict[str, Any]:
    return {
        "size": [layout.width, layout.height],
        "nodes": {node: place.as_list() for node, place in layout.nodes.items()},
        "frames": [[place.as_list(), title, composed] for place, title, composed in layout.frames],
        "lines": layout.edges,
    }


def _node(about: dict[str, Any], depth: int) -> dict[str, Any]:
    common = {"side": about["side"], "name": about["name"], "times": about["count"]}
    if about["side"] == "operator":
        return common | {"short": about["name"], "look": "operator", "lines": [about["where"]]}
    if about["side"] == "tensor":
        return common | {
            "short": ".".join(about["name"].split(".")[depth:]),
            "look": about["kind"],
            "lines": [words.shape(about)],
            "kind": about["kind"],
            "tied": about["tied"],
            "dims": about["dims"],
            "parameters": about["parameters"],
        }
    path, last = _split(about["name"])
    return common | {
        "short": last,
        "path": path,
        "look": _class(about["kind"]),
        "lines": [words.size(about), words.reason(about) or words.structures(about)],
        "kind": about["kind"],
        "reason": about["reason"],
        "structures": words.structures(about),
        "slices": about["slices"],
        "elsewhere": about["elsewhere"],
        "kept": about["kept"],
        "share": words.kept_share(about) if about["kept"] else None,
        "composed": about["composed"],
        "operators": about["operators"],
    }


def _split(name: str) -> tuple[str, str]:
    """``model.layers.*.mlp`` and ``gate_proj.weight[0]``: the last two parts of a group's name say which it is."""
    dimension = name.rindex("[")
    parts = name[:dimension].split(".")
    return ".".join(parts[:-2]), ".".join(parts[-2:]) + name[dimension:]
