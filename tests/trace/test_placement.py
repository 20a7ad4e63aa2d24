"""Weights that come to the device: checked with tensors of a device that need not be there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import graphprune
from graphprune.trace.placement import Placed, _largest_block, placed

META = torch.device("meta")
SIZES = {"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 40}


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_block_comes_once_for_all_that_run_through_it() -> None:
    model, block = Blocks(), 4 * (2 * 8 * 16 + 8 + 16)
    assert _largest_block(model) == block
    x = torch.zeros(2, 8, device=META)
    with torch.no_grad(), Placed(META, block) as mode:
        model(x)
        assert mode.moved == 3 * block
        model(x)
        assert mode.moved == 6 * block  # the last block went through the room of one, the first is gone
        for _ in range(3):
            model.layers[0](x)
        assert mode.moved == 7 * block
    assert all(p.device.type == "cpu" for p in model.parameters())


class NeverMixed(TorchDispatchMode):
    """Refuses operators whose operands are on different devices; a single number may come from anywhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
        if len({t.device for t in found}) > 1 and func is not torch.ops.aten.copy_.default:
            raise AssertionError(f"{func} meets {[t.device.type for t in found]}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "config"), [(LlamaForCausalLM, LlamaConfig), (BertModel, BertConfig)])
def test_nothing_meets_on_two_devices(kind: type, config: type) -> None:
    model = kind(config(**SIZES)).eval()
    ids = torch.zeros(2, 5, dtype=torch.long, device=META)
    with pytest.raises(AssertionError, match="embedding"), torch.no_grad(), NeverMixed():
        model(ids)
    with torch.no_grad(), placed(model, META), NeverMixed():
        out = model(ids)[0]
    assert out.device == META
    assert {p.device.type for p in model.parameters()} == {"cpu"}


class Pretended(Placed):
    """Takes the weights of a model for being elsewhere."""

    def __init__(self, model: nn.Module):
        super().__init__(torch.device("cpu"), _largest_block(model))
        self._weights = {id(p) for p in model.parameters()}

    def _is_here(self, tensor: torch.Tensor) -> bool:
        return id(tensor) not in self._weights

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return super()._copy(tensor).clone()


@pytest.mark.parametrize(
    ("method", "module"),
    [("slimgpt", "prune_in_order"), ("flap-wifn", "score.activations"), ("llm-pruner", "score.gradients")],
)
def test_methods_choose_the_same(method: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    data: dict[str, Any] = {"data": torch.randint(0, 40, (8, 12)), "allocation": "uniform"}
    wanted = graphprune.compile(model, 0.3, method=method, **data)
    modes: list[Pretended] = []

    def pretended(model: nn.Module, device: torch.device) -> Pretended:
        modes.append(Pretended(model))
        return modes[-1]

    monkeypatch.setattr(f"graphprune.passes.{module}.placed", pretended)
    found = graphprune.compile(model, 0.3, method=method, **data)
    assert modes
    assert sum(mode.moved for mode in modes) > 0
    if module == "prune_in_order":  # both batches run through one, and bring what is between two matrices once
        (mode,) = modes
        assert mode.moved < 1.5 * sum(p.numel() * p.element_size() for p in model.parameters())
    assert graphprune.report(found).plan == graphprune.report(wanted).plan
    for one, other in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_go_back_to_the_weights() -> None:
    model, x = Blocks(), torch.ones(2, 8)
    model(x).sum().backward()
    wanted = [p.grad for p in model.parameters()]
    model.zero_grad()
    with Pretended(model) as mode:
        with torch.no_grad():
            model(x)  # copies without a graph must not be used with one
        for _ in range(2):
            model(x).sum().backward()
    assert mode.moved == 3 * _largest_block(model) * 3
    for p, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient)


def test_what_is_written_to_stays_where_it_is() -> None:
    model, held = Blocks().to(META), torch.zeros(8, device=META)
    x, y = torch.ones(8), torch.ones(2)
    with torch.no_grad(), placed(model, torch.device("cpu")):
        held.add_(x)
        held[2:4] = y
        held += x
        x.add_(1)
        assert held.device.type == "cpu"  # what a model asks for is the device that it runs on
    assert held.device == META
    assert x.tolist() == [2] * 8


def test_nothing_is_done_where_all_is_there() -> None:
    model = Blocks()
    with placed(model, torch.device("cpu")):
        assert torch.overrides._len_torch_function_stack() == 0
