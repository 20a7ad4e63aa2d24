"""``emit="graph"``: what Python cannot follow is free in the graph, and the oracle proves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import X, plan_removing, quick, randomise, snapshot
from test_adversarial import BLOCKS, Wrapped
from test_architectures import build
from torch import Tensor, fx, nn

import graphprune
from graphprune import GraphPruneError
from graphprune.ir.program import Options, Program
from graphprune.passes import pipelines, run_passes
from graphprune.passes.follow_sizes import follow_sizes
from graphprune.passes.replay_plan import replay_plan


class Shaped(nn.Module):
    """7 → 24 → 4 with a body that says sizes as plain numbers."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **parts: Any):
        super().__init__()
        self.a, self.c = nn.Linear(7, 24), nn.Linear(24, 4)
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.body(self, self.a(x)))


def shaped(body: Callable[[Any, Tensor], Tensor], **parts: Any) -> Any:
    torch.manual_seed(0)
    return randomise(Shaped(body, **parts)).eval()


def remove_from_each(model: nn.Module, inputs: Any) -> dict[str, int]:
    """Remove two indices of every axis that is prunable in the graph, one axis at a time, then from all at once."""
    found = graphprune.inspect(model, example_inputs=inputs, inner_axes=True, emit="graph")
    generator = torch.Generator().manual_seed(0)
    gone = {}
    for group in found.prunable:
        removed = torch.randperm(group.size, generator=generator)[: 2 if group.size > 3 else 1].tolist()
        gone[group.name] = (group.size, removed)
        for plan in ({group.name: gone[group.name]}, gone):
            pruned = graphprune.compile(model, plan=plan_removing(plan), example_inputs=inputs, emit="graph")
            report = graphprune.report(pruned)
            assert report.oracle_error is not None
            assert report.oracle_error <= 1e-4
            assert isinstance(pruned, fx.GraphModule)
    return {name: size for name, (size, _) in gone.items()}


BODIES: dict[str, tuple[Any, list[int]]] = {
    "view": (lambda m, h: h.view(3, 5, 4, 6).sin().view(3, 5, 24), [4, 6]),
    "slice": (lambda m, h: torch.cat([h[..., 8:], h[..., :8]], -1), [8, 16]),
    "slice from the end": (lambda m, h: torch.cat([h[..., -8:], h[..., :-8]], -1), [16, 8]),
    "split": (lambda m, h: torch.cat([p * i for i, p in enumerate(h.split(8, -1))], -1), [8, 8, 8]),
    "split in given sizes": (lambda m, h: torch.cat(h.split([4, 20], -1)[::-1], -1), [4, 20]),
    "narrow": (lambda m, h: torch.cat([h.narrow(-1, 4, 20), h.narrow(-1, 0, 4)], -1), [4, 20]),
    "zeros": (lambda m, h: h + torch.zeros(24), [24]),
    "new ones": (lambda m, h: h * h.new_ones(3, 1, 24), [24]),
    "full": (lambda m, h: h * torch.full((24,), 2.0), [24]),
    "expand": (lambda m, h: h * h[..., :1].detach().mean() + h.new_ones(1).expand(24), [23]),
    "unflatten": (lambda m, h: h.unflatten(-1, (4, 6)).sin().flatten(-2), [4, 6]),
    "with the inputs": (lambda m, h: h.view(-1, 4, 6).mT.reshape(15, 6, 4).mT.reshape(3, 5, 24), [4, 6]),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_numbers_follow(name: str) -> None:
    body, sizes = BODIES[name]
    model = shaped(body)
    unchanged = snapshot(model)
    found = remove_from_each(model, X)
    unchanged()
    assert sorted(size for size in found.values() if size > 1) == sorted(n for n in sizes if n > 1), found


def test_groups_follow() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3, groups=24)
            self.norm, self.c = nn.GroupNorm(6, 24), nn.Conv2d(24, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.nn.functional.conv2d(self.a(x), self.b.weight, self.b.bias, groups=24)
            return self.c(torch.nn.functional.group_norm(h, 6, self.norm.weight, self.norm.bias))

    assert list(remove_from_each(randomise(Grouped()).eval(), torch.randn(2, 3, 9, 9)).values()) == [6]


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("attention without weights", 1),
        ("encoder, norm first", 2),
        pytest.param("transformer", 3, marks=pytest.mark.slow),
    ],
)
def test_heads_of_torchs_own_attention(name: str, heads: int) -> None:
    make, call, _ = BLOCKS[name]
    torch.manual_seed(0)
    model = randomise(Wrapped(make(), call)).eval()
    found = remove_from_each(model, X)
    assert [size for axis, size in found.items() if "in_proj" in axis].count(4) == heads


@pytest.mark.parametrize("name", quick(["gpt2", "llama_tied", "bert", "t5"], {"gpt2", "t5"}))
def test_what_is_free_in_the_module_is_free_in_the_graph(name: str) -> None:
    model = build(name)
    module, graph = (graphprune.inspect(model, inner_axes=True, emit=emit) for emit in ("module", "graph"))
    assert {g.name for g in module.prunable} <= {g.name for g in graph.prunable}
    unchanged = snapshot(model)
    pruned: Any = graphprune.compile(model, 0.2, emit="graph")
    unchanged()
    report = graphprune.report(pruned)
    assert report.emitted == "graph"
    assert "as a graph for the shapes of the example inputs only" in str(report)
    assert sum(p.numel() for p in pruned.parameters()) == report.parameters_after


def test_it_is_called_and_answers_like_the_model() -> None:
    model = build("llama_tied")
    kwargs: dict[str, Any] = {"input_ids": torch.randint(0, 211, (2, 9)), "use_cache": False}
    pruned: Any = graphprune.compile(model, 0.2, example_inputs=kwargs, emit="graph")
    same: Any = graphprune.compile(model, plan=graphprune.report(pruned).plan, example_inputs=kwargs)
    other = {**kwargs, "input_ids": torch.randint(0, 211, (2, 9))}
    found, expected = pruned(**other), same(**other)
    assert type(found) is type(expected)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    assert set(pruned.state_dict()) <= set(same.state_dict())
    found.logits.sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


def test_arguments_results_and_state() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(7, 24), nn.Linear(24, 4)
            self.register_buffer("total", torch.zeros(24))
            self.register_buffer("count", torch.zeros(()), persistent=False)

        def forward(self, x: Tensor, scale: float, *, pair: tuple[Tensor, None]) -> Any:
            self.count += 1
            h = self.a(x).view(3, 5, 4, 6).view(3, 5, 24) * scale
            self.total = self.total + h.sum((0, 1))
            return {"y": [self.c(h + self.total), None], "pair": (pair[0] * 2, 3)}

    model = randomise(Odd()).eval()
    program = Program(model, ((X, 2.0), {"pair": (X, None)}), Options(emit="graph"))
    plan = replay_plan(plan_removing({"a.weight[0].0": (4, [2])}))
    run_passes(program, (*pipelines.ANALYSE, plan, follow_sizes, *pipelines.EMIT_GRAPH))
    pruned: Any = program.need("pruned")
    assert not pruned.count
    assert not pruned.total.any()
    with torch.no_grad():
        out = pruned(X, 2.0, pair=(X, None))
    assert list(out) == ["y", "pair"]
    assert out["y"][1] is None
    assert out["pair"][1] == 3
    assert pruned.count == 1
    assert pruned.total.any()
    assert set(pruned.state_dict()) == set(model.state_dict())


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_refused() -> None:
    gated = shaped(lambda m, h: h + m.gate(m.side(h).sum()), gate=Gate(), side=nn.Linear(24, 24))
    with pytest.raises(GraphPruneError, match=r"needs all of the model in the graph; gate cannot be traced"):
        graphprune.compile(gated, 0.01, example_inputs=X, emit="graph")
    model = shaped(lambda m, h: h)
    with pytest.raises(GraphPruneError, match="emit is 'module'"):
        graphprune.compile(model, 0.1, example_inputs=X, emit="onnx")
    with pytest.raises(GraphPruneError, match="inplace is for"):
        graphprune.compile(model, 0.1, example_inputs=X, emit="graph", inplace=True)


def test_a_graph_is_not_saved_as_a_model(tmp_path: Any) -> None:
    pruned = graphprune.compile(shaped(lambda m, h: h), 0.1, example_inputs=X, emit="graph")
    with pytest.raises(GraphPruneError, match="keep its state_dict"):
        graphprune.save(pruned, tmp_path / "model")
