"""Repeated blocks shown once."""

from __future__ import annotations

from graphprune.folding import by_block, in_blocks, joined, places
from graphprune.reporting import widths_by_block


def test_blocks_that_follow_one_another_and_are_alike_share_a_row() -> None:
    rows = [("layers.0", ["a"]), ("layers.1", ["a"]), ("layers.2", ["b"]), ("", ["b"]), ("heads.3", ["b"])]
    assert joined(rows) == [("layers.0–1", ["a"]), *rows[2:]]
    assert joined([("layers.3", ["a"]), ("layers.5", ["a"]), ("h.6", ["a"])]) == [
        ("layers.3", ["a"]),
        ("layers.5", ["a"]),
        ("h.6", ["a"]),
    ]
    assert joined([]) == []


def test_widths_as_a_table() -> None:
    widths = {f"layers.{n}.up.weight[0]": (48, 40 if n < 3 else 32) for n in range(5)} | {"head.weight[0]": (8, 4)}
    assert widths_by_block(widths) == (
        ["up.weight[0]", "head.weight[0]"],
        [("layers.0–2", ["48→40", ""]), ("layers.3–4", ["48→32", ""]), ("", ["", "8→4"])],
    )
    assert [block for block, _ in by_block(widths)[1]] == [*(f"layers.{n}" for n in range(5)), ""]


def test_where_groups_stand() -> None:
    assert places(["layers.3.mlp.0.weight[0]", "layers.12.mlp.0.weight[0]"]) == ("block", [3, 12])
    assert places(["layers.3.mlp.0.weight[0]", "layers.3.mlp.1.weight[0]"]) == ("group", [0, 1])
    assert places(["head.weight[0]"]) == ("group", [0])


def test_what_repeats_from_block_to_block_apart_from_what_does_not() -> None:
    names = ["layers.0.up", "layers.1.up", "head", "layers.0.down"]
    assert in_blocks(names, str) == ([["layers.0.up", "layers.1.up"]], ["head", "layers.0.down"])
