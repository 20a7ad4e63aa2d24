"""Fingerprints: what tells one model, and one set of data, from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from graphprune.trace.skeleton import names

_BYTES = 2**26  # of a tensor at a time: it may have to come from another device


def fingerprint(*parts: str) -> str:
    """One for several."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=20).hexdigest()


def of_model(model: nn.Module) -> str:
    """Of every weight bit by bit, with its names, shape and dtype, and of the code around: classes and plain values.

    Values are numbers, texts, functions, tuples and lists of these that modules hold, and the configs of transformers.
    """
    found = hashlib.blake2b(digest_size=20)
    seen: dict[int, str] = {}
    for name, tensor in names(model).items():
        found.update(f"{name}\0{seen.get(id(tensor), '')}\0".encode())  # a tied tensor is that of its first name
        if id(tensor) not in seen:
            _add(found, tensor)
            seen[id(tensor)] = name
    for path, module in model.named_modules():
        found.update(f"{path}\0{type(module).__module__}.{type(module).__qualname__}\0".encode())
        for name, value in sorted(vars(module).items()):
            text = _plain(value) if name != "training" and not name.startswith("__") else None
            if text is not None:
                found.update(f"{name}={text}\0".encode())
    return found.hexdigest()


def of_batches(batches: Iterable[Mapping[str, Any]]) -> str:
    """Of the tensors of every batch, and of all else in it by what it prints as."""
    found = hashlib.blake2b(digest_size=20)
    for batch in batches:
        leaves, spec = tree_flatten(dict(batch))
        found.update(f"{spec}\0".encode())
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                _add(found, leaf)
            else:
                found.update(f"{leaf!r}\0".encode())
    return found.hexdigest()


def _add(found: Any, tensor: torch.Tensor) -> None:
    found.update(f"{tuple(tensor.shape)}{tensor.dtype}\0".encode())
    flat = tensor.detach().reshape(-1)
    for piece in flat.split(max(1, _BYTES // tensor.element_size())):
        if piece.numel():
            found.update(piece.cpu().contiguous().view(torch.uint8).numpy())


def _plain(value: Any) -> str | None:
    """The text of a value that decides what a forward computes; None of anything that is not plain."""
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        inside = [_plain(one) for one in value]
        return None if None in inside else f"{type(value).__name__}({', '.join(map(str, inside))})"
    if hasattr(value, "to_dict") and not isinstance(value, nn.Module):
        return str(sorted((str(key), repr(one)) for key, one in value.to_dict().items()))
    return getattr(value, "__qualname__", None) if callable(value) and not isinstance(value, nn.Module) else None
