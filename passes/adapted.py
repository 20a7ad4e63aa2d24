"""A trainable view of a program: its adapters, the structures they speak for, and a gate on each structure.

The *trainable variables* of a removal structure (LoRAShear, arXiv 2310.18356, Algorithm 2) are the rows of ``B`` and
the columns of ``A`` that lie on it, beside the frozen rows and columns of the weights themselves. A :class:`Part` says
which of one adapted layer these are. The model that trains is a copy: frozen weights are shared, adapters are its own.

Structures fade by *gates*: every layer that reads an axis multiplies what it reads by the gates of its indices. That is
the merged weight ``W + s·BA`` with the columns of a structure scaled, whatever type the frozen ``W`` has, and a gate of
0 is exactly the removal of the structure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graphprune.errors import GraphPruneError
from graphprune.ir.axes import find, leaves
from graphprune.ir.program import Program
from graphprune.passes.build_node_groups import weight_contractions
from graphprune.passes.prune_in_order import owners_of, positions_of
from graphprune.trace.adapters import LowRank, low_rank_layers
from graphprune.trace.quantised import quantised_value
from graphprune.trace.skeleton import copy_structure

_CHANNELS_LAST = (nn.Linear, Conv1D)
_CHANNELS_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Part:
    """What the structures of a group own of one adapted layer.

    ``reads``: columns of ``W`` and of ``A``; else rows of ``W`` and of ``B``. ``blocks`` are the positions that each
    structure owns, int64 of shape ``(size, positions per index)``.
    """

    layer: LowRank
    reads: bool
    blocks: torch.Tensor

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Values of shape ``(out, in)``, summed over what each structure owns: float32 of shape ``(size,)``."""
        return values.sum(0 if self.reads else 1)[self.blocks].sum(1).float()


class Adapted:
    """The trainable copy of a program's model.

    Attributes:
        device: where gates and positions are, that of the first weight.
        model: the copy, in eval mode but for the dropout of adapters; only adapters require gradients.
        layers: every adapted layer whose update is low-rank and that a prunable structure owns a part of.
        parts: name of a prunable group → its parts; groups that no layer reads are absent.
        gates: name of a group → a factor in [0, 1] for each of its structures, float32 of shape ``(size,)``.
    """

    def __init__(self, program: Program):
        self.program = program
        self.model = _trainable_copy(program)
        self.device = next(self.model.parameters()).device
        self.layers = {layer.path: layer for layer in low_rank_layers(self.model)}
        if not self.layers:
            raise GraphPruneError(
                f"{type(program.model).__name__} has no LoRA layers to train: give it some (peft.get_peft_model), or "
                "a model that has linear layers and no adapters, which get some by themselves."
            )
        self.parts: dict[str, list[Part]] = {}
        self.gates: dict[str, torch.Tensor] = {}
        self._close()
        self._find_parts()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that trains, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def hand_over(self) -> None:
        """Tell the program what the adapters have become."""
        held = dict(self.program.model.named_parameters())
        for name, parameter in self.trainable().items():
            self.program.updates[id(held[name])] = parameter.detach()

    def parts_by_layer(self) -> Iterator[tuple[LowRank, list[tuple[str, Part]]]]:
        """Every layer with the parts of it and the groups that own them, so that each merged weight is made once."""
        found: dict[str, list[tuple[str, Part]]] = {}
        for name, parts in self.parts.items():
            for part in parts:
                found.setdefault(part.layer.path, []).append((name, part))
        for path, parts in found.items():
            yield self.layers[path], parts

    def _close(self) -> None:
        """Put a gate in front of every layer that reads a prunable axis."""
        program = self.program
        axes = program.need("axes")
        groups = {find(group.axis): group for group in program.need("prunable")}
        sites: dict[str, list[tuple[str, torch.Tensor]]] = {}
        closed: dict[str, set[bool]] = {}
        for _, name, dim in weight_contractions(program):
            owners = [leaf for leaf in dict.fromkeys(leaves(axes.tensors[name][dim])) if leaf in groups]
            path = name.rpartition(".")[0].removesuffix(".base_layer")
            inside = any(path.startswith(f"{layer}.") for layer in self.layers)
            for leaf in owners if not inside else ():
                known = isinstance(self._module(path), (*_CHANNELS_LAST, *_CHANNELS_FIRST))
                closed.setdefault(groups[leaf].name, set()).add(known)
                owned = owners_of(axes.tensors[name][dim], leaf)
                sites.setdefault(path, []).append((groups[leaf].name, owned))
        for group in program.need("prunable"):
            if closed.get(group.name) == {True}:
                self.gates[group.name] = torch.ones(group.size, device=self.device)
        for path, gated in sites.items():
            wanted = {n: owned.to(self.device) for n, owned in gated if n in self.gates}
            if wanted:
                self.model.get_submodule(path).register_forward_pre_hook(self._gate(path, wanted))

    def _module(self, path: str) -> nn.Module:
        """The layer at ``path``, without the adapters around it."""
        return self.layers[path].base if path in self.layers else self.model.get_submodule(path)

    def _gate(self, path: str, wanted: dict[str, torch.Tensor]) -> Any:
        first = isinstance(self._module(path), _CHANNELS_FIRST)

        def gate(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            for name, owners in wanted.items():
                gates = self.gates[name]
                if bool((gates < 1).any()):
                    factors = torch.cat([gates, gates.new_ones(1)])[owners].to(x.dtype)
                    x = x * (factors.view(-1, *[1] * (x.ndim - 2)) if first else factors)
            return (x, *args[1:])

        return gate

    def _find_parts(self) -> None:
        axes = self.program.need("axes")
        for group in self.program.need("prunable"):
            for member in group.members if group.name in self.gates else ():
                path, _, kind = member.tensor.rpartition(".")
                layer = self.layers.get(path.removesuffix(".base_layer"))
                if layer is None or kind != "weight" or not path.endswith(".base_layer") or member.dim > 1:
                    continue
                owners = owners_of(axes.tensors[member.tensor][member.dim], find(group.axis))
                blocks = positions_of(owners, group.size).to(self.device)
                reads = (member.dim == 1) != layer.across
                self.parts.setdefault(group.name, []).append(Part(layer, reads, blocks))


def _trainable_copy(program: Program) -> nn.Module:
    """Frozen parameters share their memory with the program's model, active adapters have their own."""
    trained = {id(parameter) for layer in low_rank_layers(program.model) for parameter in layer.parameters()}

    def replace(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in trained:
            return nn.Parameter(program.weight(tensor).clone())
        if (quantised := quantised_value(tensor)) is not None:
            return nn.Parameter(quantised, requires_grad=False)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(program.weight(tensor), requires_grad=False)
        return program.weight(tensor).clone()

    copied = copy_structure(program.model, replace).eval()
    for layer in low_rank_layers(copied):
        layer.dropout.train()
    return copied
