"""Which implementation of attention and of experts is traced and verified.

Transformers models choose these by a setting in their config. Some settings cannot be exported (fused kernels, loops
over the experts that were hit), or not run where the compiler runs (packages that are not installed, GPUs only). On a
copy of the model they are set to one that can; all of them compute the same. The user's model keeps its own.

All that is known of transformers' names for them is in this file; ``tests/trace/test_backends.py`` tells when they
change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from graphprune.trace.provenance import configs_of

ATTENTION, EXPERTS = "_attn_implementation_internal", "_experts_implementation_internal"


def use_portable(copy: nn.Module, *, tracing: bool) -> None:
    """Set ``copy`` (never the user's model) to implementations that run anywhere and, if ``tracing``, export too.

    Settings that transformers does not define itself are left as they are.
    """
    has_sdpa = getattr(copy, "_supports_sdpa", True)
    for config in _configs(copy):
        settings = vars(config)
        if _is_fused(settings.get(ATTENTION)):
            settings[ATTENTION] = "sdpa" if has_sdpa else "eager"
        experts = settings.get(EXPERTS)
        if experts in ("deepgemm", "sonicmoe") or (tracing and experts == "eager"):
            settings[EXPERTS] = "grouped_mm"


def _is_fused(attention: Any) -> bool:
    """FlashAttention, FlexAttention, paged caches, and kernels from a hub (``owner/name``)."""
    return isinstance(attention, str) and (attention.startswith(("flash", "flex", "paged|")) or "/" in attention)


def _configs(model: nn.Module) -> Iterator[Any]:
    """Every settings object that a module holds, and those inside them, once."""
    seen: set[int] = set()
    queue: list[Any] = list(model.modules())
    while queue:
        for _, config in configs_of(queue.pop()):
            if id(config) not in seen:
                seen.add(id(config))
                queue.append(config)
                yield config
