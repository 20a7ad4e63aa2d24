"""Property tests of the axis algebra, against brute force on index tensors.

A random dimension is built by looking into one axis again and again (factor, cut) and by joining (product, concat).
The same reshapes, splits and joins are applied to ``torch.arange``: every index of every leaf can then be followed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphprune.ir.axes import (
    Axis,
    Misaligned,
    Pin,
    concat,
    cut,
    describe,
    expand_mask,
    factor,
    factors,
    find,
    is_pinned,
    leaves,
    parts,
    pin,
    product,
    reduce_to_leaves,
    unify,
)

# A description: a size (leaf), or ("product" | "concat", descriptions).
Shape = int | tuple[str, list]


def shapes(limit: int = 4) -> st.SearchStrategy:
    """Random nested descriptions of at most a few hundred indices."""
    return st.recursive(
        st.integers(2, limit),
        lambda inner: st.tuples(st.sampled_from(["product", "concat"]), st.lists(inner, min_size=2, max_size=3)),
        max_leaves=5,
    )


def build(shape: Shape) -> Axis:
    """The axis of a description, joined from fresh leaves."""
    if isinstance(shape, int):
        return Axis(shape)
    kind, below = shape
    return (product if kind == "product" else concat)(build(part) for part in below)


def size_of(shape: Shape) -> int:
    return build(shape).size


def look_into(axis: Axis, shape: Shape) -> None:
    """Reveal a description in an axis from the outside in, as operators do."""
    if isinstance(shape, int):
        return
    kind, below = shape
    if kind == "product":
        for piece, inner in zip(factor(axis, [size_of(b) for b in below]), below, strict=True):
            look_into(piece, inner)
        return
    rest = axis
    for inner in below:
        piece, rest = cut(rest, size_of(inner))
        look_into(piece, inner)


def random_masks(axis: Axis, draw: Callable, free_only: bool = False) -> dict[Axis, torch.Tensor]:
    """A random keep-mask for every leaf; with ``free_only`` for those that may be pruned."""
    masks = {}
    for leaf in dict.fromkeys(leaves(axis)):
        if not free_only or (leaf.size > 1 and not leaf.pins):
            masks[leaf] = torch.tensor(draw(st.lists(st.booleans(), min_size=leaf.size, max_size=leaf.size)))
    return masks


def brute_force(axis: Axis, masks: dict[Axis, torch.Tensor]) -> torch.Tensor:
    """The kept positions of a dimension, by doing to an index tensor what the description says.

    Each concat is a ``split``, each product a ``view`` followed by an ``index_select`` per factor.
    """

    def kept(axis: Axis, positions: torch.Tensor) -> torch.Tensor:
        axis = find(axis)
        if axis.kind == "leaf":
            return positions[masks[axis]]
        if axis.kind == "concat":
            pieces = positions.split([part.size for part in axis.parts])
            return torch.cat([kept(part, piece) for part, piece in zip(axis.parts, pieces, strict=True)])
        outer, *rest = axis.parts
        grid = positions.view(outer.size, -1)
        rows = kept(outer, torch.arange(outer.size))
        inner = rest[0] if len(rest) == 1 else Axis(grid.shape[1], "product", rest)
        return torch.cat([kept(inner, grid[row]) for row in rows]) if len(rows) else positions[:0]

    return kept(axis, torch.arange(axis.size))


def structure(axis: Axis) -> tuple:
    """Kind, sizes and identity pattern of an axis: which leaves are the same one, numbered by first sight."""
    seen: dict[Axis, int] = {}

    def walk(axis: Axis) -> tuple:
        axis = find(axis)
        if axis.kind == "leaf":
            return ("leaf", axis.size, seen.setdefault(axis, len(seen)), bool(axis.pins))
        flat = factors(axis) if axis.kind == "product" else parts(axis)
        return (axis.kind, *(walk(part) for part in flat))

    return walk(axis)


def removals(*axes: Axis) -> list[frozenset[tuple[int, int]]]:
    """What can be removed from the dimensions, however they are described: sets of (dimension, position).

    Each is one index of one leaf that is free and has more than one index.
    """
    found = set()
    for leaf in {leaf for axis in axes for leaf in leaves(axis) if not leaf.pins and leaf.size > 1}:
        for index in range(leaf.size):
            mask = torch.ones(leaf.size, dtype=torch.bool)
            mask[index] = False
            gone = [(~expand_mask(axis, {leaf: mask}.get)).nonzero().flatten().tolist() for axis in axes]
            found.add(frozenset((number, i) for number, places in enumerate(gone) for i in places))
    return sorted(found, key=sorted)


@given(shapes(), st.data())
def test_a_mask_is_what_brute_force_says(shape: Shape, data: st.DataObject) -> None:
    axis = build(shape)
    masks = random_masks(axis, data.draw)
    assert torch.equal(expand_mask(axis, masks.get).nonzero().flatten(), brute_force(axis, masks))


@given(shapes(), st.data())
def test_looking_in_and_joining_give_the_same_axis(shape: Shape, data: st.DataObject) -> None:
    """split then cat, view then flatten: kept indices survive the round trip."""
    revealed = Axis(size_of(shape))
    look_into(revealed, shape)
    joined = build(shape)
    unify(revealed, joined)
    assert not any(leaf.pins for leaf in leaves(joined))
    masks = random_masks(joined, data.draw)
    assert torch.equal(expand_mask(revealed, masks.get), expand_mask(joined, masks.get))
    assert torch.equal(expand_mask(revealed, masks.get).nonzero().flatten(), brute_force(joined, masks))


@given(shapes())
def test_refinement_keeps_every_index(shape: Shape) -> None:
    axis = Axis(size_of(shape))
    look_into(axis, shape)
    assert find(axis) is axis
    assert expand_mask(axis, lambda leaf: None).tolist() == [True] * axis.size
    # Every index belongs to some leaf, and taking all indices of all leaves away leaves nothing.
    covered = torch.zeros(axis.size, dtype=torch.bool)
    for leaf in set(leaves(axis)):
        none = torch.zeros(leaf.size, dtype=torch.bool)
        covered |= ~expand_mask(axis, {leaf: none}.get)
    assert covered.all()


@given(shapes(), st.data())
def test_kept_indices_survive_view_split_cat(shape: Shape, data: st.DataObject) -> None:
    """Slicing before the operators, or after them, leaves the same elements in the same order."""
    axis = build(shape)
    masks = random_masks(axis, data.draw)
    x = torch.arange(axis.size)
    kept = x[expand_mask(axis, masks.get)]
    if find(axis).kind == "concat":
        pieces = x.split([part.size for part in axis.parts])
        after = torch.cat([p[expand_mask(part, masks.get)] for p, part in zip(pieces, axis.parts, strict=True)])
    else:
        after = x.view([part.size for part in axis.parts] or [axis.size])
        for dim, part in enumerate(axis.parts or (axis,)):
            after = after.index_select(dim, expand_mask(part, masks.get).nonzero().flatten())
        after = after.flatten()
    assert torch.equal(kept, after)


@given(shapes(), shapes())
def test_unification_is_commutative(first: Shape, second: Shape) -> None:
    """Whichever comes first, the same positions go together, and as much stays free."""
    results = []
    for swap in (False, True):
        a, b = build(first), build(_stretched(second, size_of(first)))
        unify(*((b, a) if swap else (a, b)))
        results.append(removals(a, b))
    assert results[0] == results[1]


@given(shapes(), shapes(), shapes(), st.permutations([(0, 1), (1, 2)]), st.data())
def test_three_axes_that_are_one_have_the_same_mask(
    first: Shape, second: Shape, third: Shape, order: list[tuple[int, int]], data: st.DataObject
) -> None:
    """A description refined by the second unification must reach the axis that was unified first."""
    size = size_of(first)
    axes = [build(first), build(_stretched(second, size)), build(_stretched(third, size))]
    for i, j in order:
        unify(axes[i], axes[j])
    masks: dict[Axis, torch.Tensor] = {}
    for axis in axes:
        masks |= random_masks(axis, data.draw, free_only=True)
    found = [expand_mask(axis, masks.get) for axis in axes]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def _stretched(shape: Shape, size: int) -> Shape:
    """A description of ``size`` indices that begins like ``shape``."""
    have = size_of(shape)
    return ("concat", [shape, size - have]) if size > have else size


@given(shapes())
def test_unification_with_itself_changes_nothing(shape: Shape) -> None:
    axis = build(shape)
    before = structure(axis)
    unify(axis, axis)
    assert structure(axis) == before


@given(shapes(), shapes())
def test_unification_twice_is_once(first: Shape, second: Shape) -> None:
    a, b = build(first), build(_stretched(second, size_of(first)))
    unify(a, b)
    once = structure(a), structure(b)
    unify(a, b)
    unify(b, a)
    assert (structure(a), structure(b)) == once


@given(shapes(), shapes(), st.data())
def test_unified_axes_have_the_same_mask(first: Shape, second: Shape, data: st.DataObject) -> None:
    """However two descriptions are aligned, both sides keep the same positions; where they cannot be, all is pinned."""
    a, b = build(first), build(_stretched(second, size_of(first)))
    unify(a, b)
    masks = random_masks(a, data.draw, free_only=True) | random_masks(b, data.draw, free_only=True)
    assert torch.equal(expand_mask(a, masks.get), expand_mask(b, masks.get))


@given(shapes(), st.data())
def test_a_leaf_takes_any_description(shape: Shape, data: st.DataObject) -> None:
    leaf, other = Axis(size_of(shape)), build(shape)
    pin(leaf, Pin("known"))
    unify(*data.draw(st.permutations([leaf, other])))
    assert find(leaf) is find(other)
    assert all(Pin("known") in part.pins for part in leaves(other))


@given(shapes(), st.data())
def test_sums_over_leaves_are_what_brute_force_says(shape: Shape, data: st.DataObject) -> None:
    axis = build(shape)
    values = torch.tensor(data.draw(st.lists(st.integers(-9, 9), min_size=axis.size, max_size=axis.size)))
    totals: dict[Axis, torch.Tensor] = {}
    for leaf, share in reduce_to_leaves(axis, values):
        assert share.shape == (leaf.size,)
        totals[leaf] = totals[leaf] + share if leaf in totals else share
    for leaf in set(leaves(axis)):
        for index in range(leaf.size):
            mask = torch.ones(leaf.size, dtype=torch.bool)
            mask[index] = False
            owned = ~expand_mask(axis, {leaf: mask}.get)
            assert totals[leaf][index] == values[owned].sum()


def test_a_leaf_that_occurs_twice_sums_both_places() -> None:
    head = Axis(2)
    axis = concat([product([head, Axis(3)]), product([head, Axis(2)])])
    first, second = (share for leaf, share in reduce_to_leaves(axis, torch.arange(10)) if leaf is head)
    assert first.tolist() == [0 + 1 + 2, 3 + 4 + 5]
    assert second.tolist() == [6 + 7, 8 + 9]


@pytest.mark.parametrize(("first", "second"), [((4, 6), (6, 4)), ((2, 9), (3, 6)), ((3, 5, 2), (5, 3, 2))])
def test_factors_that_do_not_line_up_pin_both(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    a, b = product(Axis(n) for n in first), product(Axis(n) for n in second)
    unify(a, b)
    assert is_pinned(a)
    assert is_pinned(b)
    reasons = [pin.reason for leaf in leaves(a) for pin in leaf.pins]
    assert all("do not line up" in reason for reason in reasons)


def test_a_cut_inside_a_factor_is_refused() -> None:
    with pytest.raises(Misaligned, match="inside a factor of 6"):
        cut(product([Axis(4), Axis(6)]), 8)


def test_a_product_against_a_concat_that_does_not_fit_pins_both() -> None:
    a, b = product([Axis(2), Axis(5)]), concat([Axis(4), Axis(6)])
    unify(a, b)
    assert is_pinned(a)
    assert is_pinned(b)


def test_sizes_that_differ_are_refused() -> None:
    with pytest.raises(Misaligned, match="an axis of 3 cannot be an axis of 4"):
        unify(Axis(3), Axis(4))
    with pytest.raises(Misaligned, match="12 is not the product"):
        factor(Axis(12), (5, 2))


def test_a_finer_product_is_shared() -> None:
    coarse, fine = product([Axis(4), Axis(6)]), product([Axis(4), Axis(2), Axis(3)])
    unify(coarse, fine)
    assert [f.size for f in factors(coarse)] == [4, 2, 3]
    assert list(leaves(coarse)) == list(leaves(fine))


def test_parts_of_a_concat_share_their_inner_factor() -> None:
    """``concat(a·w, b·w)`` is ``(a + b)·w``."""
    first, second = product([Axis(2), Axis(3)]), product([Axis(4), Axis(3)])
    outer, inner = factor(concat([first, second]), (6, 3))
    assert [p.size for p in parts(outer)] == [2, 4]
    assert find(factors(first)[1]) is find(factors(second)[1]) is find(inner)


def test_pins_reach_what_is_revealed_later() -> None:
    axis = Axis(12)
    pin(axis, Pin("looked up", "model.py:3"))
    a, b = factor(axis, (3, 4))
    c, d = cut(b, 1)
    assert all(list(map(str, leaf.pins)) == ["looked up (model.py:3)"] for leaf in (a, c, d))


def test_one_part_can_be_pinned_alone() -> None:
    q, v = cut(Axis(12), 8)
    pin(q, Pin("scaled"))
    assert is_pinned(q)
    assert not is_pinned(v)


def test_an_axis_reads_as_an_expression() -> None:
    axis = product([Axis(4), concat([Axis(3), Axis(5)])])
    assert describe(axis, lambda leaf: str(leaf.size)) == "4·(3 + 5)"
