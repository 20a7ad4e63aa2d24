"""Plan → smaller dense model of the same class.

Two passes, as in LoRAShear (arXiv 2310.18356, Section 3): first every producer keeps its rows (the primary dimension),
then every consumer keeps the columns that the producers left (the secondary dimension). Both only collect indices;
each tensor is sliced once, and tied tensors stay tied.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from graphprune.deploy.resize import refresh_torch_attributes
from graphprune.ir.program import Program
from graphprune.ir.selection import index_of
from graphprune.passes.base import compiler_pass
from graphprune.passes.biases import add_new_biases
from graphprune.trace.adapters import refresh_sizes
from graphprune.trace.provenance import set_attribute
from graphprune.trace.skeleton import copy_structure, names, tensors
from graphprune.trace.stored import Stored, stand_in_like

# Dimension → the old index of every new one, int64 with as many dimensions as the tensor. Its size is 1 in all others,
# unless the axis is ragged and what is kept depends on the place in another dimension.
Keep = dict[int, torch.Tensor]
Slices = dict[int, Keep]  # id of a tensor of the model → what to keep of it


@compiler_pass(requires=("plan", "axes", "new_attributes"), ensures=("pruned",))
def rewrite(program: Program) -> None:
    """Build the pruned model: a new one, or the given one changed in place with ``inplace``."""
    slices = collect_slices(program)
    if program.options.inplace:
        program.pruned = program.model
        for tensor in list(tensors(program.model)):
            if id(tensor) in slices or id(tensor) in program.updates:
                tensor.data = sliced(program.weight(tensor), slices.get(id(tensor), {}))
                tensor.grad = None
    else:
        program.pruned = copy_structure(
            program.model, lambda tensor: _pruned(program, tensor, slices.get(id(tensor), {}))
        )
    finish(program, program.pruned)


def _pruned(program: Program, tensor: torch.Tensor, keep: Keep) -> torch.Tensor:
    stored = program.stored(tensor)
    if stored is not None:
        return stand_in_like(Sliced(stored, keep), tensor)
    return like(tensor, sliced(program.weight(tensor), keep))


def finish(program: Program, model: nn.Module) -> None:
    """Give ``model``, whose tensors have their new shapes, the integers that go with them."""
    for attribute, value in program.need("new_attributes").items():
        set_attribute(model, attribute, value)
    add_new_biases(program, model)
    refresh_torch_attributes(model)
    refresh_sizes(model)


def collect_slices(program: Program) -> Slices:
    """The kept indices of every sliced dimension: pass 1 the primary ones, pass 2 the secondary ones."""
    axes = program.need("axes")
    selection = program.selection()
    consumed = program.consumed()
    held = names(program.model)
    slices: Slices = {}

    def collect(wanted: Callable[[str, int], bool]) -> None:
        for name, dims in axes.tensors.items():
            for dim in range(len(dims)):
                if wanted(name, dim) and (index := index_of(dims, dim, selection)) is not None:
                    slices.setdefault(id(held[name]), {})[dim] = index

    collect(lambda name, dim: (name, dim) not in consumed)
    collect(lambda name, dim: (name, dim) in consumed)
    return slices


def sliced(tensor: torch.Tensor, keep: Keep) -> torch.Tensor:
    """A contiguous copy of ``tensor`` with only the kept indices of each dimension in ``keep``."""
    out = tensor.detach()
    if not keep:
        return out.clone()
    plain = [dim for dim, index in keep.items() if index.numel() == index.shape[dim]]
    # The dimension that loses most first, so that what lies between is small.
    for dim in sorted(plain, key=lambda d: keep[d].shape[d] / tensor.shape[d]):
        out = _selected(out, dim, keep[dim].flatten().to(out.device))
    if len(plain) == len(keep):
        return out
    shape = sliced_shape(tensor, keep)
    places = []
    for dim, size in enumerate(shape):
        place = torch.arange(size).view([-1 if d == dim else 1 for d in range(len(shape))])
        places.append((place if dim in plain else keep.get(dim, place)).to(out.device))
    return out[tuple(places)]


_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _selected(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """``index_select``; along the last dimension of a matrix on the CPU NumPy does it several times sooner."""
    whole = _WHOLE.get(tensor.itemsize)
    if dim == 0 or dim != tensor.ndim - 1 or not tensor.is_cpu or not tensor.is_contiguous() or whole is None:
        return tensor.index_select(dim, index)
    taken = np.take(tensor.view(whole).numpy(), index.numpy(), axis=dim)
    return torch.from_numpy(taken).view(tensor.dtype)


class Sliced(Stored):
    """What :func:`sliced` makes of a tensor on disk, sliced as it is read.

    Every row of ``source`` is read when all rows are.
    """

    def __init__(self, source: Stored, keep: Keep):
        super().__init__(tuple(sliced_shape(source, keep)), source.dtype)
        self._source, self._keep = source, keep
        self._first = keep.get(0)
        ragged = self._first is not None and self._first.numel() != self._first.shape[0]
        self.whole = source.whole or ragged  # which rows are kept is another question in every column

    def rows(self, start: int, stop: int) -> torch.Tensor:
        if self.whole:
            return sliced(self._source.read(), self._keep)[start:stop]
        keep = {d: index[start:stop] if len(index) > 1 else index for d, index in self._keep.items() if d}
        if self._first is None:
            return sliced(self._source.rows(start, stop), keep) if keep else self._source.rows(start, stop)
        kept = self._first.flatten()
        low = int(kept[start]) if start else 0
        high = int(kept[stop]) if stop < len(kept) else self._source.length
        keep[0] = self._first[start:stop] - low
        return sliced(self._source.rows(low, high), keep)


def sliced_shape(tensor: torch.Tensor | Stored, keep: Keep) -> list[int]:
    """The shape that :func:`sliced` leaves."""
    return [keep[dim].shape[dim] if dim in keep else size for dim, size in enumerate(tensor.shape)]


def like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """``new`` as the same kind of tensor as ``old``: a parameter with its requires_grad, or a buffer."""
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new
