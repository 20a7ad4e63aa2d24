"""``apply``: an adapter that was trained on the unpruned model, made to fit the pruned one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from graphprune.compiler import compile
from graphprune.errors import GraphPruneError
from graphprune.io.atomic import new_folder
from graphprune.io.models import load_model
from graphprune.ir.plan import Plan
from graphprune.trace.skeleton import frozen_copy

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def apply(
    plan: Plan,
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    base: nn.Module | str | None = None,
    example_inputs: Any = None,
) -> Path:
    """Prune the adapter in the folder ``adapter`` as ``plan`` pruned the model it was trained on.

    The new folder ``output`` is one of peft: ``PeftModel.from_pretrained(pruned, output)`` loads it. What it computes
    on the pruned model is what the adapter computed on the original without the removed structures, proven as every
    compile is.

    Args:
        plan: ``graphprune.report(pruned).plan``, or one read from a file.
        adapter: a folder that peft's ``save_pretrained`` wrote, with weights in safetensors.
        output: a folder that does not exist yet; by default beside ``adapter``, with ``-pruned`` behind its name.
        base: the unpruned model, or what :func:`graphprune.io.models.load_model` takes; by default the one that the
            adapter names.
        example_inputs: as for :func:`graphprune.compile`.

    Returns:
        The folder that was written.

    Raises:
        GraphPruneError: when there is no such adapter, its weights are pickled, the model cannot be loaded, or the plan
            is not one of it. Nothing is written then.
    """
    from peft import PeftConfig, PeftModel

    folder = Path(adapter)
    if not (folder / _CONFIG).is_file():
        raise GraphPruneError(f"{folder} is no adapter of peft: it has no {_CONFIG}.")
    if not (folder / _WEIGHTS).is_file():
        raise GraphPruneError(f"{folder} has no {_WEIGHTS}; pickled weights are not read. Save it as safetensors.")
    config = PeftConfig.from_pretrained(str(folder))
    if base is None:
        base = config.base_model_name_or_path
        if not base:
            raise GraphPruneError(f"{folder} does not say which model it adapts: give it as base=.")
    model = load_model(base)[0] if isinstance(base, str) else base
    try:
        adapted = PeftModel.from_pretrained(frozen_copy(model), str(folder))
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise GraphPruneError(f"{folder} is no adapter of this {type(model).__name__}: {error}") from error
    pruned = compile(adapted, plan=plan, example_inputs=example_inputs)
    target = Path(os.path.abspath(folder.with_name(f"{folder.resolve().name}-pruned") if output is None else output))
    with new_folder(target) as written:
        pruned.save_pretrained(str(written))  # type: ignore[operator]
    return target
