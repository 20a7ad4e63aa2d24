"""The API reference: every public name is in it, it is what the docstrings say, and they say what a caller needs."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import graphprune
from graphprune.passes.allocate_budget import allocation
from graphprune.passes.score.registry import _CRITERIA, criterion

PAGE = Path(__file__).parents[2] / "docs" / "api.md"

# What comes from a paper names it, with the equation or algorithm.
FROM_A_PAPER = {
    "graphprune.knowledge": "2310.18356",
    "graphprune.passes.analyze_knowledge.analyze_knowledge": "2310.18356",
    "graphprune.passes.train_lhspg.train_lhspg": "2310.18356",
    "graphprune.passes.prune_in_order.prune_by_obs": "2412.18110",
    "graphprune.passes.prune_in_order.prune_by_moments": "2312.11983",
    "graphprune.passes.train_loraprune.train_loraprune": "2305.18403",
    "graphprune.recovery.recover.recover_on": "2310.18356",
}


@pytest.fixture
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("api_reference")


def test_every_public_name_has_an_entry(tool: ModuleType) -> None:
    text = PAGE.read_text("utf-8")
    assert [name for name in graphprune.__all__ if f"### `graphprune.{name}`\n" not in text] == []
    assert [name for name in tool.own(_CRITERIA) if f"| `{name}` |" not in text] == []


def test_it_is_up_to_date(tool: ModuleType) -> None:
    assert tool.build() == PAGE.read_text("utf-8"), "run python tools/api_reference.py"


def test_what_a_user_registers_is_not_in_it(tool: ModuleType) -> None:
    before = tool.build()
    exec("@criterion('of-no-module')\ndef scores(program): return {}", {"criterion": criterion})
    assert _CRITERIA["of-no-module"].__module__ is None
    criterion("of-a-test")(lambda program: {})
    allocation("of-a-test")(lambda program: {})
    assert tool.build() == before


def test_docstrings_name_every_argument_and_field(tool: ModuleType) -> None:
    for _, name, thing in tool.entries():
        doc = inspect.getdoc(tool._function_of(thing)) or ""
        assert [one for one in tool.fields_of(thing) if not re.search(rf"\b{one}\b", doc)] == [], name


def test_docstrings_say_what_is_raised_and_which_shapes(tool: ModuleType) -> None:
    for _, name, thing in tool.entries():
        function = tool._function_of(thing)
        doc = inspect.getdoc(function) or ""
        if inspect.isfunction(function):
            assert "aises" in doc or "raise GraphPruneError" not in inspect.getsource(function), name
            tensors = any("Tensor" in str(p.annotation) for p in inspect.signature(function).parameters.values())
            assert "shape" in doc or not tensors, name


def test_docstrings_name_the_paper(tool: ModuleType) -> None:
    docs = {name: inspect.getdoc(thing) or "" for _, name, thing in tool.entries()}
    for name, number in FROM_A_PAPER.items():
        assert f"arXiv {number}" in docs[name], name
        assert re.search(r"\b(Eq|Alg)\. \d", docs[name]), name
    for name, function in tool.own(_CRITERIA).items():
        said = f"{function.__doc__}{sys.modules[function.__module__].__doc__}"
        assert name in ("l1", "l2", "random") or "arXiv" in said, name


def test_a_docstring_becomes_markdown(tool: ModuleType) -> None:
    @dataclass
    class Thing:
        """A thing, see :func:`graphprune.compile`.

        Attributes:
            a, b: two ``numbers`` that
                go on.

                - one
            c: the rest.

        Raises :class:`ValueError` never.
        """

        a: int
        c: str = "x"

    assert tool.signature("Thing", Thing) == "Thing(a: int, c: str = 'x')"
    assert tool.markdown(inspect.getdoc(Thing)) == (
        "A thing, see `graphprune.compile`.\n\n**Attributes**\n\n- `a, b`: two `numbers` that\n  go on.\n\n  - one\n"
        "- `c`: the rest.\n\nRaises `ValueError` never."
    )
