"""The unpruned model without weights: built on the meta device, from a class of transformers or a function."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from graphprune.errors import GraphPruneError, first_line
from graphprune.io.manifest import CONFIG, MANIFEST, Manifest
from graphprune.io.stored_config import read_config

Factory = Callable[[], nn.Module]

# Other names may make transformers fetch and run a kernel from elsewhere.
_ATTENTION = ("eager", "sdpa")
# Bytes that may always be allocated to build a model, and how many times the bytes of its files.
_ALWAYS, _TIMES_STORED = 2**30, 8


def class_in_transformers(name: str) -> type | None:
    """The model class that transformers knows under ``name``, or None. No other module is ever looked into."""
    import transformers

    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        return None
    try:
        found = getattr(transformers, name)
    except (AttributeError, ImportError, RuntimeError):  # RuntimeError: the class needs a package that is not there
        return None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def empty_model(
    manifest: Manifest, folder: Path, factory: Factory | None, dtype: torch.dtype | None, computes: bool = False
) -> nn.Module:
    """The model that config.json describes, every tensor on the meta device; with ``computes`` only the parameters are.

    Buffers then have the values that the class gives them.

    Raises:
        GraphPruneError: when the class is not one of transformers and there is no ``factory``, when the factory builds
            something else, or when config.json is not one of that class.
    """
    if factory is not None:
        return _from_factory(manifest, factory, computes)
    if not manifest.in_transformers:
        raise GraphPruneError(
            f"{folder} holds a {manifest.class_name}, which is no class of transformers: give "
            "load(folder, model=f), where f() builds the model as it was before pruning."
        )
    found = class_in_transformers(manifest.class_name)
    if found is None:
        raise GraphPruneError(
            f"{folder} holds a {manifest.class_name}, which the installed transformers does not have as a model class "
            f"(written with {manifest.versions.get('transformers', 'an unknown version')})."
        )
    return _from_config(found, manifest, folder, dtype, computes)


def without_weights(computes: bool) -> AbstractContextManager[Any]:
    """Models made inside have no weights; with ``computes``, buffers have their values."""
    if not computes:
        return torch.device("meta")
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


def _from_factory(manifest: Manifest, factory: Factory, computes: bool) -> nn.Module:
    if isinstance(factory, nn.Module) or not callable(factory):
        raise GraphPruneError("model must be a function without arguments that builds the unpruned model.")
    with without_weights(computes):
        built = factory()
    if not isinstance(built, nn.Module) or type(built).__name__ != manifest.class_name:
        raise GraphPruneError(f"model() built a {type(built).__name__}; the folder holds a {manifest.class_name}.")
    return built


def _from_config(found: Any, manifest: Manifest, folder: Path, dtype: torch.dtype | None, computes: bool) -> nn.Module:
    data = read_config(folder)
    options = {"attn_implementation": manifest.attention} if manifest.attention in _ATTENTION else {}

    def build(computes: bool) -> nn.Module:
        config = found.config_class.from_dict(copy.deepcopy(data))
        with without_weights(computes), at_most(4 * (len(manifest.tensors) + len(manifest.ties)) + 64, MANIFEST):
            return found._from_config(config, dtype=dtype, **options)

    try:
        if not computes:
            return build(False)
        _refuse_absurd(build(False), manifest)
        return build(True)
    except GraphPruneError:
        raise
    except Exception as error:  # whatever a strange config makes a constructor do
        raise GraphPruneError(f"{folder / CONFIG} describes no {manifest.class_name}: {first_line(error)}") from error


def _refuse_absurd(model: nn.Module, manifest: Manifest) -> None:
    """With ``computes`` a class makes its buffers, and for a moment each parameter, in memory: not any size is let.

    ``model`` is what it makes on the meta device. What the folder itself takes is a measure that cannot be forged.
    """
    most = max(_ALWAYS, _TIMES_STORED * sum(file.bytes for file in manifest.files.values()))
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.named_parameters()}
    sizes["its buffers"] = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    name = max(sizes, key=lambda one: sizes[one])
    if sizes[name] > most:
        raise GraphPruneError(
            f"{CONFIG} describes a model where {name} would take {sizes[name]:,} bytes, far more than is in the folder."
        )


@contextmanager
def at_most(count: int, listed: str) -> Iterator[None]:
    """Stop a config with a billion layers: a model cannot have many more parameters than ``listed`` has tensors."""
    thread = threading.get_ident()
    made = 0

    def counted(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal made
        if threading.get_ident() != thread or parameter is None:
            return
        made += 1
        if made > count:
            raise GraphPruneError(f"{CONFIG} describes a model with far more tensors than {listed} lists.")

    hook = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()
