"""A model as one graph for other runtimes: ONNX, or the .pt2 of ``torch.export``.

What is exported takes the inputs of the model in batches and rows of any size, and returns its logits (or its last
hidden state) as a tensor, without a cache. Before its folder appears it has run, from the file, on other sizes than
those it was traced with, and given what the model gives.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.data.texts import Say, silent
from graphprune.errors import GraphPruneError, first_line
from graphprune.io.atomic import new_folder
from graphprune.trace.inputs import example_inputs_for, forward_parameters
from graphprune.trace.quiet import eval_mode

FORMATS = ("onnx", "pt2")
Tensors = dict[str, torch.Tensor]
_Run = Callable[[Tensors], torch.Tensor]

_OUTPUTS = ("logits", "last_hidden_state")
_NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": ()}
_LIMIT, _LIMITS = 1e-4, {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest output; by dtype


def export(
    model: nn.Module, directory: str | os.PathLike[str], form: str, *, tokenizer: Any = None, progress: Say = silent
) -> float:
    """Write ``model.onnx`` or ``model.pt2``, and the tokenizer, into a new folder, which is complete or not there.

    Args:
        model: a Hugging Face model, pruned or not, on the CPU.
        directory: a folder that does not exist yet; its parents are made.
        form: one of :data:`FORMATS`. An ONNX model above 2 GB has its weights in a file beside it.
        tokenizer: to write beside it.
        progress: called with what is being done.

    Returns:
        The largest error of what was written, over the largest output of the model.

    Raises:
        GraphPruneError: when ``directory`` exists, a package is missing, the model cannot be exported, or what was
            exported computes something else. Nothing is left behind then.
    """
    if form not in FORMATS:
        raise GraphPruneError(f"There is no format {form!r}: choose one of {', '.join(FORMATS)}.")
    _check_packages(form)
    first = next(model.parameters())
    if form == "onnx" and first.dtype == torch.bfloat16:
        raise GraphPruneError("ONNX Runtime does not compute in bfloat16: load the model in float32 or float16.")
    inputs = _inputs(model, first)
    target = Path(os.path.abspath(directory))
    try:
        with new_folder(target) as folder, eval_mode(model), torch.no_grad(), _quiet():
            wrapped = _Wrapped(model, inputs)
            progress("tracing")
            program = _program(wrapped, inputs)
            progress(f"writing model.{form}")
            run = _write_onnx(program, wrapped, folder) if form == "onnx" else _write_pt2(program, folder)
            progress("comparing with the model")
            error = max(_error(run, wrapped, other) for other in _others(inputs))
            if not error <= _LIMITS.get(first.dtype, _LIMIT):
                raise GraphPruneError(f"What was exported differs from the model by {error:.1e} of the largest output.")
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    except OSError as error:
        raise GraphPruneError(f"{target} could not be written: {error}.") from error
    return error


def _check_packages(form: str) -> None:
    missing = [name for name in _NEEDED[form] if importlib.util.find_spec(name) is None]
    if missing:
        raise GraphPruneError(f"{form} needs {', '.join(missing)}: pip install 'graphprune[onnx]'.")


def _inputs(model: nn.Module, first: torch.Tensor) -> Tensors:
    """Small inputs by name; with a mask where forward takes one, so that rows of other lengths can be padded."""
    given = example_inputs_for(model, first.device, first.dtype)[1]
    inputs = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    if "input_ids" in inputs and "attention_mask" in forward_parameters(model):
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    return inputs


class _Wrapped(nn.Module):
    """The model with its inputs one after another and one tensor as its output."""

    def __init__(self, model: nn.Module, inputs: Tensors):
        super().__init__()
        self.model, self.names = model, list(inputs)
        self.more = {"use_cache": False} if "use_cache" in forward_parameters(model) else {}
        found = model(**inputs, **self.more)
        self.output = next((name for name in _OUTPUTS if isinstance(getattr(found, name, None), torch.Tensor)), "")
        if not self.output:
            raise GraphPruneError(f"{type(model).__name__} returns neither {' nor '.join(_OUTPUTS)}.")

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        return getattr(self.model(**dict(zip(self.names, given, strict=True)), **self.more), self.output)


def _is_row(value: torch.Tensor) -> bool:
    """Whether dimension 1 is one of tokens."""
    return value.ndim == 2 and not value.is_floating_point()


def _program(wrapped: _Wrapped, inputs: Tensors) -> torch.export.ExportedProgram:
    free = torch.export.Dim.DYNAMIC  # unlike a named one as long as the model allows, such as its positions
    shapes = tuple({0: free, 1: free} if _is_row(value) else {0: free} for value in inputs.values())
    try:
        return torch.export.export(wrapped, tuple(inputs.values()), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:  # whatever the model does that a graph cannot
        raise GraphPruneError(
            f"{type(wrapped.model).__name__} cannot be exported: {type(error).__name__}: {first_line(error)}"
        ) from error


def _write_onnx(program: torch.export.ExportedProgram, wrapped: _Wrapped, folder: Path) -> _Run:
    import onnxruntime

    path = folder / "model.onnx"
    try:
        made = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=wrapped.names, output_names=[wrapped.output]
        )
        assert made is not None
        made.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except OSError:
        raise
    except Exception as error:  # an operator that one of them does not have
        raise GraphPruneError(f"ONNX cannot hold the model: {type(error).__name__}: {first_line(error)}") from error

    def run(inputs: Tensors) -> torch.Tensor:
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(found)

    return run


def _write_pt2(program: torch.export.ExportedProgram, folder: Path) -> _Run:
    path = folder / "model.pt2"
    program.example_inputs = None  # the one part that would always be a pickle
    torch.export.save(program, path)
    if pickled := list(_pickled(path)):
        raise GraphPruneError(f"torch.export would pickle {', '.join(pickled)}, and nothing is pickled here.")
    module = torch.export.load(path).module()
    return lambda inputs: module(*inputs.values())


def _pickled(path: Path) -> Iterator[str]:
    """The parts of a .pt2 that are pickles."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(("weights_config.json", "constants_config.json")):
                entries = json.loads(archive.read(name))["config"]
                yield from (key for key, entry in entries.items() if entry["use_pickle"])
            elif "/sample_inputs/" in name and archive.getinfo(name).file_size:
                yield name


def _others(inputs: Tensors) -> Sequence[Tensors]:
    """Inputs of other sizes: a larger batch of shorter rows, one of them padded, and a single row."""

    def resized(batch: int, row: int) -> Tensors:
        found = {}
        for name, value in inputs.items():
            rows = torch.cat([value, value])[:batch]
            found[name] = rows[:, :row] if _is_row(value) else rows
        return found

    size = len(next(iter(inputs.values())))
    length = next((value.shape[1] for value in inputs.values() if _is_row(value)), 0)
    large, single = resized(size + 1, length - 1), resized(1, length)
    if "attention_mask" in large:
        large["attention_mask"] = large["attention_mask"].clone()
        large["attention_mask"][0, -1] = 0
    return large, single


def _error(run: _Run, wrapped: _Wrapped, inputs: Tensors) -> float:
    expected = wrapped(*inputs.values())
    found = run(inputs)
    if found.shape != expected.shape:
        return float("inf")
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


@contextmanager
def _quiet() -> Iterator[None]:
    """What the exporters say to their developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
