"""The page of the graph: complete, by itself, and safe from names; in a browser, with mouse and keys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser, needs_browser
from drawing_models import HEADS, HOSTILE, MLP, hostile, traced

from graphprune.drawing import View, build_graph, write
from graphprune.drawing.page import page_data, to_html

WIDTHS = {f"model.layers.{n}.mlp.gate_proj.weight[0]": (44, 33) for n in range(4)}


def test_the_page_says_what_the_graph_says() -> None:
    graph = build_graph(traced(), View(widths=WIDTHS))
    data = page_data(graph)
    assert data["nodes"].keys() == set(graph.nodes)
    assert len(data["edges"]) == len(data["wide"]["lines"]) == len(data["narrow"]["lines"]) == graph.number_of_edges()
    (mlp,) = (node for node in data["nodes"].values() if node["name"] == MLP)
    assert (mlp["path"], mlp["short"]) == ("model.layers.*.mlp", "gate_proj.weight[0]")
    assert (mlp["lines"], mlp["share"]) == (["size 44 → 33, 75% kept", "44 structures of 96 parameters"], 0.75)
    (query,) = (node for node in data["nodes"].values() if node["name"].endswith("q_proj.weight"))
    assert query["short"] == "q_proj.weight"  # the boxes around it say the rest


def test_the_page_needs_nothing_else() -> None:
    page = to_html(build_graph(traced()))
    assert not re.findall(r"<[^>]*\b(?:src|href)=\"(?!data:,)", page)
    assert "url(" not in page
    assert "default-src &#x27;none&#x27;" in page
    assert len(page) < 200_000


def test_a_hostile_name_is_only_text() -> None:
    page = to_html(build_graph(hostile()))
    assert page.count("</script>") == 2
    assert "<img" not in page
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)[0])
    assert any(HOSTILE in node["name"] for node in data["nodes"].values())


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    write(build_graph(traced(), View(widths=WIDTHS)), folder / "graph.html")
    write(build_graph(hostile()), folder / "hostile.html")
    return folder


@pytest.fixture(scope="module")
def wide() -> Iterator[Browser]:
    with browser(1280) as window:
        yield window


def focused(window: Browser) -> str:
    return window.run("return document.activeElement.getAttribute('aria-label') || document.activeElement.id")


def panel(window: Browser) -> str | None:
    return window.run("const p = document.getElementById('panel'); return p.hidden ? null : p.innerText")


@needs_browser
def test_the_graph_is_worked_by_keys(wide: Browser, pages: Path) -> None:
    wide.open(pages / "graph.html")
    wide.press("/", "mlp.gate_proj.weight[0]")
    assert wide.run("return document.getElementById('found').textContent") == "1 of 23"
    wide.press("Enter")
    assert focused(wide).startswith(f"group, {MLP} ×4, size 44 → 33, 75% kept")
    wide.press("Enter")
    said = panel(wide)
    for text in (MLP, "44 structures of 96 parameters", "33", "up_proj.weight ×4", "dimension 1 of 32 × 44", "silu"):
        assert text in said, text
    assert "modeling_llama.py:" in said
    assert wide.run("return document.activeElement.tagName") == "H2"
    assert wide.run("return document.querySelectorAll('path.near').length") == 3
    wide.press("Escape")
    assert panel(wide) is None
    assert MLP in focused(wide)
    wide.press("Left")
    assert focused(wide).startswith("tensor, model.layers.*.mlp.")
    before = focused(wide)
    wide.press("Down")
    assert focused(wide).startswith("tensor, ")
    assert focused(wide) != before
    outline = wide.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    wide.press("Tab")
    assert not focused(wide).startswith(("tensor", "group"))  # the graph is one stop
    assert wide.errors() == []


@needs_browser
def test_a_click_leads_from_group_to_parameter_and_back(wide: Browser, pages: Path) -> None:
    wide.open(pages / "graph.html")
    click = "[...document.querySelectorAll(arguments[0])].find(e => e.textContent.includes(arguments[1])).click()"
    wide.run(click, ".node.group", "q_proj.weight[0].0")
    assert HEADS in panel(wide)
    wide.run(click, "#panel .link", "o_proj.weight")
    assert panel(wide).splitlines()[1].startswith("model.layers.*.self_attn.o_proj.weight")
    assert "summed away" not in panel(wide)
    wide.run(click, "#panel .link", "embed_tokens.weight[1]")
    assert re.search(r"averaged \(modeling_llama\.py:\d+ model\.layers\.0\.input_layernorm\)", panel(wide))
    wide.run("document.querySelector('.close').click()")
    assert panel(wide) is None
    before = wide.run("return document.getElementById('paper').offsetWidth")
    wide.run("document.getElementById('in').click()")
    assert wide.run("return document.getElementById('paper').offsetWidth") == pytest.approx(before * 1.25, abs=2)
    assert wide.errors() == []


@needs_browser
def test_a_hostile_name_does_nothing_in_a_browser(wide: Browser, pages: Path) -> None:
    wide.open(pages / "hostile.html")
    wide.run("document.querySelector('.node.group.prunable').click()")
    assert HOSTILE in panel(wide)
    assert wide.run("return [document.title, document.images.length]") == ["Hostile: node groups", 0]
    assert wide.errors() == []


@needs_browser
def test_a_telephone_shows_it_without_scrolling_sideways(pages: Path) -> None:
    with browser(390, 844, dark=True) as window:
        window.open(pages / "graph.html")
        view = "const v = document.getElementById('view'); return [v.scrollWidth - v.clientWidth, innerWidth]"
        beyond, width = window.run(view)
        assert (beyond <= 0, width) == (True, 390)
        size = window.run(
            "const n = document.querySelector('.node b'); return parseFloat(getComputedStyle(n).fontSize) *"
            " n.getBoundingClientRect().width / n.offsetWidth"
        )
        assert size >= 11
        window.run("document.querySelector('.node.group').click()")
        top = window.run("return document.getElementById('panel').getBoundingClientRect().top")
        assert top > 300  # a sheet at the bottom
        assert window.run("return getComputedStyle(document.body).backgroundColor") == "rgb(18, 23, 29)"
        assert window.errors() == []
