"""The name and place in config.json by which transformers finds :mod:`graphprune.deploy.quantizer`."""

from __future__ import annotations

from typing import Any

METHOD = "graphprune"


def quantization_config(sizes: dict[str, Any]) -> dict[str, Any]:
    """What config.json says so that the registered quantizer is asked; a key and its value."""
    return {"quantization_config": {"quant_method": METHOD, **sizes}}
