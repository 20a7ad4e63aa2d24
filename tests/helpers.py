"""What several tests share: random weights, bitwise snapshots, and the check of every axis by itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import graphprune
from graphprune.compiler import _program
from graphprune.inspection import Inspection
from graphprune.ir.plan import Plan
from graphprune.ir.program import Options, Program
from graphprune.passes import pipelines, run_passes
from graphprune.passes.follow_sizes import follow_sizes
from graphprune.passes.replay_plan import replay_plan
from graphprune.trace.skeleton import names


class Attention(nn.Module):
    """Self-attention with its own scale; the width of a head follows from the shapes."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(((q @ k.mT) * 0.3).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = Attention(width, heads), Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm2(x))


class ToyTransformer(nn.Module):
    """Blocks of attention and MLP under ``layers``: what a transformer is, traced in a moment. Takes (3, 5, 7)."""

    def __init__(self, blocks: int = 2, width: int = 32, heads: int = 4, hidden: int = 48):
        super().__init__()
        self.stem = nn.Linear(7, width)
        self.layers = nn.ModuleList(Block(width, heads, hidden) for _ in range(blocks))
        self.head = nn.Linear(width, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def quick(values: Iterable[Any], few: Collection[Any]) -> list[Any]:
    """Parameters of a test: ``few`` of the ``values`` are run by ``make test``, all others by ``make test-slow``.

    For values that go the same way through the code; those few are of every kind there is.
    """
    found = list(values)
    assert not set(few) - set(found)
    several = [value if isinstance(value, tuple) else (value,) for value in found]
    return [
        pytest.param(*one, marks=() if value in few else pytest.mark.slow)
        for value, one in zip(found, several, strict=True)
    ]


def toy(blocks: int = 2, **sizes: int) -> ToyTransformer:
    torch.manual_seed(0)
    return randomise(ToyTransformer(blocks, **sizes)).eval()  # type: ignore[return-value]


X = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(3))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make every index of every parameter differ: fresh biases are 0 and fresh norms 1, which hides wrong slices."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape, generator=generator).to(buffer.dtype))
    return model


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Remember a model; the returned function asserts that it is bitwise the same, with the same plain attributes."""
    weights = {name: tensor.detach().clone() for name, tensor in names(model).items()}
    objects = {name: id(tensor) for name, tensor in names(model).items()}
    grads = {name: tensor.requires_grad for name, tensor in names(model).items()}
    training = {path: module.training for path, module in model.named_modules()}
    attributes = _plain_attributes(model)

    def check() -> None:
        now = names(model)
        assert list(now) == list(weights)
        assert {name: id(tensor) for name, tensor in now.items()} == objects
        assert {name: tensor.requires_grad for name, tensor in now.items()} == grads
        for name, tensor in now.items():
            assert tensor.shape == weights[name].shape
            assert bool(((tensor == weights[name]) | (tensor != tensor)).all()), f"{name} changed"
        assert {path: module.training for path, module in model.named_modules()} == training
        assert _plain_attributes(model) == attributes

    return check


def _plain_attributes(model: nn.Module) -> dict[str, Any]:
    """Every integer, and tuple or list of integers, of every module and its configs, with its exact type."""

    def of(holder: Any, owner: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in vars(holder).items():
            if isinstance(value, int) or (isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value)):
                inner = [type(v) for v in value] if isinstance(value, (tuple, list)) else []
                found[f"{owner}.{name}"] = (type(value), inner, value)
            elif hasattr(value, "to_dict") and not isinstance(value, nn.Module):
                found |= of(value, f"{owner}@{name}")
        return found

    return {key: value for path, module in model.named_modules() for key, value in of(module, path).items()}


def analyse(model: nn.Module, inputs: Any = None, *, inner_axes: bool = True, **options: Any) -> Program:
    """A program with everything up to the removal structures done."""
    program = _program(model, Options(inner_axes=inner_axes, **options), inputs)
    run_passes(program, pipelines.ANALYSE)
    return program


def plan_removing(gone: dict[str, tuple[int, list[int]]], width: bool = False, experts: bool = False) -> Plan:
    """A plan from axis name → (size, removed indices)."""
    keep = {name: [i for i in range(size) if i not in removed] for name, (size, removed) in gone.items()}
    return Plan(0.0, keep, {name: size for name, (size, _) in gone.items()}, {}, "test", width, experts=experts)


def check_every_axis(
    model: nn.Module, inputs: Any = None, *, together: bool = True, width: bool = False, experts: bool = False
) -> list[str]:
    """Remove one or two random indices of every prunable axis, one axis at a time; the oracle must hold each time.

    Sharper than a ratio: an axis that should have been pinned cannot hide behind the others. A ragged axis also loses
    other indices under every outer one. ``together`` also removes from all axes at once, through the public
    ``compile``. The names of the axes are returned.
    """
    generator = torch.Generator().manual_seed(len(list(model.parameters())))
    program = analyse(model, inputs, width=width, experts=experts)
    exact = all(parameter.dtype == torch.float64 for parameter in model.parameters())
    limit = 1e-9 if exact else 1e-4  # a model in float64 shows smaller errors than compile asks about
    sizes = {group.name: group.size for group in program.need("groups")}
    everything = Plan(0.0, width=width, experts=experts)

    def check(plan: Plan, name: str) -> None:
        run_passes(program, (replay_plan(plan), follow_sizes, *pipelines.EMIT))
        assert program.need("oracle_error") <= limit, name
        everything.keep[name], everything.sizes[name] = plan.keep[name], plan.sizes[name]
        everything.under |= plan.under

    for group in program.need("prunable"):
        how_many = group.multiple if group.multiple > 1 else 2 if group.size > 3 else 1
        how_many = min(how_many, group.size - group.minimum)

        def some(size: int = group.size, how_many: int = how_many) -> list[int]:
            return torch.randperm(size, generator=generator)[:how_many].tolist()

        check(plan_removing({group.name: (group.size, some())}, width, experts), group.name)
        outer = program.need("ragged").get(group.name)
        if outer is not None:
            rows = [sorted(set(range(group.size)) - set(some())) for _ in range(sizes[outer])]
            ragged = Plan(
                0.0,
                {group.name: rows},
                {group.name: group.size},
                width=width,
                under={group.name: outer},
                experts=experts,
            )
            check(ragged, group.name)
    if together and everything.keep:
        pruned = graphprune.compile(model, plan=everything, example_inputs=inputs)
        report = graphprune.report(pruned)
        assert report.oracle_error is not None
        assert report.oracle_error <= limit
        assert report.parameters_after < report.parameters_before
    return list(everything.keep)


def prunable(model: nn.Module, inputs: Any = None) -> dict[str, int]:
    """Name → size of every axis that may be pruned, inner factors included."""
    return {g.name: g.size for g in look(model, inputs).prunable}


def look(model: nn.Module, inputs: Any = None) -> Inspection:
    return graphprune.inspect(model, example_inputs=inputs, inner_axes=True)


def numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def save_words(model: Path, data: Path, words: int) -> None:
    """Put a tokenizer of so many words beside a model, and texts of them where tools look for their data."""
    tokens = Tokenizer(WordLevel({f"w{n}": n for n in range(words)}, unk_token="w0"))
    tokens.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(model)
    row = json.dumps({"text": " ".join(f"w{n % words}" for n in range(200))}) + "\n"
    for name in ("calib/c4.jsonl", "wikitext2/wikitext2_raw_test_rows.jsonl"):
        path = data / name
        path.parent.mkdir(parents=True)
        path.write_text(row + row)
