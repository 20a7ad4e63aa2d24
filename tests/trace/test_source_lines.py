"""Which line of the model an operator comes from."""

from __future__ import annotations

import sys
from contextlib import suppress
from inspect import getsourcelines
from typing import Any

import pytest
import torch
import torch.fx.traceback as fx_traceback
from torch import fx, nn
from torch.fx.proxy import TracerBase

from graphprune.trace.export import source_line, trace
from graphprune.trace.source_lines import base_name, on_line, running_frame

X = torch.randn(2, 3, 8)


class Helped(nn.Module):
    """Its forward calls a function of its own, which calls one of torch that is written in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _twice(self.layer(x)) + 1


def _twice(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.softmax(x, -1) * 2


def node_of(model: nn.Module, name: str) -> fx.Node:
    return next(node for node in trace(model, ((X,), {})).graph.nodes if name in str(node.target))


def line_of(function: Any, text: str) -> str:
    """``test_source_lines.py:12``, the line of ``function`` that holds ``text``."""
    lines, first = getsourcelines(function)
    return f"test_source_lines.py:{next(first + i for i, line in enumerate(lines) if text in line)}"


@pytest.mark.parametrize(
    ("operator", "function", "text"),
    [("add", Helped.forward, "+ 1"), ("linear", Helped.forward, "self.layer"), ("softmax", _twice, "softmax")],
)
def test_the_innermost_line_of_the_models_own(operator: str, function: Any, text: str) -> None:
    assert source_line(node_of(Helped(), operator)).split()[0] == line_of(function, text)


def test_torch_can_print_the_line() -> None:
    stack = node_of(Helped(), "softmax").stack_trace
    assert stack is not None
    assert stack.endswith("in _twice\n    return nn.functional.softmax(x, -1) * 2")


def test_a_model_that_is_all_torchs_has_lines_of_torch_and_none_of_who_called_it() -> None:
    assert source_line(node_of(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), "relu")).startswith("functional.py:")


def test_no_stack_is_put_together_while_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tells when torch does not know the setting any more, or has other ways to take a stack."""
    assert torch.fx.config.do_not_emit_stack_traces is False
    taken = []
    monkeypatch.setattr(TracerBase, "_filter_traceback_frames", lambda *given: taken.append(given))
    trace(Helped(), ((X,), {}))
    assert not taken
    assert torch.fx.config.do_not_emit_stack_traces is False


def test_the_line_holds_inside_and_the_one_before_is_back_afterwards() -> None:
    meta = fx_traceback.get_current_meta()
    with fx_traceback.preserve_node_meta(), on_line(sys._getframe()):
        outer = meta["stack_trace"]
        with suppress(KeyError), on_line(running_frame()):
            assert "in test_the_line_holds" in meta["stack_trace"]
            raise KeyError
        assert meta["stack_trace"] == outer
        with on_line(None):
            assert "stack_trace" not in meta
    assert "stack_trace" not in meta


def test_a_file_of_any_system_has_a_name() -> None:
    assert base_name("/a/modeling_x.py") == base_name(r"C:\a\modeling_x.py") == "modeling_x.py"
