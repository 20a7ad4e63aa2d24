"""The path of forward that fills a cache must fit the plan too, although it was not traced."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from graphprune.errors import GraphPruneError
from graphprune.ir.program import Program
from graphprune.passes.base import compiler_pass
from graphprune.passes.rewrite import collect_slices, finish, like, sliced_shape
from graphprune.trace.backends import use_portable
from graphprune.trace.inputs import Inputs
from graphprune.trace.quiet import REFUSALS, eval_mode, without_hooks
from graphprune.trace.skeleton import copy_structure


class UntracedSizes(GraphPruneError):
    """With a cache, forward uses sizes that it does not use without: it has to be traced with one."""


@compiler_pass(requires=("plan", "axes", "new_attributes"))
def check_cached_sizes(program: Program) -> None:
    """Run the pruned shapes on meta tensors with ``use_cache=True``; no weight is touched.

    Raises :class:`UntracedSizes` when that fails although the unpruned model does it.
    """
    if program.inputs[1].get("use_cache") is not False:
        return
    try:
        _run_with_cache(_pruned_shapes(program), program.inputs)
    except REFUSALS as error:
        if _runs_with_cache(copy_structure(program.model, _to_meta), program.inputs):
            raise UntracedSizes(
                f"{type(program.model).__name__} runs without a cache when pruned like this, but not with one: {error}"
            ) from error


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return like(tensor, torch.empty_like(tensor, device="meta"))


def _pruned_shapes(program: Program) -> nn.Module:
    slices = collect_slices(program)

    def shrunk(tensor: torch.Tensor) -> torch.Tensor:
        shape = sliced_shape(tensor, slices.get(id(tensor), {}))
        return like(tensor, torch.empty(shape, dtype=tensor.dtype, device="meta"))

    model = copy_structure(program.model, shrunk)
    finish(program, model)
    return model


def _run_with_cache(model: nn.Module, inputs: Inputs) -> None:
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), inputs)
    use_portable(model, tracing=True)
    with eval_mode(model), without_hooks(model):
        model(*args, **{**kwargs, "use_cache": True})


def _runs_with_cache(model: nn.Module, inputs: Inputs) -> bool:
    try:
        _run_with_cache(model, inputs)
    except REFUSALS:
        return False
    return True
