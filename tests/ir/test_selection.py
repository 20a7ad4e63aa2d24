"""Slices and masks of tensors with ragged axes, against the same done on a tensor with one dimension per leaf."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphprune.ir.axes import Axis, concat, find, product
from graphprune.ir.selection import Kept, Selection, index_of, mask_of, sum_by_pair
from graphprune.passes.rewrite import sliced, sliced_shape

SIZES = {"outer": 3, "mid": 4, "inner": 5, "free": 2, "whole": 3}
LEAVES = list(SIZES)


def rows(draw: st.DrawFn, size: int, count: int, outer: int | None) -> torch.Tensor:
    def one() -> list[int]:
        return sorted(draw(st.permutations(range(size)))[:count])

    return torch.tensor(one() if outer is None else [one() for _ in range(outer)])


Layout = tuple[list[list[str]], dict[str, Axis], Selection]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """The leaves in any order and in any dimensions; inner is ragged under mid, mid perhaps under outer."""
    axes = {name: Axis(size) for name, size in SIZES.items()}
    order = list(draw(st.permutations(LEAVES)))
    cuts = sorted(draw(st.sets(st.integers(1, len(order) - 1))))
    dims = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    selection = {axes["inner"]: Kept(5, rows(draw, 5, draw(st.integers(1, 4)), 4), axes["mid"])}
    if draw(st.booleans()):
        outer = draw(st.sampled_from([None, "outer"]))
        kept = rows(draw, 4, draw(st.integers(1, 3)), 3 if outer else None)
        selection[axes["mid"]] = Kept(4, kept, axes[outer] if outer else None)
    if draw(st.booleans()):
        selection[axes["free"]] = Kept(2, rows(draw, 2, 1, None))
    return dims, axes, selection


def logical(axes: dict[str, Axis], selection: Selection, x: torch.Tensor) -> torch.Tensor:
    """``x`` with one dimension per leaf in the order of SIZES, sliced leaf by leaf, the innermost first."""
    for name in ("inner", "mid", "free"):
        kept = selection.get(axes[name])
        if kept is None:
            continue
        place = LEAVES.index(name)
        if kept.outer is None:
            x = x.index_select(place, kept.indices)
            continue
        above = next(LEAVES.index(other) for other in axes if axes[other] is kept.outer)
        slabs = [slab.index_select(place, one) for slab, one in zip(x.split(1, above), kept.indices, strict=True)]
        x = torch.cat(slabs, above)
    return x


def laid_out(x: torch.Tensor, dims: list[list[str]]) -> torch.Tensor:
    """A tensor with one dimension per leaf as one with the dimensions of ``dims``."""
    x = x.permute([LEAVES.index(name) for dim in dims for name in dim])
    places = iter(x.shape)
    return x.reshape([math.prod(next(places) for _ in dim) for dim in dims])


def expressions(dims: list[list[str]], axes: dict[str, Axis]) -> list[Axis]:
    return [product(axes[name] for name in dim) for dim in dims]


def cut(x: torch.Tensor, dims: list[Axis], selection: Selection) -> torch.Tensor:
    found = {dim: index_of(dims, dim, selection) for dim in range(len(dims))}
    keep = {dim: index for dim, index in found.items() if index is not None}
    out = sliced(x, keep)
    assert list(out.shape) == sliced_shape(x, keep)
    return out


@given(layouts())
def test_slices_in_any_layout(layout: Layout) -> None:
    dims, axes, selection = layout
    x = torch.arange(math.prod(SIZES.values())).view(list(SIZES.values()))
    found = cut(laid_out(x, dims), expressions(dims, axes), selection)
    assert torch.equal(found, laid_out(logical(axes, selection, x), dims))


@given(layouts())
def test_masks_keep_what_slices_keep(layout: Layout) -> None:
    dims, axes, selection = layout
    x = laid_out(torch.arange(math.prod(SIZES.values())).view(list(SIZES.values())), dims)
    kept = torch.ones_like(x, dtype=torch.bool)
    for dim in range(len(dims)):
        mask = mask_of(expressions(dims, axes), dim - len(dims), selection)
        if mask is not None:
            assert mask.ndim == x.ndim
            kept &= mask
    assert torch.equal(x[kept].sort().values, cut(x, expressions(dims, axes), selection).flatten().sort().values)


@given(layouts())
def test_sums_by_pair_in_any_layout(layout: Layout) -> None:
    dims, axes, _ = layout
    x = torch.arange(float(math.prod(SIZES.values()))).view(list(SIZES.values()))
    expected = x.sum([i for i, name in enumerate(LEAVES) if name not in ("mid", "inner")])
    holds = {name: place for place, dim in enumerate(dims) for name in dim}
    stay = {holds["mid"], holds["inner"]}
    others = [d for d in range(len(dims)) if d not in stay]
    values = laid_out(x, dims)
    values = values.sum(others, keepdim=True) if others else values
    found = sum_by_pair(expressions(dims, axes), holds["inner"], axes["inner"], axes["mid"], values)
    assert torch.equal(found, expected)


@given(st.data())
def test_the_parts_of_a_concat_are_cut_each_by_itself(data: st.DataObject) -> None:
    """A fused projection ``heads·qk + heads·qk + heads·v``."""
    heads, qk, v = Axis(3), Axis(4), Axis(5)
    fused = concat([product([heads, qk]), product([heads, qk]), product([heads, v])])
    selection = {
        qk: Kept(4, rows(data.draw, 4, 2, 3), heads),
        v: Kept(5, rows(data.draw, 5, 3, 3), heads),
        heads: Kept(3, rows(data.draw, 3, 2, None)),
    }
    q, k = torch.arange(12).view(3, 4), torch.arange(12, 24).view(3, 4)
    values = torch.arange(24, 39).view(3, 5)
    expected = [
        torch.stack([part[h][kept.indices[h]] for h in selection[heads].indices]).flatten()
        for part, kept in ((q, selection[qk]), (k, selection[qk]), (values, selection[v]))
    ]
    x = torch.cat([q.flatten(), k.flatten(), values.flatten()])
    assert torch.equal(cut(x, [fused], selection), torch.cat(expected))
    mask = mask_of([fused], 0, selection)
    assert mask is not None
    assert torch.equal(x[mask], torch.cat(expected))


@given(layouts())
def test_the_same_choice_everywhere_is_a_shared_choice(
    layout: Layout,
) -> None:
    dims, axes, _ = layout
    once = torch.tensor([0, 2, 3])
    x = laid_out(torch.arange(math.prod(SIZES.values())).view(list(SIZES.values())), dims)
    ragged, shared = ({axes["inner"]: kept} for kept in (Kept(5, once.expand(4, 3), axes["mid"]), Kept(5, once)))
    assert torch.equal(*(cut(x, expressions(dims, axes), selection) for selection in (ragged, shared)))


def test_what_keeps_everything_is_not_looked_at() -> None:
    dims = [product([Axis(2), Axis(3)]), Axis(4)]
    other = Axis(5)
    selection = {other: Kept(5, torch.tensor([1]))}
    assert index_of(dims, 0, selection) is None
    assert mask_of(dims, 1, selection) is None


def test_an_outer_axis_that_is_missing_is_a_bug_that_shows() -> None:
    outer, inner = Axis(2), Axis(3)
    with pytest.raises(AssertionError, match="without its outer"):
        index_of([find(inner)], 0, {inner: Kept(3, torch.tensor([[0], [1]]), outer)})
