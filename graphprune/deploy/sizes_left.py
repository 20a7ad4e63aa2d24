"""What a model of transformers has after pruning that its class would not build from its config.

It goes into config.json, as :func:`graphprune.deploy.resize.resize` reads it: in ``quantization_config`` for
:mod:`graphprune.deploy.quantizer`, or under ``graphprune`` for the modelling file of a portable folder.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import nn

from graphprune.deploy.resize import resize
from graphprune.deploy.stock import Stock, settings_of
from graphprune.errors import GraphPruneError
from graphprune.io.tensors import Held, held_tensors, same_values
from graphprune.reporting import Report
from graphprune.trace.provenance import Attribute, get_attribute

Sizes = dict[str, Any]


def sizes_left(model: nn.Module, done: Report, held: dict[str, Held]) -> Sizes:
    """What ``model``, which holds ``held``, has otherwise than its class builds it from the config in ``done``.

    Raises:
        GraphPruneError: naming a tensor that cannot be described so: the model was changed since it was pruned.
    """
    stock = Stock(model)
    settings = settings_of(done.base_config)
    built_model = stock.build_with_buffers(settings)
    built = held_tensors(built_model)
    new = {f"{path}.bias" for path in done.new_biases}
    sizes = {
        "class": type(model).__name__,
        "attributes": {
            path_of(attribute): int(value)
            for attribute, value in done.attributes.items()
            if _value(built_model, attribute) != value
        },
        "shapes": {
            name: list(item.tensor.shape)
            for name, item in held.items()
            if name in built and built[name].tensor.shape != item.tensor.shape
        },
        "biases": sorted(path for path in done.new_biases if f"{path}.bias" not in built),
        "buffers": {
            name: str(item.tensor.dtype).removeprefix("torch.")
            for name, item in held.items()
            if not item.persistent and name in built and not same_values(item.tensor, built[name].tensor)
        },
    }
    _check(stock.build(settings), sizes, held, new)
    return sizes


def _value(model: nn.Module, attribute: Attribute) -> int | None:
    try:
        return get_attribute(model, attribute)
    except (AttributeError, KeyError, IndexError, TypeError):
        return None


def path_of(attribute: Attribute) -> str:
    """``model.layers.0.self_attn.config.num_key_value_heads``, and one more number for a place in a list."""
    parts = [*attribute.owner.split("@"), attribute.name, *([] if attribute.index is None else [str(attribute.index)])]
    return ".".join(part for part in parts if part)


def in_state_dict(held: dict[str, Held], sizes: Sizes) -> dict[str, Held]:
    """``held`` with the tensors of ``buffers`` as parts of the state dict, which they are once it is loaded."""
    found = {name: replace(item, persistent=True) if name in sizes["buffers"] else item for name, item in held.items()}
    return dict(sorted(found.items(), key=lambda item: not item[1].persistent))


def _check(built: nn.Module, sizes: Sizes, held: dict[str, Held], new: set[str]) -> None:
    """The class with these sizes must have a place for everything in the state dict."""
    try:
        resize(built, copy.deepcopy(sizes))
    except (AttributeError, RuntimeError, ValueError, IndexError) as error:
        raise GraphPruneError(
            f"{type(built).__name__} as it is built now cannot take the pruned sizes: {error}"
        ) from error
    places = held_tensors(built)
    wanted = in_state_dict(held, sizes)
    for name in {**places, **wanted}:
        place, item = places.get(name), wanted.get(name)
        if not any(one is not None and one.persistent for one in (place, item)):
            continue
        sides = [None if one is None else list(one.tensor.shape) for one in (place, item)]
        if sides[0] != sides[1]:
            raise GraphPruneError(
                f"{name} is {_shape(sides[1])} in the model and {_shape(sides[0])} in {type(built).__name__} as its "
                "config and the pruning describe it: the model was changed since."
            )


def _shape(shape: list[int] | None) -> str:
    return "missing" if shape is None else str(shape)
