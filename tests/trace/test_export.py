"""Tracing: names, source lines, tied weights, outputs, and errors that name the line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import X, check_every_axis, toy
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    Dinov2Backbone,
    Dinov2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LayoutLMConfig,
    LayoutLMModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PatchTSTConfig,
    PatchTSTModel,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import graphprune
from graphprune import GraphPruneError
from graphprune.ir.axes import find
from graphprune.trace.export import module_path, output_tensors, source_line, trace
from graphprune.trace.inputs import example_inputs_for, normalise, odd_sizes
from graphprune.trace.skeleton import copy_structure, names, tensors

TEXT = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 61}
SMALL = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 61,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}  # fmt: skip


def test_every_node_knows_its_module_and_line() -> None:
    found = trace(toy(1), ((X,), {}))
    softmax = next(n for n in found.graph.nodes if "softmax" in str(n.target))
    assert module_path(softmax) == "layers.0.attention"
    assert source_line(softmax).startswith("helpers.py:")
    assert source_line(softmax).endswith(" layers.0.attention")


def test_every_parameter_has_its_name() -> None:
    model = toy(1)
    found = trace(model, ((X,), {}))
    assert set(found.tensor_names.values()) == set(dict(model.named_parameters()))
    assert len(found.inputs) == len(found.input_names) == 1


def test_the_traced_module_computes_what_the_model_computes() -> None:
    model = toy(1)
    found = trace(model, ((X,), {}))
    held = names(model)
    placeholders = [n.name for n in found.graph.nodes if n.op == "placeholder"]
    arguments = [held[found.tensor_names[p]] if p in found.tensor_names else X for p in placeholders]
    with torch.no_grad():
        out = torch.fx.Interpreter(found.module).run(*arguments, enable_io_processing=False)
        assert torch.allclose(output_tensors(out)[0], model(X), atol=1e-6)


def test_a_meta_model_is_traced_without_weights() -> None:
    with torch.device("meta"):
        model = type(toy(1))(1)
    found = trace(model, ((X.to("meta"),), {}))
    assert len(list(found.graph.nodes)) == len(list(trace(toy(1), ((X,), {})).graph.nodes))


@pytest.mark.parametrize("on_meta", [False, True])
def test_tied_weights_are_one_tensor(on_meta: bool) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(7, 24), nn.Linear(7, 24)
            self.b.weight = self.a.weight
            self.last = nn.Linear(24, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.a(x) * self.b(x).sin())

    with torch.device("meta" if on_meta else "cpu"):
        model = Tied()
    axes = graphprune.inspect(model, example_inputs=X.to("meta") if on_meta else X).program.axes
    assert axes.canonical["b.weight"] == axes.canonical["a.weight"] == "a.weight"
    assert "b.weight" not in axes.tensors
    assert find(axes.tensors["a.bias"][0]) is find(axes.tensors["b.bias"][0])


class Forward(nn.Module):
    def __init__(self, body: Any):
        super().__init__()
        self.linear = nn.Linear(7, 7)
        self.body = body

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self.linear(x))


def _branch(h: torch.Tensor) -> torch.Tensor:
    return h if h.max() > 3 else -h


def _size(h: torch.Tensor) -> torch.Tensor:
    return h[: int(h.abs().max())]


def _mask(h: torch.Tensor) -> torch.Tensor:
    picked = h[h > 0]
    return picked if picked.shape[0] > 3 else h


@pytest.mark.parametrize(("body", "line"), [(_branch, "h.max() > 3"), (_size, "int(h.abs()"), (_mask, "picked.shape")])
def test_data_dependent_control_flow_names_the_line(body: Any, line: str) -> None:
    with pytest.raises(GraphPruneError, match="from the values of a tensor") as caught:
        trace(Forward(body), ((X,), {}))
    assert "test_export.py:" in str(caught.value)
    assert line in str(caught.value)


def test_an_error_inside_forward_names_the_line() -> None:
    def body(h: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of luck")

    with pytest.raises(GraphPruneError, match=r"test_export\.py:\d+ in body.*out of luck"):
        trace(Forward(body), ((X,), {}))


def test_outputs_are_found_in_any_container() -> None:
    @dataclass
    class Out:
        a: torch.Tensor
        rest: list

    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    found = output_tensors({"x": Out(a, [None, b, 3]), "y": (c, "text")})
    assert [id(t) for t in found] == [id(a), id(b), id(c)]


def test_example_inputs_have_sizes_that_nothing_else_has() -> None:
    model = toy(1, width=12, heads=3, hidden=5)
    found = odd_sizes(model, 4)
    sizes = {n for p in model.parameters() for n in p.shape}
    assert not set(found) & sizes
    assert len(set(found)) == 4
    assert found == sorted(found)
    assert all(n % d for n in found for d in range(2, n))


def test_example_inputs_avoid_the_integers_of_the_config() -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=61, n_positions=64, n_inner=11)
    model = GPT2LMHeadModel(config)
    model.config.some_size = 3
    batch, length = odd_sizes(model, 2)
    assert 3 not in (batch, length)
    args, kwargs = example_inputs_for(model, torch.device("cpu"), torch.float32)
    assert args == ()
    assert kwargs["input_ids"].shape == (batch, length)
    assert kwargs["input_ids"].max() < 61
    assert kwargs["use_cache"] is False


def test_images_come_in_the_dtype_of_the_model() -> None:
    config = ViTConfig(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                       patch_size=8)  # fmt: skip
    _, kwargs = example_inputs_for(ViTForImageClassification(config), torch.device("cpu"), torch.bfloat16)
    assert kwargs["pixel_values"].shape[1:] == (3, 16, 16)
    assert kwargs["pixel_values"].dtype == torch.bfloat16


def test_a_backbone_that_has_run_before_still_returns_its_features() -> None:
    """transformers collects them by hooks, which it puts there the first time that the model runs."""
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    model = Dinov2Backbone(config).eval()
    inputs = example_inputs_for(model, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        expected = model(**inputs[1]).feature_maps[0]
    assert [tuple(out.meta["val"].shape) for out in trace(model, inputs).outputs] == [tuple(expected.shape)]
    report = graphprune.report(graphprune.compile(model, 0.2))
    assert report.oracle_error is not None
    assert report.oracle_error <= 1e-4


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (lambda: BartForConditionalGeneration(BartConfig(**SMALL)), {"input_ids", "decoder_input_ids"}),
        (lambda: LayoutLMModel(LayoutLMConfig(**TEXT)), {"input_ids", "bbox"}),
        (lambda: Wav2Vec2Model(Wav2Vec2Config(**TEXT, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3))),
         {"input_values"}),
        (lambda: PatchTSTModel(PatchTSTConfig(d_model=16, num_hidden_layers=1, num_input_channels=2)), {"past_values"}),
        (lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config={**TEXT, "image_size": 16, "patch_size": 8})),
         {"input_ids", "pixel_values"}),
    ],
)  # fmt: skip
def test_inputs_of_every_kind_run(model: Callable[[], nn.Module], names: set[str]) -> None:
    built = model().eval()
    args, kwargs = example_inputs_for(built, torch.device("cpu"), torch.float32)
    assert args == ()
    assert set(kwargs) - {"use_cache"} == names
    with torch.no_grad():
        built(**kwargs)


def test_an_image_gets_as_many_placeholders_as_it_has_features() -> None:
    vision = {**TEXT, "image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}
    text = {**TEXT, "model_type": "llama", "num_key_value_heads": 2}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=7))
    _, kwargs = example_inputs_for(model.eval(), torch.device("cpu"), torch.float32)
    assert ((kwargs["input_ids"] == 7).sum(1) == 4).all()
    with torch.no_grad():
        model(**kwargs)


def test_random_tokens_have_no_meaning_of_their_own() -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=5, bos_token_id=0, eos_token_id=4, pad_token_id=3)
    _, kwargs = example_inputs_for(GPT2LMHeadModel(config), torch.device("cpu"), torch.float32)
    assert set(kwargs["input_ids"].flatten().tolist()) <= {1, 2}


def test_an_argument_that_cannot_be_guessed_is_named() -> None:
    class Needs(GPT2LMHeadModel):
        def forward(self, input_ids, wind_speed):
            return super().forward(input_ids)

    model = Needs(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=61))
    with pytest.raises(GraphPruneError, match=r"'wind_speed'.*example_inputs="):
        example_inputs_for(model, torch.device("cpu"), torch.float32)


def test_inputs_are_normalised() -> None:
    assert normalise(X) == ((X,), {})
    assert normalise([X, 3]) == ((X, 3), {})
    assert normalise({"x": X}) == ((), {"x": X})


def test_a_structure_is_copied_without_its_weights() -> None:
    model = toy(1)
    shared = copy_structure(model)
    assert shared is not model
    assert shared.layers[0].mlp is not model.layers[0].mlp
    assert all(a is b for a, b in zip(tensors(shared), tensors(model), strict=True))
    replaced = copy_structure(model, lambda t: nn.Parameter(t.detach() * 2))
    assert torch.equal(replaced.head.weight, model.head.weight * 2)


def test_a_failed_trace_says_it_once(capfd):
    """torch.export prints the graph it could not finish; the user gets one clear error instead."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(GraphPruneError, match="values of a tensor"):
        trace(Branches(), ((torch.randn(3, 4),), {}))
    assert capfd.readouterr() == ("", "")


class _Converting(nn.Module):
    """Converts a part of itself, and draws from a distribution that checks its arguments, in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.up = self.up.to(x.dtype)
        out = self.down(self.up(x).relu())
        return torch.distributions.Categorical(logits=out).entropy()


def test_what_torch_cannot_trace_of_a_forward_is_stilled() -> None:
    model = _Converting()
    checks = torch.distributions.Distribution._validate_args
    assert check_every_axis(model, torch.randn(3, 8)) == ["up.weight[0]"]
    assert torch.distributions.Distribution._validate_args == checks
    assert nn.Module.to.__module__ == "torch.nn.modules.module"
