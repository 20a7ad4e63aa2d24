"""``knowledge``: where a model holds what it knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn

from graphprune.compiler import _check_model, _program
from graphprune.io.loss_cache import CACHE
from graphprune.ir.knowledge import Knowledge
from graphprune.ir.program import Options
from graphprune.passes import pipelines
from graphprune.passes.analyze_knowledge import RATIOS, SAMPLES, analyze_knowledge
from graphprune.passes.base import run_passes
from graphprune.passes.check_weights import check_weights


def knowledge(
    model: nn.Module,
    *,
    data: Any = None,
    tokenizer: Any = None,
    example_inputs: Any = None,
    ratios: Sequence[float] = RATIOS,
    samples: int = SAMPLES,
    length: int = 128,
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    inner_axes: bool = False,
    cache: str | PathLike[str] | None = CACHE,
    devices: Sequence[str | torch.device] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Knowledge:
    """Mask every node group of ``model`` alone, at several ratios, and say how much the model loses with each.

    This is LoRAShear's knowledge distribution analysis (arXiv 2310.18356, Alg. 3 and Figure 4). ``print`` the result,
    or ``.plot("plot.png")`` it. ``compile(model, ratio, unprunable_ratio=…)`` makes use of it with any method.
    The model is not changed.

    Args:
        ratios, cache, devices: see :func:`graphprune.passes.analyze_knowledge.analyze_knowledge`.
        model: any module that data can run through.
        data, tokenizer, samples, length, seed: the evaluation set, ``samples`` rows of ``length`` tokens, in any form
            that :func:`graphprune.compile` takes; by default made as there.
        example_inputs, include, exclude, inner_axes: as for :func:`graphprune.compile`: which groups there are.
        progress: called with the name of every pass that starts, and with how many groups are done and the seconds
            left.

    Returns:
        What was measured: losses in nats per token for a language model (:class:`graphprune.Knowledge`).

    Raises:
        GraphPruneError: for arguments out of range, data that the model cannot run, a loss that is not finite, and a
            model without weights.
    """
    _check_model(model)
    options = Options(
        data=data,
        tokenizer=tokenizer,
        samples=samples,
        length=length,
        seed=seed,
        include=[include] if isinstance(include, str) else list(include),
        exclude=[exclude] if isinstance(exclude, str) else list(exclude),
        inner_axes=inner_axes,
    )
    analysis = analyze_knowledge(0, ratios, samples=samples, cache=cache, devices=devices)
    program = _program(model, options, example_inputs)
    program.progress = progress
    run_passes(program, (check_weights, *pipelines.ANALYSE, analysis))
    return program.need("knowledge")
