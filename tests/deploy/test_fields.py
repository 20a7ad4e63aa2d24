"""What a field of a config says is found by trying, exactly."""

from __future__ import annotations

import logging
import warnings
from contextlib import suppress

import pytest
from models import CASES
from transformers import LlamaConfig

from graphprune.deploy.fields import _slope, find_fields
from graphprune.deploy.stock import Row, Stock, trying


def test_slopes_of_a_grouped_query_model() -> None:
    found = find_fields(Stock(CASES["qwen3"].build()), [])
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert found.slopes[("num_attention_heads",)][Row("tensor", weight, 0)] == 8
    assert found.slopes[("head_dim",)][Row("tensor", weight, 0)] == 8
    scaling = Row("number", "model.layers.0.self_attn.scaling")
    assert found.slopes[("head_dim",)][scaling] == pytest.approx(-0.5 * 8**-1.5)
    # Tokens, layers and positions say no size, or how many tensors there are.
    assert not {("num_hidden_layers",), ("pad_token_id",), ("max_position_embeddings",)} & found.slopes.keys()


@pytest.mark.parametrize(
    ("name", "field", "value"), [("gpt2", "n_inner", 128), ("phi3", "head_dim", 4), ("qwen2", "head_dim", 4)]
)
def test_a_field_without_a_value_has_the_one_it_amounts_to(name: str, field: str, value: int) -> None:
    """Whether it is None in the config, or only asked for by the code of the model."""
    found = find_fields(Stock(CASES[name].build()), [])
    assert found.added == [(field,)]
    assert found.settings[field] == value


@pytest.mark.parametrize(
    ("value", "now", "seen", "slope"),
    [
        (4, 32, [(8, 64), (2, 16), (16, 128)], 8),
        (4, 24, [(8, 40), (2, 16), (16, 72)], 4),  # a part that does not follow: fused projections
        (4, 2, [(8, 1), (2, 4), (16, 0), (1, 8)], -0.5),  # 8 // value, rounded down at 16
        (4, 2, [(8, 1), (2, 4), (12, 0)], -0.5),  # of which two lie on a line, rounded
        (4, 3, [(8, 7), (2, 10), (16, 1)], None),
    ],
)
def test_slopes(value: int, now: float, seen: list[tuple[int, float]], slope: float | None) -> None:
    found = _slope(value, now, seen)
    assert found is None if slope is None else found == pytest.approx(slope)


def test_what_is_tried_is_not_heard_of_and_nothing_of_that_stays(caplog: pytest.LogCaptureFixture) -> None:
    logger, said = logging.getLogger("transformers"), repr(LlamaConfig())
    caplog.set_level(logging.WARNING, logger.name)
    with warnings.catch_warnings(), suppress(ValueError):
        warnings.simplefilter("error")
        with trying():
            with trying():
                pass
            assert logger.level == logging.CRITICAL  # leaving the inner one ends nothing
            assert repr(LlamaConfig()).startswith("<")
            warnings.warn("this head_dim is strange", stacklevel=1)
            raise ValueError("refused")
    assert logger.level == logging.WARNING
    assert repr(LlamaConfig()) == said
