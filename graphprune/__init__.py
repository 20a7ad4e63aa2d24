"""graphprune: a graph compiler that prunes PyTorch models.

>>> import graphprune
>>> small = graphprune.compile(model, 0.2)      # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from graphprune.after_import import after_import
from graphprune.errors import GraphPruneError

if TYPE_CHECKING:
    from graphprune.adapters import apply
    from graphprune.compiler import compile, inspect
    from graphprune.io.folder import load, save
    from graphprune.io.hub import push_to_hub
    from graphprune.io.model_card import update_card
    from graphprune.ir.knowledge import Knowledge
    from graphprune.ir.plan import Plan
    from graphprune.knowledge_distribution import knowledge
    from graphprune.recovery.recover import recover
    from graphprune.recovery.settings import Recovery
    from graphprune.recovery.shear import Shear, shear
    from graphprune.reporting import Report, report
    from graphprune.streaming.stream import stream

__version__ = "0.1.0"
__all__ = [
    "GraphPruneError",
    "Knowledge",
    "Plan",
    "Recovery",
    "Report",
    "Shear",
    "apply",
    "compile",
    "inspect",
    "knowledge",
    "load",
    "push_to_hub",
    "recover",
    "report",
    "save",
    "shear",
    "stream",
    "update_card",
]

# Imported on first use: `import graphprune` alone costs next to nothing.
_HOME = {
    "apply": "graphprune.adapters",
    "compile": "graphprune.compiler",
    "inspect": "graphprune.compiler",
    "knowledge": "graphprune.knowledge_distribution",
    "load": "graphprune.io.folder",
    "push_to_hub": "graphprune.io.hub",
    "recover": "graphprune.recovery.recover",
    "save": "graphprune.io.folder",
    "shear": "graphprune.recovery.shear",
    "stream": "graphprune.streaming.stream",
    "update_card": "graphprune.io.model_card",
    "Knowledge": "graphprune.ir.knowledge",
    "Plan": "graphprune.ir.plan",
    "Recovery": "graphprune.recovery.settings",
    "Shear": "graphprune.recovery.shear",
    "Report": "graphprune.reporting",
    "report": "graphprune.reporting",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'graphprune' has no attribute {name!r}")


# With transformers, whenever that is imported: its from_pretrained then loads what save wrote.
after_import("transformers.quantizers.auto", lambda: importlib.import_module("graphprune.deploy.quantizer"))
