"""What takes a model apart takes a pruned one apart: torch.compile, torch.export, ONNX."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from pruned_models import ALL, CAUSAL, TOKENS, example, fresh, logits, pruned


def some_slow(*fast: str) -> list[Any]:
    """All models, those that are not ``fast`` for the slow tests."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in ALL]


def test_the_free_plan_has_other_widths_in_every_layer() -> None:
    """What makes these tests worth running."""
    first, second = pruned("free").model.layers
    assert first.mlp.gate_proj.out_features == 48 > second.mlp.gate_proj.out_features
    assert first.self_attn.k_proj.out_features == 16 > second.self_attn.k_proj.out_features
    assert pruned("gpt2").transformer.h[1].attn.split_size < 32


@pytest.mark.parametrize("name", some_slow("free", "vit"))
def test_torch_compile(name: str) -> None:
    """Down to the operators that inductor gets; in one graph."""
    torch._dynamo.reset()
    model = torch.compile(fresh(name), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(model, name), logits(pruned(name), name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["free", "stock"])
def test_inductor(name: str) -> None:
    torch._dynamo.reset()
    model = torch.compile(fresh(name))
    torch.testing.assert_close(logits(model, name), logits(pruned(name), name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", some_slow("gpt2", "vit"))
def test_torch_export(name: str) -> None:
    given: dict[str, Any] = example(name)
    if name in (*CAUSAL, "classifier"):
        given = {**given, "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(fresh(name), (), given, strict=False)
        torch.testing.assert_close(program.module()(**given).logits, logits(pruned(name), name))


def test_an_export_for_any_length() -> None:
    """Sizes that pruning has written into the model do not fix those of the inputs."""
    shapes = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(
            fresh("free"), (), {"input_ids": TOKENS, "use_cache": False}, dynamic_shapes=shapes, strict=False
        )
        other = TOKENS[:, :11].repeat(3, 1)
        expected = pruned("free")(other).logits
        torch.testing.assert_close(program.module()(input_ids=other, use_cache=False).logits, expected)


class OnlyLogits(torch.nn.Module):
    """ONNX has no outputs with names of Python classes."""

    def __init__(self, model: torch.nn.Module, argument: str):
        super().__init__()
        self.model, self.argument = model, argument

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        more = {"use_cache": False} if getattr(self.model.config, "use_cache", None) else {}
        return self.model(**{self.argument: given}, **more).logits


def has(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


@pytest.mark.skipif(not has("onnx", "onnxscript", "onnxruntime"), reason="needs onnx, onnxscript and onnxruntime")
@pytest.mark.parametrize("name", some_slow("free"))
def test_onnx(name: str, tmp_path: Path) -> None:
    import onnxruntime

    ((argument, given),) = example(name).items()
    wrapped = OnlyLogits(fresh(name), argument).eval()
    torch.onnx.export(wrapped, (given,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits(pruned(name), name), atol=1e-4, rtol=1e-4)
