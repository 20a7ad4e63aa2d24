"""What transformers does to a checkpoint on its way into a model, done to weights that stay on disk.

It renames tensors, and makes one of several: the experts of a mixture are stored one by one and held as one batch. Both
is taken from its own tables. Stacking and joining are done as rows are read; any other operation runs as it is, on one
whole tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphPruneError, first_line
from graphprune.trace.stored import Stored


class Stacked(Stored):
    """Several of one shape along a new first dimension."""

    def __init__(self, sources: list[Stored]):
        super().__init__((len(sources), *sources[0].shape), sources[0].dtype)
        self._sources = sources

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return torch.stack([source.read() for source in self._sources[start:stop]])


class Joined(Stored):
    """Several side by side along a dimension that is not the first."""

    def __init__(self, sources: list[Stored], dim: int):
        shape = list(sources[0].shape)
        shape[dim] = sum(source.shape[dim] for source in sources)
        super().__init__(tuple(shape), sources[0].dtype)
        self.whole = any(source.whole for source in sources)
        self._sources, self._dim = sources, dim

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return torch.cat([source.rows(start, stop) for source in self._sources], dim=self._dim)


class Computed(Stored):
    """What a converter of transformers makes of several tensors, under one of the names that it gives."""

    whole = True

    def __init__(self, group: _Group, name: str, shape: tuple[int, ...], dtype: torch.dtype):
        super().__init__(shape, dtype)
        self._group, self._name = group, name

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self._group.converted(read=True)[self._name][start:stop]


class _Group:
    """The tensors of a checkpoint that one converter turns into some of the model: source pattern → tensors."""

    def __init__(self, converter: Any, target: str, model: nn.Module):
        self._converter, self._target, self._model = converter, target, model
        self.sources: dict[str, list[tuple[str, Stored]]] = {}

    def add(self, key: str, pattern: str, tensor: Stored) -> None:
        self.sources.setdefault(pattern, []).append((key, tensor))

    def results(self) -> dict[str, Stored]:
        """What it makes, by the names in the model."""
        simple = self._simple()
        if simple is not None:
            return {self._target: simple}
        made = self.converted(read=False)
        return {name: Computed(self, name, tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}

    def _simple(self) -> Stored | None:
        """Stacks, joined along a dimension behind the first; None where it is anything else."""
        operations = [(type(one).__name__, getattr(one, "dim", None)) for one in self._converter.operations]
        lists = [[tensor for _, tensor in self.sources[pattern]] for pattern in self._patterns()]
        alike = all(one.shape == some[0].shape and one.dtype == lists[0][0].dtype for some in lists for one in some)
        if not alike or operations[:1] != [("MergeModulelist", 0)] or len({len(some) for some in lists}) > 1:
            return None
        stacks: list[Stored] = [Stacked(some) for some in lists]
        if len(operations) == 1 and len(stacks) == 1:
            return stacks[0]
        name, dim = operations[1] if len(operations) == 2 else ("", None)
        if name != "Concatenate" or type(dim) is not int or not 0 < dim < len(stacks[0].shape):
            return None
        rest = {(*stack.shape[:dim], *stack.shape[dim + 1 :]) for stack in stacks}
        return Joined(stacks, dim) if len(rest) == 1 else None

    def _patterns(self) -> list[str]:
        """In the order that the converter joins them in."""
        return [pattern for pattern in self._converter.source_patterns if pattern in self.sources]

    def converted(self, read: bool) -> dict[str, torch.Tensor]:
        """Run the converter, on the meta device unless values are to be ``read``."""
        converter = copy.deepcopy(self._converter)
        for pattern, found in self.sources.items():
            for key, stored in found:
                value = stored.read() if read else torch.empty(stored.shape, dtype=stored.dtype, device="meta")
                converter.add_tensor(self._target, key, pattern, lambda value=value: value)
        made = converter.convert(self._target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def converted(model: Any, tensors: Mapping[str, Stored], where: str) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of a checkpoint as ``model``, of a class of transformers, holds them; and the names it has none for.

    Raises :class:`GraphPruneError` when a converter refuses them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    places, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Stored] = {}
    groups: dict[str, _Group] = {}
    unknown = []
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, places)
        if name not in places and key in places:
            name, pattern = rename_source_key(key, [], [], prefix, places)
        if name not in places:
            unknown.append(key)
        elif pattern is None:
            if name in found:
                raise GraphPruneError(f"{where}: {name!r} is there twice, once as {key!r}.")
            found[name] = tensors[key]
        else:
            group = groups.setdefault(name, _Group(by_pattern[pattern], name, model))
            group.add(key, pattern, tensors[key])
    for name, group in groups.items():
        try:
            found |= group.results()
        except Exception as error:  # whatever strange shapes make it do
            raise GraphPruneError(
                f"{where}: the weights of {name!r} do not fit together: {first_line(error)}"
            ) from error
    return found, unknown
