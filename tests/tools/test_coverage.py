"""A dozen architectures of very different kinds through the same steps as the whole coverage table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import quick

from graphprune.rules import registry


@pytest.fixture
def coverage(load_tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    return load_tool("coverage")


KINDS = {
    "bert": "an encoder with a masked language model's head",
    "bart": "an encoder-decoder",
    "t5": "an encoder-decoder with biases of relative positions",
    "vit": "images",
    "resnet": "convolutions and batch norms",
    "swin": "windows of an image",
    "segformer": "dense prediction",
    "clip": "two towers",
    "llava": "a language model that reads an image among its tokens",
    "wav2vec2": "a waveform",
    "whisper": "a spectrogram and a decoder",
    "patchtst": "a time series",
}


@pytest.mark.parametrize("model_type", quick(KINDS, {"bart", "resnet", "segformer", "clip", "whisper", "patchtst"}))
def test_it_is_compiled_and_proven(coverage: ModuleType, model_type: str) -> None:
    cls, _ = coverage.registered()[model_type]
    result = coverage.cover(model_type, cls)
    assert result.status == "OK", result.reason
    assert result.error <= 1e-4
    assert result.ratio == pytest.approx(coverage.RATIO, abs=0.05)


@pytest.fixture
def broken_layer_norm() -> Iterator[None]:
    """A rule that lies: nothing is normalised by a layer norm, so the width may be pruned away under it."""
    operator = torch.ops.aten.layer_norm
    true = registry._RULES[operator]

    def lie(r, x, shape, weight=None, bias=None, *options, **more):
        for tensor in (weight, bias):
            if tensor is not None:
                r.same(x[-1], tensor[0])
        for size in shape:
            r.size(size, x[-1])
        return x

    registry._RULES[operator] = lie
    yield
    registry._RULES[operator] = true


def test_a_wrong_rule_shows(coverage: ModuleType, broken_layer_norm: None) -> None:
    cls, _ = coverage.registered()["bert"]
    assert coverage.cover("bert", cls).status == "WRONG"
