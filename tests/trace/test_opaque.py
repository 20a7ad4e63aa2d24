"""Modules that cannot be traced are left whole; the rest of the model is pruned around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import X, check_every_axis, look, randomise, snapshot
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError
from graphprune.trace.export import trace


class Gate(nn.Module):
    """A layer whose ``kind`` of body looks at values."""

    def __init__(self, kind: str, width: int = 16):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.kind = kind
        self.calls = 0

    def forward(self, x: Tensor, scale: float = 2) -> Any:
        self.calls += 1
        if self.kind == "overwrites":
            x.add_(1)
        return getattr(self, self.kind)(self.linear(x), scale)

    def branch(self, h: Tensor, scale: float) -> Tensor:
        return h * scale if h.sum() > 0 else -h

    def loop(self, h: Tensor, scale: float) -> Tensor:
        for value in h.mean((0, 1)).tolist():
            h = h + (value if value > 0 else 2)
        return h

    def mask(self, h: Tensor, scale: float) -> Any:
        out = torch.zeros_like(h)
        if (h > 0).any():
            out[h > 0] = h[h > 0] * scale
        return out, {"count": 3, "given": h}

    def unique(self, h: Tensor, scale: float) -> Tensor:
        return h * len(torch.unique(h.round()))

    def numpy(self, h: Tensor, scale: float) -> Tensor:
        return torch.from_numpy(h.numpy() * scale).to(h)

    def plain(self, h: Tensor, scale: float) -> Tensor:
        return h * scale

    def overwrites(self, h: Tensor, scale: float) -> Tensor:
        return h * scale if h.sum() > 0 else -h

    def fails(self, h: Tensor, scale: float) -> Tensor:
        raise RuntimeError("out of luck")


class Layer(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(16, 24), nn.Linear(24, 16), Gate(kind)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(self.down(self.up(x).relu()))
        return x + (y[0] + y[1]["given"] if isinstance(y, tuple) else y)


class Net(nn.Module):
    def __init__(self, *kinds: str):
        super().__init__()
        self.first, self.last = nn.Linear(7, 16), nn.Linear(16, 3)
        self.layers = nn.Sequential(*(Layer(kind) for kind in kinds))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(self.first(x)))


def net(*kinds: str) -> Any:
    torch.manual_seed(0)
    return randomise(Net(*kinds)).eval()


@pytest.mark.parametrize("kind", ["branch", "loop", "mask", "unique", "numpy"])
def test_the_rest_is_pruned_and_the_gate_is_whole(kind: str) -> None:
    model = net(kind)
    unchanged = snapshot(model)
    found = look(model, X)
    assert [group.name for group in found.prunable] == ["layers.0.up.weight[0]"]
    (told,) = found.unruled
    assert told.startswith("module layers.0.gate cannot be traced; the 272 numbers it holds are pinned")
    assert "test_opaque.py:" in told
    assert "inside a module that cannot be traced" in found.skipped["layers.0.gate.linear.weight[0]"]
    check_every_axis(model, X)
    pruned: Any = graphprune.compile(model, 0.2, example_inputs=X)
    unchanged()
    assert torch.equal(pruned.layers[0].gate.linear.weight, model.layers[0].gate.linear.weight)
    assert pruned.layers[0].gate.calls == 0


def test_only_the_modules_that_need_it_are_opaque() -> None:
    found = trace(net("plain", "branch", "plain", "plain"), ((X,), {}))
    assert list(found.opaque.why) == ["layers.1.gate"]
    targets = [str(node.target) for node in found.graph.nodes]
    assert targets.count("graphprune.opaque.default") == 1


def test_the_second_of_a_kind_makes_all_of_it_opaque() -> None:
    model = net("plain", "branch", "branch", "branch")
    assert set(trace(model, ((X,), {})).opaque.why) == {f"layers.{i}.gate" for i in range(4)}
    check_every_axis(model, X)


def test_a_module_called_twice_is_two_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate, self.last = nn.Linear(7, 16), Gate("branch"), nn.Linear(16, 30)
            self.end = nn.Linear(30, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.gate(self.first(x))
            return self.end(self.last(h + self.gate(h[:, :2], scale=3).sum(1, keepdim=True)))

    model = randomise(Twice()).eval()
    assert len(trace(model, ((X,), {})).opaque.calls) == 2
    assert check_every_axis(model, X) == ["last.weight[0]"]


def test_a_size_that_goes_in_is_a_number() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate, self.last = nn.Linear(7, 24), Gate("branch", 7), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(h) + self.gate(x, h.shape[-1]).mean()

    assert check_every_axis(randomise(Sized()).eval(), X) == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: net("fails"), "out of luck"),
        (lambda: nn.Sequential(Gate("branch", 7), nn.Linear(7, 3)), "most parameters are inside"),
        (lambda: Gate("branch", 7), "from the values of a tensor"),
        (
            lambda: net("overwrites"),
            r"layers\.0\.gate cannot be left out of the graph either: it writes into its inputs",
        ),
    ],
)
def test_refused(model: Any, message: str) -> None:
    model = model().eval()
    unchanged = snapshot(model)
    with pytest.raises(GraphPruneError, match=message):
        graphprune.inspect(model, example_inputs=X)
    unchanged()


def test_without_weights_there_is_nothing_to_run() -> None:
    with torch.device("meta"):
        model = Net("branch").eval()
    with pytest.raises(GraphPruneError, match="no real weights to run it with"):
        graphprune.inspect(model, example_inputs=X.to("meta"))


def test_another_call_while_tracing_is_told() -> None:
    class Masked(Gate):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
            if mask is not None and mask.shape != x.shape:
                raise ValueError("a mask of another size")
            return super().forward(x)

    class Sneaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate, self.last = nn.Linear(7, 16), Masked("branch"), nn.Linear(16, 30)
            self.end = nn.Linear(30, 3)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(1) if torch.compiler.is_exporting() else None
            return self.end(self.last(self.gate(self.first(x), mask)))

    with pytest.raises(GraphPruneError, match=r"module gate cannot be traced, and fails .* a mask of another size"):
        graphprune.compile(randomise(Sneaky()).eval(), 0.2, example_inputs=X)
