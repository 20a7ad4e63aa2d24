"""Tracing equal blocks once gives the graph that tracing all of them gives."""

from __future__ import annotations

import pytest
import torch
from helpers import check_every_axis
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import graphprune
from graphprune.passes import trace_model as trace_pass
from graphprune.trace import export
from graphprune.trace.export import trace
from graphprune.trace.fold_blocks import Counter, Folder, Run, _runs
from graphprune.trace.inputs import example_inputs_for


class Block(nn.Module):
    def __init__(self, number: int, width: int = 8, hidden: int = 12):
        super().__init__()
        self.number = number
        self.heads = 4
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x, offset):
        y = self.up(x).relu()
        y = y.view(*y.shape[:-1], self.heads, -1).flatten(-2)
        return x + self.down(y) + offset, None


class LooksAtItsNumber(Block):
    def forward(self, x, offset):
        x, none = super().forward(x, offset)
        return (x if self.number % 2 else x.tanh()), none


class WritesIntoItsInput(Block):
    def forward(self, x, offset):
        offset.add_(1.0)
        return super().forward(x, offset)


class Deep(nn.Module):
    def __init__(self, kind=Block, depth=5, hidden=12):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(kind(i, hidden=hidden) for i in range(depth))
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        offset = x.mean(0, keepdim=True).clone()
        for block in self.blocks:
            x, _ = block(x, offset)
        return self.last(x)


X = torch.randn(5, 7, 6)


def targets(trace) -> list:
    """The operators of a graph in order, without the borders of blocks."""
    skip = (torch.ops.graphprune.enter.default,)
    found = []
    for node in trace.graph.nodes:
        if node.target in skip or "getitem" in str(node.target):
            continue
        found.append((str(node.target) if node.op == "call_function" else node.name, export.module_path(node)))
    return found


def both(model, inputs):
    return export.trace(model, inputs), export.trace(model, inputs, fold=False)


def test_the_graph_is_the_same_and_blocks_were_folded():
    model = Deep()
    folded, full = both(model, ((X,), {}))
    assert targets(folded) == targets(full)
    borders = [n for n in folded.graph.nodes if n.target is torch.ops.graphprune.enter.default]
    assert [n.args[1] for n in borders] == [f"blocks.{i}" for i in range(5)]


def without_folding(monkeypatch):
    monkeypatch.setattr(trace_pass, "trace", lambda model, inputs: export.trace(model, inputs, fold=False))


@pytest.mark.parametrize("name", ["deep", "llama", "qwen2", "sequential"])
def test_everything_downstream_is_the_same(name, monkeypatch):
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 101,
    }
    model = {
        "deep": lambda: Deep(),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**settings)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**settings)),
        "sequential": lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            *(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(4)),
        ),
    }[name]()
    inputs = {"deep": X, "sequential": torch.randn(5, 3, 7, 7)}.get(name)
    text, pruned = str(graphprune.inspect(model, example_inputs=inputs)), None
    pruned = graphprune.compile(model, 0.2, example_inputs=inputs, method="random")
    without_folding(monkeypatch)
    assert str(graphprune.inspect(model, example_inputs=inputs)) == text
    other = graphprune.compile(model, 0.2, example_inputs=inputs, method="random")
    assert graphprune.report(other).plan == graphprune.report(pruned).plan
    assert graphprune.report(other).attributes == graphprune.report(pruned).attributes
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", [LooksAtItsNumber, WritesIntoItsInput])
def test_blocks_that_only_seem_equal_are_traced_in_full(kind):
    folded, full = both(Deep(kind), ((X,), {}))
    assert not [n for n in folded.graph.nodes if n.target is torch.ops.graphprune.enter.default]
    assert targets(folded) == targets(full)
    graphprune.compile(Deep(kind), 0.2, example_inputs=X)


def test_blocks_of_other_sizes_or_with_shared_weights_are_no_run():
    model = Deep()
    assert list(_runs("blocks", model.blocks, set())) == [Run([f"blocks.{i}" for i in range(5)], [("", "number")])]
    model.blocks[2].up = nn.Linear(8, 16)
    model.blocks[4].heads = 2
    (run,) = _runs("blocks", model.blocks, set())
    assert run.paths == ["blocks.0", "blocks.1", "blocks.3"]
    tied = Deep()
    for block in tied.blocks[1:]:
        block.up = tied.blocks[0].up
    folder = Folder()
    folder.copy_structure(tied)
    assert folder.runs == []
    graphprune.compile(tied, 0.2, example_inputs=X)


class ReadsAWeight(Deep):
    def forward(self, x):
        return super().forward(x) + self.blocks[3].up.weight.sum()


class LooksForAModule(Deep):
    def forward(self, x):
        up = getattr(self.blocks[3], "up", None)
        return super().forward(x) + (0.0 if up is None else up.bias.sum())


class SumsAllParameters(Deep):
    def forward(self, x):
        return super().forward(x) + sum((p * p).sum() for p in self.parameters())


class CountsChildren(Deep):
    def forward(self, x):
        return super().forward(x) * len(list(self.blocks[3].children()))


class HoldsModules(Deep):
    def __init__(self):
        super().__init__()
        self.held = [block.up for block in self.blocks]

    def forward(self, x):
        return super().forward(x) + self.held[3](self.first(x)).sum()


@pytest.mark.parametrize("kind", [ReadsAWeight, LooksForAModule, SumsAllParameters, CountsChildren, HoldsModules])
def test_repeated_blocks_that_are_looked_into_are_traced_in_full(kind):
    folded, full = both(kind(), ((X,), {}))
    assert not [n for n in folded.graph.nodes if n.target is torch.ops.graphprune.enter.default]
    assert targets(folded) == targets(full)


class ReadsAnAttribute(Deep):
    def forward(self, x):
        return super().forward(x) * self.blocks[3].heads


class MaybeOffset(Block):
    def forward(self, x, offset):
        return super().forward(x, 0.0 if offset is None else offset)


class CallsTheFirstOtherwise(Deep):
    def __init__(self):
        super().__init__(MaybeOffset)

    def forward(self, x):
        x, offset = self.first(x), None
        for block in self.blocks:
            x, _ = block(x, offset)
            offset = x.mean(0, keepdim=True)
        return self.last(x)


class CallsAllTwice(Deep):
    def forward(self, x):
        x = self.first(x)
        offset = x.mean(0, keepdim=True)
        for block in (*self.blocks, *self.blocks):
            x, _ = block(x, offset)
        return self.last(x)


class ChangesAnInputBetween(Deep):
    def forward(self, x):
        x = self.first(x)
        offset = x.mean(0, keepdim=True)
        for block in self.blocks:
            x, _ = block(x, offset)
            offset.mul_(0.5)
        return self.last(x)


@pytest.mark.parametrize("kind", [ReadsAnAttribute, CallsTheFirstOtherwise, CallsAllTwice, ChangesAnInputBetween])
def test_however_blocks_are_called_the_graph_is_the_same(kind):
    folded, full = both(kind(), ((X,), {}))
    calls = [n.args[1] for n in folded.graph.nodes if n.target is torch.ops.graphprune.enter.default]
    assert calls == [f"blocks.{i}" for i in range(5)] * (len(calls) // 5)
    assert len(calls) >= 5
    assert targets(folded) == targets(full)
    assert inputs_of_all(folded) == inputs_of_all(full)


def inputs_of_all(trace) -> list[list[int]]:
    """Of every operator the places of those whose outputs it takes, without the borders of blocks."""
    place, source = {}, {}
    found = []
    for node in trace.graph.nodes:
        if node.target is torch.ops.graphprune.enter.default:
            continue
        if "getitem" in str(node.target) and node.args[0].target is torch.ops.graphprune.enter.default:
            source[node] = node.args[0].args[0][node.args[1]]
            source[node] = source.get(source[node], source[node])
            continue
        place[node] = len(place)
        found.append([place[source.get(n, n)] for n in node.all_input_nodes])
    return found


def test_the_weights_of_repeated_blocks_are_no_inputs_of_the_export(monkeypatch):
    seen = []

    def export_seen(*args, **kwargs):
        program = true(*args, **kwargs)
        seen.append(sum(n.op == "placeholder" for n in program.graph.nodes))
        return program

    true = torch.export.export
    monkeypatch.setattr(torch.export, "export", export_seen)
    traces = [export.trace(Deep(depth=depth), ((X,), {})) for depth in (5, 50)]
    assert seen[0] == seen[1]
    assert [len(trace.tensor_names) for trace in traces] == [4 + 4 * depth for depth in (5, 50)]


def test_a_counter_notices_being_looked_at():
    for look in (lambda n: n + 1, lambda n: n == 1, lambda n: [5, 6][n], lambda n: {1: 2}[n], bool, str, float):
        Counter.looked_at = False
        look(Counter(1))
        assert Counter.looked_at


def test_depth_costs_little():
    """Four times the depth makes four times the nodes from one traced block."""
    nodes = {}
    for depth in (4, 16):
        config = LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=depth, num_attention_heads=4, vocab_size=101
        )
        model = LlamaForCausalLM(config)
        inputs = example_inputs_for(model, torch.device("cpu"), torch.float32)
        found = export.trace(model, inputs)
        made = [n for n in found.graph.nodes if n.target is torch.ops.graphprune.enter.default]
        assert len(made) == depth
        nodes[depth] = sum(n.op == "call_function" for n in found.graph.nodes)
    per_block = (nodes[16] - nodes[4]) / 12
    assert per_block == int(per_block)


class _Converted(nn.Module):
    """Converts what every block returns to the dtype it has: the same tensor under a new name in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [block(x).to(x.dtype) for block in self.blocks]
        return self.head(torch.stack(outputs).prod(0))


def test_outputs_that_are_renamed_behind_a_block_stay_its_own() -> None:
    torch.manual_seed(0)
    model = _Converted()
    folded, full = (trace(model, ((torch.randn(3, 8),), {}), fold=fold) for fold in (True, False))
    assert sum(n.target is torch.ops.aten.linear.default for n in full.graph.nodes) == 4
    linears = [n for n in folded.graph.nodes if n.target is torch.ops.aten.linear.default][:3]
    conversions = [n for n in folded.graph.nodes if n.target is torch.ops.aten.to.dtype]
    assert [n.args[0] for n in conversions] == linears
    check_every_axis(model, torch.randn(3, 8))
