"""A modelling file beside the weights: transformers then loads them without graphprune, with ``trust_remote_code``.

The file holds the source of :mod:`graphprune.deploy.resize` and a subclass of the stock class, under the same name, so
that whatever looks at the name of a class goes on working.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from torch import nn

import graphprune
from graphprune.deploy import resize
from graphprune.deploy.sizes_left import Sizes
from graphprune.io.stored_config import PORTABLE_KEY

_FILE = '''"""{name} after pruning: ``{key}`` in config.json says which sizes differ from those that its class builds.

    transformers.{auto}.from_pretrained(folder, trust_remote_code=True)

Written by graphprune {version}, which is not needed to load it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn


class {name}(transformers.{name}):
    """As its config describes it, with the sizes that pruning left."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        resize(self, config.{key})


{resize}'''
_START = "# --- resize ---"


def write_portable(model: nn.Module, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Write the modelling file into ``folder``; returns what config.json has to say then."""
    autos = auto_classes(model)
    module = "modeling_pruned_" + re.sub(r"\W", "_", str(model.config.model_type))  # type: ignore[union-attr]
    name = type(model).__name__
    text = _FILE.format(
        name=name,
        key=PORTABLE_KEY,
        auto=autos[0],
        version=graphprune.__version__,
        resize=inspect.getsource(resize).partition(_START)[2].lstrip(),
    )
    (folder / f"{module}.py").write_text(text, encoding="utf-8")
    return {PORTABLE_KEY: sizes, "auto_map": dict.fromkeys(autos, f"{module}.{name}")}


def auto_classes(model: nn.Module) -> list[str]:
    """The auto classes of transformers that load the class of ``model``; AutoModel where none does."""
    import transformers

    names = [name for name in dir(transformers) if name.startswith("AutoModel")]
    config_kind = type(model.config)
    found = []
    for name in names:
        mapping = getattr(getattr(transformers, name), "_model_mapping", None)
        if mapping is None or config_kind not in mapping:
            continue
        kinds = mapping[config_kind]
        if type(model) in (kinds if isinstance(kinds, (tuple, list)) else (kinds,)):
            found.append(name)
    # The task that a model is for comes first.
    return sorted(found, key=lambda name: (name == "AutoModel", name)) or ["AutoModel"]
