"""Size provenance: where integers come from, that they arrive, and that nothing of it stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx.traceback as fx_traceback
from helpers import X, check_every_axis, look, prunable, snapshot
from torch import Tensor, nn

import graphprune
from graphprune.trace.export import Trace, trace
from graphprune.trace.provenance import (
    META_KEY,
    Attribute,
    Combined,
    Dim,
    SizeInt,
    SizeRecorder,
    get_attribute,
    preserved_annotations,
    set_attribute,
    wrap_sizes,
)


class Settings:
    """A plain settings object, recognised by what it can do."""

    def __init__(self, heads: int):
        self.heads = heads

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Sized(nn.Module):
    """24 hidden units, viewed as the body wants."""

    def __init__(self, body: Any, **attributes: Any):
        super().__init__()
        self.first, self.last = nn.Linear(7, 24), nn.Linear(24, 4)
        self.body = body
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(self, self.first(x)).sin().flatten(2))


def sizes(found: Trace, operator: str) -> list[Any]:
    """The expressions, or plain ints, among the arguments of the first node of an operator."""

    def flat(tree: Any) -> list[Any]:
        if isinstance(tree, (tuple, list)):
            return [leaf for item in tree for leaf in flat(item)]
        return [tree.expr if isinstance(tree, SizeInt) else tree] if isinstance(tree, int) else []

    node = next(n for n in found.graph.nodes if operator in str(n.target))
    args, kwargs = found.sized_args.get(node, (node.args, node.kwargs))
    return flat(args) + flat(tuple(kwargs.values()))


def traced(body: Any, **attributes: Any) -> Trace:
    return trace(Sized(body, **attributes), ((X,), {}))


HEADS, WIDTH = Attribute("", "heads"), Attribute("", "width")
FIRST, SECOND = (Attribute("", "sizes", place) for place in (0, 1))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda m, h: h.view(3, 5, m.heads, m.width), [3, 5, HEADS, WIDTH]),
        (lambda m, h: h.view(3, 5, m.heads, -1), [3, 5, HEADS, -1]),
        (lambda m, h: h.view(3, 5, 2 * m.heads, 3), [3, 5, Combined("*", 2, HEADS), 3]),
        (lambda m, h: h.view(3, 5, m.heads + 4, 3), [3, 5, Combined("+", HEADS, 4), 3]),
        (lambda m, h: h.view(3, 5, m.heads - 2, 12), [3, 5, Combined("-", HEADS, 2), 12]),
        (lambda m, h: h.view(3, 5, 24 // m.heads, 4), [3, 5, Combined("//", 24, HEADS), 4]),
        (lambda m, h: h.view(3, 5, m.sizes[1], m.sizes[0]), [3, 5, SECOND, FIRST]),
        (lambda m, h: h.view(3, 5, m.settings.heads, -1), [3, 5, Attribute("@settings", "heads"), -1]),
        (lambda m, h: h.view(3, 5, m.inner.heads, -1), [3, 5, Attribute("inner", "heads"), -1]),
    ],
    ids=["attributes", "one", "times", "plus", "minus", "divided", "tuple", "settings", "submodule"],
)  # fmt: skip
def test_where_an_integer_comes_from(body: Any, expected: list[Any]) -> None:
    inner = nn.Identity()
    inner.heads = 4
    found = traced(body, heads=4, width=6, sizes=(6, 4), settings=Settings(4), inner=inner)
    assert sizes(found, "aten.view") == expected
    assert found.escapes == []


def test_a_shape_that_is_read_is_a_dimension() -> None:
    found = traced(lambda m, h: h.view(h.shape[0], h.size(1), 4, h.size(-1) // 4))
    batch, length, literal, width = sizes(found, "aten.view")
    assert (batch.dim, length.dim, literal) == (0, 1, 4)
    assert isinstance(batch, Dim)
    assert width == Combined("//", Dim(batch.call, 0, 2), 4)


def test_shapes_of_inputs_and_weights_are_named() -> None:
    found = traced(lambda m, h: h.view(3, 5, m.last.weight.shape[1] // 6, 6))
    assert sizes(found, "aten.view")[2] == Combined("//", Dim("last.weight", 0, 1), 6)


def test_slices_and_splits_are_seen() -> None:
    found = traced(lambda m, h: torch.cat([h[..., m.cut :], h[..., : m.cut]], -1), cut=8)
    assert Attribute("", "cut") in sizes(found, "aten.slice")
    found = traced(lambda m, h: torch.cat(h.split([m.a, m.b], -1)[::-1], -1), a=4, b=20)
    assert [s for s in sizes(found, "aten.split") if isinstance(s, Attribute)] == [
        Attribute("", "a"),
        Attribute("", "b"),
    ]


@pytest.mark.parametrize(
    "scale",
    [
        lambda m: m.width**-0.5,
        lambda m: 1 / m.width,
        lambda m: m.width / 2,
        lambda m: m.width * 0.5,
        lambda m: float(m.width),
        lambda m: 2**m.width,
    ],
    ids=["root", "over", "half", "times a float", "float", "power"],
)
def test_a_size_that_becomes_a_number_escapes_and_pins(scale: Any) -> None:
    def body(m: Any, h: torch.Tensor) -> torch.Tensor:
        return h.view(*h.shape[:2], m.heads, m.width) * scale(m)

    model = Sized(body, heads=4, width=6)
    found = trace(model, ((X,), {}))
    assert [escape.expr for escape in found.escapes] == [WIDTH]
    assert "test_provenance.py:" in found.escapes[0].where
    assert list(prunable(model, X).values()) == [4]  # the heads; their width is pinned


def test_a_size_used_as_a_number_by_a_tensor_pins() -> None:
    def body(m: Any, h: torch.Tensor) -> torch.Tensor:
        return h.view(*h.shape[:2], m.heads, m.width) + m.width

    assert list(prunable(Sized(body, heads=4, width=6), X).values()) == [4]


def test_a_size_computed_when_built_is_a_constant_and_does_not_pin() -> None:
    def body(m: Any, h: torch.Tensor) -> torch.Tensor:
        return h.view(*h.shape[:2], m.heads, m.width) * m.scale

    assert list(prunable(Sized(body, heads=4, width=6, scale=6**-0.5), X).values()) == [4, 6]


def test_one_attribute_with_two_meanings_pins_what_differs() -> None:
    """``width`` sizes two axes that could shrink differently: neither may."""

    def body(m: Any, h: torch.Tensor) -> torch.Tensor:
        other = m.side(h).view(*h.shape[:2], m.heads, m.width)
        return torch.cat([h.view(*h.shape[:2], m.heads, m.width)[..., :0], other], -1) + 0 * h.sum()

    model = Sized(body, heads=4, width=6, side=nn.Linear(24, 24))
    assert 4 in prunable(model, X).values()
    assert 6 not in prunable(model, X).values()


def test_a_shared_config_is_solved_for_each_module() -> None:
    class Part(nn.Module):
        def __init__(self, settings: Settings):
            super().__init__()
            self.settings = settings
            self.up, self.down = nn.Linear(7, 24), nn.Linear(24, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).view(*x.shape[:2], self.settings.heads, -1).sin().flatten(2))

    settings = Settings(4)
    model = nn.Sequential(Part(settings), Part(settings))
    plan = graphprune.Plan(0.0, {"0.up.weight[0].0": [0, 2, 3]}, {"0.up.weight[0].0": 4})
    pruned = graphprune.compile(model, plan=plan, example_inputs=X)
    assert (pruned[0].settings.heads, pruned[1].settings.heads, settings.heads) == (3, 4, 4)


def test_ints_do_what_ints_do() -> None:
    size = SizeInt(6, WIDTH)
    assert size == 6
    assert hash(size) == hash(6)
    assert (size + 1, 1 + size, size * 2, size // 4, 13 // size, size - 1, 7 - size) == (7, 7, 12, 1, 2, 5, 1)
    assert size % 4 == 2
    assert size / 4 == 1.5
    assert size * 0.5 == 3.0
    assert size**2 == 36
    assert list(range(size)) == list(range(6))
    assert -size == -6


def test_annotations_reach_the_graph() -> None:
    """The young torch API that provenance stands on; when this fails, torch has changed it."""

    class Annotated(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with fx_traceback.annotate({META_KEY: 41}):
                y = x.sin()
            with fx_traceback.annotate({META_KEY: 42}):
                return y.cos()

    with preserved_annotations():
        program = torch.export.export(Annotated(), (X,), strict=False)
    numbers = {str(n.target): n.meta.get("custom", {}).get(META_KEY) for n in program.graph.nodes if n.op != "output"}
    assert numbers["aten.sin.default"] == 41
    assert numbers["aten.cos.default"] == 42


def test_wrapping_finds_every_integer_and_no_other_value() -> None:
    model = Sized(None, heads=4, flag=True, name="x", sizes=(6, 4), mixed=(1, "a"), settings=Settings(4), _hidden=3)
    wrap_sizes(model, SizeRecorder())
    assert type(model.heads) is SizeInt
    assert [type(size) for size in model.sizes] == [SizeInt, SizeInt]
    assert type(model.settings.heads) is SizeInt
    assert model.flag is True
    assert model.mixed == (1, "a")
    assert type(model._hidden) is int
    assert type(model.first.in_features) is SizeInt


def test_attributes_are_written_where_they_were_read() -> None:
    model = Sized(None, heads=4, sizes=(6, 4), settings=(shared := Settings(4)), other=[2, 3])
    for attribute, value in {
        Attribute("", "heads"): 3,
        Attribute("", "sizes", 1): 2,
        Attribute("", "other", 0): 9,
        Attribute("@settings", "heads"): 1,
        Attribute("first", "in_features"): 5,
    }.items():
        set_attribute(model, attribute, value)
        assert get_attribute(model, attribute) == value
    assert (model.heads, model.sizes, model.other, model.first.in_features) == (3, (6, 2), [9, 3], 5)
    assert shared.heads == 4  # the config that others may hold is copied first
    assert str(Attribute("a.b@config", "width", 2)) == "a.b@config.width[2]"


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = Sized(
        lambda m, h: h.view(*h.shape[:2], m.heads, m.width), heads=4, width=6, sizes=(1, 2), settings=Settings(4)
    ).train()
    calls: list[int] = []
    model.first.register_forward_hook(lambda *_: calls.append(1))
    unchanged = snapshot(model)
    trace(model, ((X,), {}))
    unchanged()
    assert calls == []
    assert model.first._forward_hooks
    for module in model.modules():
        for value in vars(module).values():
            assert not isinstance(value, SizeInt)
            assert not (isinstance(value, tuple) and any(isinstance(v, SizeInt) for v in value))
    assert type(model.settings.heads) is int


def test_a_trace_that_fails_leaves_the_model_as_it_was() -> None:
    model = Sized(lambda m, h: h.view(*h.shape[:2], m.heads, 5), heads=4).train()
    calls: list[int] = []
    model.first.register_forward_hook(lambda *_: calls.append(1))
    unchanged = snapshot(model)
    with pytest.raises(graphprune.GraphPruneError, match=r"could not be traced, at .*test_provenance\.py:\d+"):
        trace(model, ((X,), {}))
    unchanged()
    assert calls == []
    assert model.first._forward_hooks


class _Counted(nn.Module):
    """Compares and combines an attribute with a number that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = 4
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        found = x.nonzero().shape[0]
        torch._check(found >= self.limit - self.limit)
        rows = torch.zeros(found // self.limit + self.limit * found + found % self.limit).sum()
        return self.down(self.up(x).relu()) + rows


def test_attributes_go_together_with_numbers_that_depend_on_values() -> None:
    assert check_every_axis(_Counted(), torch.randn(3, 8)) == ["up.weight[0]"]


class _Grid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows, _columns = torch.meshgrid(torch.arange(3.0), torch.arange(8.0), indexing="ij")
        return self.down(self.up(x + rows).relu())


def test_functions_that_hand_over_to_others_are_traced() -> None:
    assert check_every_axis(_Grid(), torch.randn(3, 8)) == ["up.weight[0]"]


class _AfterPython(nn.Module):
    """A size as a number, behind a torch function that is written in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.mix = nn.Linear(8, 12), nn.Linear(12, 8), nn.Parameter(torch.randn(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        beside = torch.tensordot(x, self.mix, 1)
        return self.down(hidden * int(hidden.shape[-1])) + beside.sum()


def test_numbers_behind_functions_written_in_python_pin() -> None:
    found = look(_AfterPython(), torch.randn(3, 8))
    assert "enters the computation" in found.skipped["up.weight[0]"]
