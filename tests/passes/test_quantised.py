"""A quantised base trains adapters as it is, and is made floating point where it is sliced."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import graphprune
from graphprune.ir.program import Program
from graphprune.passes.adapted import Adapted
from graphprune.passes.add_adapters import Adapters, training_pass
from graphprune.passes.allocate_budget import allocate_budget
from graphprune.passes.train_loraprune import LoraPrune, _Masks
from graphprune.trace.quantised import is_quantised
from tests.passes.test_adapted import plain
from tests.passes.test_train_lhspg import DATA, logits

aten = torch.ops.aten


class Int8(torch.Tensor):
    """Int8 with a scale per row, as torchao keeps weights: a class of its own that says that it is float32."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Int8:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor):
        self.codes, self.scale = codes, scale

    def dequantize(self) -> torch.Tensor:
        Int8.made.append(tuple(self.shape))
        return self.codes * self.scale

    made: ClassVar[list[tuple[int, ...]]] = []

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (aten.detach.default, aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        if func is aten.t.default:
            return (args[0].codes * args[0].scale).t()
        raise NotImplementedError(f"{func} of a quantised weight")


def quantised(model: nn.Module) -> nn.Module:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            codes = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = nn.Parameter(Int8(codes, scale), requires_grad=False)
    return model


def test_loraprune_on_an_int8_base() -> None:
    seen: dict[str, torch.Tensor] = {}

    def run(program: Program, view: Adapted, counts: dict[str, int]) -> None:
        assert all(is_quantised(layer.base.weight) for layer in view.layers.values())
        masks = _Masks(view, counts, LoraPrune())
        view.model(input_ids=DATA, labels=DATA).loss.backward()
        Int8.made.clear()
        masks.before_step()
        seen["layers"], seen["made"] = torch.tensor(len(view.layers)), torch.tensor(len(Int8.made))
        masks.mask(1.0)
        seen["logits"] = logits(view.model)

    model = quantised(plain())
    before = logits(model)
    passes = (allocate_budget("uniform"), training_pass("watched", run, Adapters(rank=3)))
    pruned = graphprune.compile(model, 0.3, passes=passes, data=DATA)
    assert seen["made"] == seen["layers"]  # each once, one at a time
    assert torch.equal(logits(model), before)
    assert all(is_quantised(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    assert {type(parameter.data) for parameter in pruned.parameters()} == {torch.Tensor}
    assert (logits(pruned) - seen["logits"]).abs().max() <= 1e-5 * seen["logits"].abs().max()
    trained = graphprune.compile(model, 0.3, method="loraprune", data=DATA)
    assert graphprune.report(trained).oracle_error is not None


def test_what_runs_quantised_weights_itself_is_refused() -> None:
    model = quantised(plain())
    with pytest.raises(graphprune.GraphPruneError, match="only trains, such as 'loraprune'"):
        graphprune.compile(model, 0.2, method="lorashear", data=DATA)
    with pytest.raises(graphprune.GraphPruneError, match="cannot be sliced"):
        graphprune.compile(model, 0.2, method="magnitude")
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    with pytest.raises(graphprune.GraphPruneError, match="give the quantised model without adapters"):
        graphprune.compile(adapted, 0.2, method="loraprune", data=DATA)
