"""A folder as a model whose weights stay on disk."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphPruneError, first_line
from graphprune.io.checked_json import read_json
from graphprune.io.empty_model import at_most, class_in_transformers, without_weights
from graphprune.io.manifest import CONFIG
from graphprune.io.models import auto_class
from graphprune.io.stored_config import read_config
from graphprune.io.tensors import held_tensors, replace_tensor
from graphprune.streaming.checked import Checked
from graphprune.streaming.checkpoint import Checkpoint
from graphprune.streaming.config_limits import check_limits
from graphprune.streaming.conversions import converted
from graphprune.trace.stored import Converted, Stored, stand_in

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_COMPUTED = 2**28  # bytes of buffers that a class may always compute
_LEFT_BEHIND = r"rotary_emb\.inv_freq|(^|\.)position_ids$"  # buffers of earlier versions of transformers
_SHOWN = 3


def open_stock(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype | None) -> nn.Module:
    """The model that from_pretrained would load from ``folder``, its weights on disk, in eval mode.

    Raises:
        GraphPruneError: when config.json describes no model of transformers, or another one than the weights do; when
            it is quantised, or sizes in it are absurd. No code of the folder runs.
    """
    settings = read_json(folder / CONFIG)
    if settings.get("quantization_config") is not None:
        raise GraphPruneError(
            f"{folder} is quantised. Store it in a floating-point dtype, prune, and quantise the result."
        )
    check_limits(settings, checkpoint, str(folder / CONFIG))
    settings = read_config(folder)
    kind, config = _class_of(folder, settings)
    chosen = dtype or _dtype(config, checkpoint)
    shapes = _built(kind, settings, chosen, checkpoint, folder, computes=False)
    places, unknown = converted(shapes, checkpoint.tensors, str(folder))
    _check_shapes(shapes, places, checkpoint, folder)
    model = _built(kind, settings, chosen, checkpoint, folder, computes=True)
    _put(model, places, chosen)
    _tie(model, places, folder)
    _warn(model, unknown, folder)
    _read_generation_config(model, folder)
    return model.eval()


def _class_of(folder: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The model class, one of transformers, and its config."""
    import transformers

    named = settings.get("architectures")
    found: Any = class_in_transformers(named[0]) if isinstance(named, list) and named and _is_text(named[0]) else None
    try:
        if found is not None:
            return found, found.config_class.from_dict(dict(settings))
        kind = settings.get("model_type")
        if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
            raise GraphPruneError(
                f"{folder / CONFIG} names no model that transformers has ({kind!r}); code in the folder is never run."
            )
        config = transformers.CONFIG_MAPPING[kind].from_dict(dict(settings))
        auto = auto_class(config)
        if auto is None:
            raise GraphPruneError(f"{folder} is a {type(config).__name__}, for which there is no model class.")
        found = auto._model_mapping[type(config)]
        return found[0] if isinstance(found, tuple) else found, config
    except GraphPruneError:
        raise
    except Exception as error:  # whatever strange settings make it do
        raise _no_config(folder, error) from error


def _built(
    kind: Any, settings: dict[str, Any], dtype: torch.dtype, checkpoint: Checkpoint, folder: Path, computes: bool
) -> Any:
    try:
        config = kind.config_class.from_dict(dict(settings))
        with without_weights(computes), at_most(4 * len(checkpoint.tensors) + 64, "the checkpoint"):
            return kind._from_config(config, dtype=dtype)
    except GraphPruneError:
        raise
    except Exception as error:  # whatever strange settings make a constructor do
        raise _no_config(folder, error) from error


def _no_config(folder: Path, error: Exception) -> GraphPruneError:
    reason = first_line(error) or type(error).__name__
    return GraphPruneError(f"{folder / CONFIG} describes no model of transformers: {reason}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _dtype(config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """As from_pretrained chooses: what the config says, or that of the first floating-point weight."""
    said = getattr(config, "dtype", None)
    said = getattr(torch, said, None) if isinstance(said, str) else said
    if isinstance(said, torch.dtype) and said in _FLOATS:
        return said
    kinds = (tensor.dtype for tensor in checkpoint.tensors.values())
    return next((kind for kind in kinds if kind in _FLOATS), torch.float32)


def _check_shapes(model: nn.Module, places: dict[str, Stored], checkpoint: Checkpoint, folder: Path) -> None:
    """The weights are those of the model, and it computes no more beside them than it may."""
    for name, tensor in model.state_dict().items():
        stored = places.get(name)
        if stored is not None and stored.shape != tuple(tensor.shape):
            raise GraphPruneError(
                f"{folder}: {name!r} has shape {list(stored.shape)}, but {CONFIG} describes one of "
                f"{list(tensor.shape)}: they do not belong together."
            )
        if stored is not None and stored.dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise GraphPruneError(f"{folder}: {name!r} is {stored.dtype}, but {CONFIG} describes {tensor.dtype}.")
    beside = [item for name, item in held_tensors(model).items() if item.kind != "parameter" and name not in places]
    computed = sum(item.tensor.nbytes for item in beside)
    if computed > max(_COMPUTED, checkpoint.bytes):
        raise GraphPruneError(
            f"{folder / CONFIG} describes a model that computes {computed:,} bytes of buffers: it is not built."
        )


def _put(model: Any, places: dict[str, Stored], dtype: torch.dtype) -> None:
    """Give every tensor that the checkpoint has its stand-in, in the dtype that from_pretrained gives it."""
    other_dtype = _exceptions(model._get_dtype_plan(dtype))
    held = held_tensors(model)
    for name, stored in places.items():
        place = held[name]
        wanted = other_dtype(name) or place.tensor.dtype
        if wanted != stored.dtype:
            stored = Converted(stored, wanted)
        if place.kind == "parameter":
            stored = Checked(stored, name)
        trains = stored.dtype.is_floating_point if place.kind == "parameter" else None
        replace_tensor(model, name, place.kind, stand_in(stored, trains))


def _exceptions(kept: dict[str, torch.dtype]) -> Callable[[str], torch.dtype | None]:
    """The dtype that a class keeps a weight in whatever it is loaded in, by the name of the weight."""
    from transformers.core_model_loading import build_glob_alternation

    if not kept:
        return lambda name: None
    pattern, by_group, _ = build_glob_alternation(list(kept))

    def look_up(name: str) -> torch.dtype | None:
        found = pattern.search(name)
        return None if found is None or found.lastgroup is None else kept[by_group[found.lastgroup]]

    return look_up


def _tie(model: Any, places: dict[str, Stored], folder: Path) -> None:
    """Tie what its class ties, as from_pretrained does: two that are both stored, only if they are equal.

    Raises :class:`GraphPruneError` when a parameter is in the checkpoint under no name.
    """
    missing = {name for name in model.state_dict() if name not in places}
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in places and source in places:
            if _equal(places[target], places[source]):
                missing.add(target)
            else:
                model.all_tied_weights_keys.pop(target)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if absent := sorted(missing & parameters.keys()):
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise GraphPruneError(f"{folder} has no weights for {absent[0]!r}{more} of {type(model).__name__}.")


def _equal(one: Stored, other: Stored) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return all(torch.equal(a, b) for a, b in zip(one.pieces(), other.pieces(), strict=True))


def _warn(model: Any, unknown: list[str], folder: Path) -> None:
    """Say what is left out, unless the class says that it may be."""
    known = "|".join((_LEFT_BEHIND, *(f"({one})" for one in model._keys_to_ignore_on_load_unexpected or ())))
    left = [name for name in unknown if not re.search(known, name)]
    if left:
        shown = ", ".join(left[:_SHOWN]) + (", …" if len(left) > _SHOWN else "")
        warnings.warn(
            f"{type(model).__name__} has no place for {len(left)} tensors of {folder} ({shown}); left out.",
            stacklevel=4,
        )


def _read_generation_config(model: Any, folder: Path) -> None:
    """As from_pretrained reads it: its own file, or else what config.json says."""
    import transformers

    if not model.can_generate():
        return
    kind, where = transformers.GenerationConfig, str(folder)
    try:
        with suppress(OSError):
            model.generation_config = kind.from_pretrained(where, local_files_only=True)
            return
        model.generation_config = kind.from_pretrained(
            where, config_file_name=CONFIG, _from_model_config=True, local_files_only=True
        )
    except Exception as error:  # whatever strange values make it do
        raise GraphPruneError(f"{folder} has a generation config that cannot be read: {error}.") from error
