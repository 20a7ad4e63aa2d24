"""The class of a model as transformers builds it from a config: on the meta device, and every size that it then has."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig

from graphprune.errors import GraphPruneError
from graphprune.io.empty_model import class_in_transformers, without_weights
from graphprune.io.stored_config import read_settings
from graphprune.trace.provenance import Attribute, get_attribute
from graphprune.trace.quiet import REFUSALS, log_level

# Keys from the config inwards: ("vision_config", "hidden_size"), ("hidden_sizes", 2), and, in a config that may say
# other things of every layer, ("per_layer_config", "3", "num_attention_heads").
Path = tuple[str | int, ...]
Settings = dict[str, Any]
PER_LAYER = "per_layer_config"

# Lists of sizes have one for every layer, or stage, at most.
_LONGEST = 256

# What a class raises of settings that it cannot be built from.
STOCK_REFUSALS = (*REFUSALS, ArithmeticError, ImportError, StrictDataclassError)

_TRYING: ContextVar[bool] = ContextVar("_TRYING", default=False)


@dataclass(frozen=True, order=True)
class Row:
    """One number of a built model.

    ``kind`` is ``"tensor"`` (a dimension of a parameter or of a buffer in the state dict), ``"computed"`` (one of a
    buffer that the class computes itself), ``"number"`` (a float that a module holds) or ``"size"`` (an integer that
    forward uses as a size).
    """

    kind: str
    name: str
    place: int = 0

    def __str__(self) -> str:
        return f"{self.name}[{self.place}]" if self.kind in ("tensor", "computed") else self.name


Rows = dict[Row, float]


class Stock:
    """Builds the class of ``model`` from settings that are like those in its config.json.

    Raises :class:`GraphPruneError` for a class that transformers does not have.
    """

    def __init__(self, model: nn.Module):
        name = type(model).__name__
        config: Any = getattr(model, "config", None)
        if class_in_transformers(name) is not type(model) or not hasattr(config, "to_json_string"):
            raise GraphPruneError(
                f"deploy='transformers' needs a model class of transformers, with its config; {name} is none: leave it "
                "out, and load with graphprune.load what save writes. Merge adapters first (merge_and_unload)."
            )
        self.kind: Any = type(model)
        self.config_kind: Any = type(config)
        self.settings = settings_of(config)
        self._dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        self._choices = {
            name: value
            for name, held in (
                ("attn_implementation", "_attn_implementation"),
                ("experts_implementation", "_experts_implementation"),
            )
            if isinstance(value := getattr(config, held, None), str)
        }

    def config(self, settings: Settings) -> Any:
        """The config that from_pretrained makes of settings."""
        with trying():
            return self.config_kind.from_dict(copy.deepcopy(settings))

    def build(self, settings: Settings) -> nn.Module:
        """The model on the meta device."""
        with torch.device("meta"):
            return self._from(self.config(settings))

    def build_with_buffers(self, settings: Settings) -> nn.Module:
        """The model with parameters on the meta device, and the buffers that its class computes."""
        with without_weights(computes=True):
            return self._from(self.config(settings))

    def try_to_build(self, settings: Settings) -> nn.Module | None:
        """The model on the meta device, or None when its class refuses the settings."""
        try:
            return self.build(settings)
        except STOCK_REFUSALS:
            return None

    def missing(self, settings: Settings) -> list[Path]:
        """Settings that the constructors ask the config for, and that it does not have."""
        config = self.config(settings)
        asked: dict[Path, None] = {}
        for path, one in _configs(config, ()):
            one.__class__ = _listening(type(one), path, asked)
        with torch.device("meta"):
            self._from(config)
        return list(asked)

    def integers(self, settings: Settings) -> list[Path]:
        """Every setting that is a positive integer, in lists and in configs in the config too."""
        return [path for path, value in _entries(self.config(settings), settings) if type(value) is int and value > 0]

    def unset(self, settings: Settings) -> list[Path]:
        """Every setting that is None."""
        return [path for path, value in _entries(self.config(settings), settings) if value is None]

    def layers(self, settings: Settings, inside: Path) -> int:
        """How many layers the config at ``inside`` may describe one by one; 0 for one that describes no layers."""
        config = dict(_configs(self.config(settings), ()))[inside]
        count = getattr(config, "num_hidden_layers", None)
        return count if type(count) is int and hasattr(config, PER_LAYER) else 0

    def _from(self, config: Any) -> nn.Module:
        with trying():
            return self.kind._from_config(config, dtype=self._dtype, **self._choices)


def settings_of(config: Any) -> Settings:
    """All that a config says, as config.json would say it."""
    return _plain_layers(read_settings(json.loads(config.to_json_string(use_diff=False))))


def _plain_layers(settings: Any) -> Any:
    """The numbers of layers as they are counted: transformers writes 03."""
    if not isinstance(settings, dict):
        return settings
    plain = {key: _plain_layers(value) for key, value in settings.items()}
    if isinstance(plain.get(PER_LAYER), dict):
        plain[PER_LAYER] = {str(int(layer)): value for layer, value in plain[PER_LAYER].items()}
    return plain


def at(settings: Settings, path: Path) -> Any:
    """One setting; None where it is missing."""
    found: Any = settings
    for key in path:
        found = found[key] if isinstance(key, int) else (found or {}).get(key)
    return found


def changed(settings: Settings, values: dict[Path, int]) -> Settings:
    """A copy with other values; those that are missing are added."""
    made = copy.deepcopy(settings)
    for path, value in values.items():
        inner: Any = made
        for key in path[:-1]:
            inner = inner[key] if isinstance(key, int) or inner.get(key) is not None else inner.setdefault(key, {})
        inner[path[-1]] = value
    return made


def rows_of(model: nn.Module, attributes: Iterable[Attribute]) -> Rows:
    """Every number of a model that its config may say: see :class:`Row`."""
    rows: Rows = {}
    hidden = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in held:
        kind = "computed" if name in hidden else "tensor"
        rows |= {Row(kind, name, dim): size for dim, size in enumerate(tensor.shape)}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) is float:
                rows[Row("number", f"{path}.{name}")] = value
    for attribute in attributes:
        try:
            rows[Row("size", str(attribute))] = get_attribute(model, attribute)
        except (AttributeError, KeyError, IndexError, TypeError):
            continue  # the class only has it after a forward
    return rows


def _configs(config: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "to_json_string"):
            yield from _configs(value, (*path, name))


def _entries(config: Any, settings: Settings) -> Iterator[tuple[Path, Any]]:
    for path, _ in _configs(config, ()):
        for key, value in (at(settings, path) or {}).items():
            yield (*path, key), value
            if isinstance(value, list) and len(value) <= _LONGEST and all(type(item) is int for item in value):
                yield from (((*path, key, place), item) for place, item in enumerate(value))


def _listening(kind: type, path: Path, asked: dict[Path, None]) -> type:
    """A class like ``kind`` that writes down what is asked for and not there."""

    def __getattr__(self: Any, name: str) -> Any:
        if not name.startswith("_"):
            asked[(*path, name)] = None
        inherited = getattr(super(made, self), "__getattr__", None)
        if inherited is not None:
            return inherited(name)
        raise AttributeError(name)

    made = type(kind.__name__, (kind,), {"__getattr__": __getattr__})
    return made


@contextmanager
def trying() -> Iterator[None]:
    """No warnings about settings that are only tried, nor any time for the message that every config is logged with.

    Entered around many tries, it is there for all of them: changing the level of a logger takes longer than a config.
    """
    if _TRYING.get():
        yield
        return
    token = _TRYING.set(True)
    try:
        with (
            log_level(logging.CRITICAL, "transformers"),
            warnings.catch_warnings(),
            patch.object(PreTrainedConfig, "__repr__", object.__repr__),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        _TRYING.reset(token)
