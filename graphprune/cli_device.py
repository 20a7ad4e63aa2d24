"""The device that a command runs on."""

from __future__ import annotations

from typing import Any

from graphprune.errors import GraphPruneError


def device_of(name: str | None) -> Any:
    """What ``--device`` names; without it CUDA where there is one.

    Raises :class:`GraphPruneError` for a device that cannot be used.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GraphPruneError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device
