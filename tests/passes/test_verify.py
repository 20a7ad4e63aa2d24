"""The oracle can fail: rules broken on purpose are caught, and the model is then as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import analyse, check_every_axis, plan_removing, randomise, snapshot
from torch import nn

import graphprune
from graphprune import GraphPruneError
from graphprune.passes import run_passes
from graphprune.passes.follow_sizes import follow_sizes
from graphprune.passes.replay_plan import replay_plan
from graphprune.passes.verify import largest_difference, masked_outputs, model_outputs
from graphprune.rules import registry

aten = torch.ops.aten
X = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Between(nn.Module):
    """``first → body → last``."""

    def __init__(self, body: Callable[[Any, torch.Tensor], torch.Tensor], **parts: Any):
        super().__init__()
        self.first = nn.Linear(7, 24)
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)
        self.last = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(self, self.first(x)))


def between(body: Callable[[Any, torch.Tensor], torch.Tensor], **parts: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Between(body, **parts)).double().eval()


def passes_through(r: Any, x: Any, *options: Any, **more: Any) -> Any:
    """The lie: nothing is pinned."""
    return x


def keeps_first(r: Any, x: Any, *options: Any, **more: Any) -> Any:
    """The lie of a reduction: the dimension is gone and nobody cares."""
    return (*x[:-1], r.fresh(1))


def broken_layer_norm(r: Any, x: Any, shape: Any, weight: Any, bias: Any, *options: Any) -> Any:
    for tensor in (weight, bias):
        r.same(x[-1], tensor[0])
    for size in shape:
        r.size(size, x[-1])
    return x


def broken_linear(r: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    """A bias that nobody told about its rows: it is not sliced with them."""
    r.same(x[-1], weight[1])
    r.contract(0, -1, weight=(1, 1))
    return (*x[:-1], weight[0])


def broken_reshape(r: Any, x: Any, shape: Any, *options: Any) -> Any:
    """``view(…, heads, width)`` read the wrong way round: the factors swapped."""
    from graphprune.ir.axes import Axis, product

    if len(shape) == 4:
        inner, outer = Axis(6), Axis(4)
        r.same(x[-1], product([inner, outer]))
        return (*x[:-1], outer, inner)
    return (*x[:2], product([x[3], x[2]]))


def broken_glu(r: Any, x: Any, dim: int = -1) -> Any:
    """Both halves free of each other."""
    from graphprune.rules.views import cut_at

    first, _ = cut_at(r, x[dim], x[dim].size // 2)
    return (*x[:-1], first)


def constant_arange(r: Any, size: Any, **more: Any) -> Any:
    """As if every index had the same value."""
    axis = r.fresh(int(size))
    r.size(size, axis)
    return (axis,)


BROKEN: dict[str, tuple[Any, Any, Callable[[], nn.Module]]] = {
    "softmax": (aten.softmax, passes_through, lambda: between(lambda m, h: h.softmax(-1))),
    "layer_norm": (
        aten.layer_norm,
        broken_layer_norm,
        lambda: between(lambda m, h: m.norm(h), norm=nn.LayerNorm(24)),
    ),
    "mean": (aten.mean, keeps_first, lambda: between(lambda m, h: h + h.mean(-1, keepdim=True))),
    "amax": (aten.amax, keeps_first, lambda: between(lambda m, h: h + h.amax(-1, keepdim=True))),
    "sum that is not masked": (aten.sum, keeps_first, lambda: between(lambda m, h: h.exp() / h.exp().sum(-1, True))),
    "cumsum": (aten.cumsum, passes_through, lambda: between(lambda m, h: h.cumsum(-1))),
    "flip": (aten.flip, passes_through, lambda: between(lambda m, h: h.flip(-1))),
    "sort": (aten.sort, lambda r, x, *o: [x, x], lambda: between(lambda m, h: h.sort(-1).values)),
    "linear without its bias": (aten.linear, broken_linear, lambda: between(lambda m, h: h.relu())),
    "view with swapped factors": (
        aten.view.default,
        broken_reshape,
        lambda: between(
            lambda m, h: h.view(3, 5, m.heads, m.width).relu().view(3, 5, m.heads * m.width), heads=4, width=6
        ),
    ),
    "arange": (
        aten.arange,
        constant_arange,
        lambda: between(lambda m, h: h + torch.arange(h.shape[-1])),
    ),
}


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_caught(name: str, inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, lie, make = BROKEN[name]
    model = make()
    check_every_axis(model, X)  # the true rules are sound
    overloads = [getattr(operator, o) for o in operator.overloads()] if hasattr(operator, "overloads") else []
    for target in (operator, *overloads):
        monkeypatch.setitem(registry._RULES, target, lie)
    unchanged = snapshot(model)
    with pytest.raises(GraphPruneError, match=r"does not compute what the masked original computes|does not run"):
        graphprune.compile(model, 0.4, example_inputs=X, method="random", inplace=inplace)
    unchanged()


def test_without_verify_a_broken_rule_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lie above is one that only the oracle sees: nothing else stops it."""
    model = between(lambda m, h: h.softmax(-1))
    for target in (aten.softmax, aten.softmax.int):
        monkeypatch.setitem(registry._RULES, target, passes_through)
    graphprune.compile(model, 0.4, example_inputs=X, method="random", verify=False)


def test_a_model_in_float64_is_held_to_rounding_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a millionth is far from rounding where everything is computed in float64."""
    model = between(lambda m, h: h + 1e-5 * h.mean(-1, keepdim=True))
    for target in (aten.mean, aten.mean.dim):
        monkeypatch.setitem(registry._RULES, target, keeps_first)
    with pytest.raises(GraphPruneError, match="does not compute what the masked original computes"):
        graphprune.compile(model, 0.4, example_inputs=X, method="random")


def test_a_size_that_did_not_follow_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = between(lambda m, h: h.view(3, 5, m.heads, m.width).relu().flatten(2), heads=4, width=6)
    unchanged = snapshot(model)
    monkeypatch.setattr(registry.Rule, "size", lambda self, value, axis: self.harmless(value))
    with pytest.raises(GraphPruneError, match="A size in its code did not follow"):
        graphprune.compile(model, 0.4, example_inputs=X)
    unchanged()


def planned(model: nn.Module, gone: dict[str, tuple[int, list[int]]]) -> Any:
    program = analyse(model, X)
    run_passes(program, (replay_plan(plan_removing(gone)), follow_sizes))
    return program


def test_the_masked_original_is_zeroed_consumer_columns() -> None:
    """Against an oracle made by hand: the removed columns of the consumer weight are set to 0."""
    model = between(lambda m, h: h.sigmoid())
    masked = masked_outputs(planned(model, {"first.weight[0]": (24, [2, 9])}), torch.float64)
    with torch.no_grad():
        model.last.weight[:, [2, 9]] = 0
        assert torch.allclose(masked[0], model(X), rtol=1e-12)


def test_the_masked_original_masks_a_contraction_without_weights() -> None:
    """q·kᵀ over removed channels: the operand is masked, so the sum runs over what is left."""

    def body(m: Any, h: torch.Tensor) -> torch.Tensor:
        q, k = h.exp(), m.k(h).exp()
        return h.softmax(1) + (q @ k.mT).mean(-1, keepdim=True)

    model = between(body, k=nn.Linear(24, 24, bias=False))
    program = planned(model, {"first.weight[0]": (24, [0, 7])})
    masked = masked_outputs(program, torch.float64)[0]
    keep = torch.ones(24, dtype=torch.float64)
    keep[[0, 7]] = 0
    with torch.no_grad():
        h = model.first(X)
        k = nn.functional.linear(h * keep, model.k.weight).exp()
        by_hand = model.last((h.softmax(1) + ((h.exp() * keep) @ k.mT).mean(-1, keepdim=True)) * keep)
    assert torch.allclose(masked, by_hand, rtol=1e-10)


def test_a_removed_nan_does_not_leak() -> None:
    """Removed indices are set to 0, not multiplied by it: 0 · inf is no zero."""
    model = between(lambda m, h: (h * m.huge).exp(), huge=nn.Parameter(torch.ones(24)))
    with torch.no_grad():
        model.huge[3] = 1e300
    name = next(g.name for g in graphprune.inspect(model, example_inputs=X).prunable)
    pruned = graphprune.compile(model, plan=plan_removing({name: (24, [3])}), example_inputs=X)
    assert torch.isfinite(pruned(X)).all()


def test_the_mode_is_restored_and_hooks_are_silent() -> None:
    model = between(lambda m, h: nn.functional.dropout(h, 0.5, m.training)).train()
    calls: list[int] = []
    model.first.register_forward_hook(lambda *_: calls.append(1))
    program = planned(model, {"first.weight[0]": (24, [1])})
    first, second = (model_outputs(program, model, torch.float32, {})[0] for _ in range(2))
    assert torch.equal(first, second)  # eval mode: no dropout
    assert model.training
    assert calls == []


@pytest.mark.filterwarnings("error")
def test_outputs_may_ask_for_gradients() -> None:
    assert largest_difference([torch.ones(2, requires_grad=True)], [torch.ones(2, requires_grad=True)]) == 0


def test_the_difference_is_relative_to_the_largest_output() -> None:
    a, b = torch.tensor([1.0, 100.0]), torch.tensor([1.5, 100.0])
    assert largest_difference([a], [b]) == pytest.approx(0.005)
    assert largest_difference([a], [a.clone()]) == 0


@pytest.mark.parametrize(
    "other",
    [[torch.zeros(3)], [], [torch.zeros(2), torch.zeros(2)], [torch.tensor([float("nan"), 0.0])]],
    ids=["shape", "none", "more", "nan"],
)
def test_other_shapes_and_nan_are_infinitely_far(other: list[torch.Tensor]) -> None:
    assert largest_difference(other, [torch.ones(2)]) == float("inf")


def test_integer_outputs_must_be_equal() -> None:
    assert largest_difference([torch.tensor([4])], [torch.tensor([5])]) == 1.0


class OtherWhenTraced(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(7, 24), nn.Linear(24, 4)

    def forward(self, x):
        h = self.first(x)
        return self.last(h.relu() if torch.compiler.is_exporting() else h.sin())


def test_a_graph_that_is_not_the_model_is_told_from_a_wrong_rule() -> None:
    with pytest.raises(GraphPruneError, match="before anything is removed"):
        graphprune.compile(randomise(OtherWhenTraced()).double(), 0.3, example_inputs=X)
