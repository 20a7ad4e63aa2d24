"""``deploy="transformers"``: the config that describes the pruned model, and the proof that its class computes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graphprune.deploy.solve import Stated, solve_config
from graphprune.deploy.stock import PER_LAYER
from graphprune.errors import GraphPruneError
from graphprune.io.tensors import held_tensors, replace_tensor
from graphprune.ir.program import Program
from graphprune.passes.base import compiler_pass
from graphprune.passes.verify import TOLERANCE, largest_difference, model_outputs
from graphprune.trace.provenance import configs_of
from graphprune.trace.skeleton import is_on_meta


@compiler_pass(requires=("plan", "fields", "new_attributes"), ensures=("stated",))
def state_config(program: Program) -> None:
    """Solve the config before anything is changed.

    Raises :class:`GraphPruneError` when no values of its fields describe what the plan leaves.
    """
    program.stated = solve_config(program)


@compiler_pass(requires=("pruned", "stated"))
def give_config(program: Program) -> None:
    """Give the pruned model the config that describes it.

    Unless the model has no weights, or ``verify`` is off, the class built from that config gets the weights, as
    from_pretrained would give it them, and must compute on the example inputs what the pruned model does.

    Raises :class:`GraphPruneError` when it does not.
    """
    pruned, fields, stated = program.need("pruned"), program.need("fields"), program.need("stated")
    built = fields.stock.build_with_buffers(stated.settings)
    if program.options.verify and not is_on_meta(pruned):
        _prove(program, pruned, built, stated)
    _follow(pruned, built, fields.stock.build(fields.stock.settings))


def _prove(program: Program, pruned: nn.Module, built: nn.Module, stated: Stated) -> None:
    device = next(pruned.parameters()).device
    for name, buffer in list(built.named_buffers()):
        replace_tensor(built, name, "buffer", buffer.to(device))
    for name, held in held_tensors(pruned).items():
        if held.persistent:
            replace_tensor(built, name, held.kind, held.tensor)
    dtype = torch.float32
    outputs = (model_outputs(program, one, dtype, {}) for one in (built.train(pruned.training), pruned))
    difference = largest_difference(*outputs)
    if difference > TOLERANCE[dtype]:
        changes = ", ".join(f"{name}={after}" for name, (_, after) in stated.fields.items())
        raise GraphPruneError(
            f"{type(pruned).__name__} with {changes} computes something else than the pruned model: they differ by "
            f"{difference:.3g} of the largest output. A number or a buffer in it follows these fields where pruning "
            "keeps it. Leave out deploy=, or exclude= what these fields say."
        )


def _follow(pruned: nn.Module, built: nn.Module, before: nn.Module) -> None:
    """Give the configs and modules of ``pruned`` the numbers by which ``built`` differs from what there was before."""
    modules = dict(pruned.named_modules())
    old = dict(before.named_modules())
    for path, module in built.named_modules():
        if path in modules and path in old:
            _follow_numbers(modules[path], module, old[path])
            for name, config in configs_of(module):
                if name in vars(modules[path]) and name in vars(old[path]):
                    _follow_config(vars(modules[path])[name], config, vars(old[path])[name])


def _follow_numbers(mine: Any, now: Any, before: Any) -> None:
    """Straight into ``__dict__``: setters may want other fields to fit already."""
    for name, value in vars(now).items():
        if _is_number(value) and vars(before).get(name) != value:
            vars(mine)[name] = value


def _follow_config(mine: Any, now: Any, before: Any) -> None:
    _follow_numbers(mine, now, before)
    if getattr(now, "is_heterogeneous", False):
        mine.per_layer_config = now.to_dict()[PER_LAYER]
    for name, config in configs_of(now):
        if name in vars(mine) and name in vars(before):
            _follow_config(vars(mine)[name], config, vars(before)[name])


def _is_number(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(type(one) in (int, float) for one in value)
    return type(value) in (int, float)
