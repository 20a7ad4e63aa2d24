"""Start a forward in the middle: blocks that run before anything changes return what they returned before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from graphprune.passes.score.gradients import blocks_of

Call = Callable[..., Any]


class Prefix:
    """What every block of a model returned, call by call, in one forward, and after how many calls weights were used.

    Blocks are those that transformers marks as fit to run a second time; a model without any starts at the beginning.
    """

    def __init__(self) -> None:
        self.outputs: list[Any] = []
        self.first_use: dict[str, int] = {}  # name of a parameter → calls that were finished when it was first used

    @contextmanager
    def record(self, model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Fill it with the forward inside. ``weights``: the parameters of ``model`` to look for, by name."""

        def call(plain: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
            found = plain(*args, **kwargs)
            self.outputs.append(_cloned(found))
            return found

        with _around_blocks(model, call), _Uses(weights, self):
            yield

    @contextmanager
    def replay(self, model: nn.Module, calls: int) -> Iterator[None]:
        """The first ``calls`` calls of blocks inside do not run."""
        left: list[Any] = self.outputs[:calls][::-1]

        def call(plain: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
            return _cloned(left.pop()) if left else plain(*args, **kwargs)

        with _around_blocks(model, call):
            yield

    def calls_before(self, weights: Sequence[str]) -> int:
        """How many calls of blocks are over before any of these parameters is used; 0 where that was not seen."""
        return min((self.first_use.get(name, 0) for name in weights), default=0)


class _Uses(TorchFunctionMode):
    def __init__(self, weights: Mapping[str, torch.Tensor], prefix: Prefix):
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}
        self._prefix = prefix

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            name = self._names.get(id(leaf))
            if name is not None:
                self._prefix.first_use.setdefault(name, len(self._prefix.outputs))
        return func(*args, **(kwargs or {}))


def _cloned(found: Any) -> Any:
    """A block may return what is written to afterwards."""
    return tree_map_only(torch.Tensor, torch.clone, found)


@contextmanager
def _around_blocks(model: nn.Module, call: Callable[[Call, tuple, dict[str, Any]], Any]) -> Iterator[None]:
    """Every block of ``model`` runs as ``call(its forward, args, kwargs)`` inside."""
    plain = [(block, block.forward) for block in blocks_of(model)]

    def instead(forward: Call) -> Call:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            return call(forward, args, kwargs)

        return run

    try:
        for block, forward in plain:
            block.forward = instead(forward)
        yield
    finally:
        for block, forward in plain:
            block.forward = forward
