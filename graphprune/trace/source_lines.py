"""Which line of the model's code an operator comes from, or an error.

torch writes down the whole stack of every node that it makes, and reads the source of every frame in it: a quarter of
the time that a small model takes to compile. Only one frame of it is ever asked for, so torch is told not to
(:func:`no_whole_stacks`), and every call in forward says its own line (:func:`on_line`), where torch has it too.
"""

from __future__ import annotations

import linecache
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import CodeType, FrameType
from unittest.mock import patch

import torch.fx.config
import torch.fx.traceback as fx_traceback

_TRACING = ("/graphprune/trace/", "/contextlib.py")
_LIBRARY = (*_TRACING, "/torch/", "/torch\\")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


@contextmanager
def no_whole_stacks() -> Iterator[None]:
    """torch writes no stacks inside. Versions that cannot be told write them where :func:`on_line` does not hold."""
    with patch.object(torch.fx.config, "do_not_emit_stack_traces", True, create=True):
        yield


@contextmanager
def on_line(frame: FrameType | None) -> Iterator[None]:
    """The nodes that torch makes inside come from the line that ``frame`` is at (``node.stack_trace``)."""
    meta = fx_traceback.get_current_meta()
    before = meta.get("stack_trace", "")
    fx_traceback.set_stack_trace([_written(frame)] if frame else [])
    try:
        yield
    finally:
        fx_traceback.set_stack_trace([before] if before else [])


def running_frame(outermost: CodeType | None = None) -> FrameType | None:
    """The innermost frame of the model's own code; of a library's, where the model is all theirs.

    ``outermost`` is what called the model: frames from there on are none of it.
    """
    frame: FrameType | None = sys._getframe(1)
    library = None
    while frame is not None and frame.f_code is not outermost:
        if not is_library(frame.f_code.co_filename):
            return frame
        if library is None and not _is_in(frame.f_code.co_filename, _TRACING):
            library = frame
        frame = frame.f_back
    return library


def place(frame: FrameType | None) -> str:
    """``modeling_x.py:123``"""
    return f"{base_name(frame.f_code.co_filename)}:{frame.f_lineno}" if frame else ""


def place_in(stack_trace: str) -> str:
    """The same, of the innermost frame in what Python or :func:`on_line` writes of a stack."""
    frames = _FRAME.findall(stack_trace)
    return f"{base_name(frames[-1][0])}:{frames[-1][1]}" if frames else ""


def frame_of(error: Exception) -> traceback.FrameSummary | None:
    """Where in the user's code an error was raised."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not is_library(f.filename)]
    frames = [f for f in frames if "/transformers/utils/generic" not in f.filename]
    return frames[-1] if frames else None


def is_library(path: str) -> bool:
    """Whether a file is none of the model's own: torch, or what traces it."""
    return _is_in(path, _LIBRARY)


def base_name(path: str) -> str:
    """The name of a file, of any system."""
    return path.replace("\\", "/").rsplit("/", 1)[-1]


@lru_cache(maxsize=4096)
def _is_in(path: str, parts: tuple[str, ...]) -> bool:
    return any(part in path for part in parts)


def _written(frame: FrameType) -> str:
    """As Python writes a frame of a stack."""
    code = frame.f_code
    source = linecache.getline(code.co_filename, frame.f_lineno, frame.f_globals).strip()
    return f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n    {source}'
