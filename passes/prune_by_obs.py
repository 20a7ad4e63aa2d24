"""SlimGPT (arXiv 2412.18110): remove columns, matrix by matrix as they run, and let the rest make up for it.

What a matrix sees comes from the already pruned matrices before it: all calibration data runs to a matrix, the matrix
is pruned, and all go on through what is left of it (:mod:`graphprune.passes.lockstep`). One forward in all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from graphprune.data.calibration import calibration_batches
from graphprune.errors import GraphPruneError
from graphprune.ir.axes import Axis, find, leaves
from graphprune.ir.program import NodeGroup, Program
from graphprune.ir.selection import coordinates
from graphprune.passes.base import Pass, compiler_pass
from graphprune.passes.build_node_groups import weight_contractions
from graphprune.passes.consumers import Consumers, Product, conv_groups, matrices, put_matrices, seen_by
from graphprune.passes.lockstep import Lockstep
from graphprune.passes.obs import Surgeon, choose, dynamic_groups, fixed_groups
from graphprune.passes.select_structures import make_plan
from graphprune.trace.quiet import REFUSALS, without_hooks
from graphprune.trace.skeleton import names, scratch_copy


@compiler_pass(requires=("prunable",), ensures=("prunable",))
def keep_consumed(program: Program) -> None:
    """Leave alone, with that reason, the groups that no weight consumes: there is nothing that could adapt."""
    axes = program.need("axes")
    consumed = {leaf for _, name, dim in weight_contractions(program) for leaf in leaves(axes.tensors[name][dim])}
    for group in list(program.need("prunable")):
        if find(group.axis) not in consumed:
            program.need("prunable").remove(group)
            program.need("skipped")[group.name] = "no weight consumes it"


@dataclass
class _Site:
    """One consumer matrix: the groups that lose columns in it, and what it has seen so far."""

    name: str
    dim: int
    weight: torch.Tensor
    groups: list[NodeGroup]
    place: int = 0
    product: Product | None = None
    matrices: torch.Tensor | None = None
    hessian: torch.Tensor | None = None
    pruned: torch.Tensor | None = None  # the weight to go on with, at full size

    @property
    def solved(self) -> bool:
        return self.pruned is not None


class _Finished(BaseException):
    """All matrices are pruned: what comes behind need not run."""


def prune_by_obs(*, damping: float = 0.01, group: int | None = None, grouped_cholesky: bool = True) -> Pass:
    """A pass that removes ``counts`` structures of every group, chosen and made up for where they are consumed.

    Args:
        damping: share of the mean of the Hessian's diagonal that is added to it.
        group: columns to remove at a time; by default many at first and few at the end (the paper's dynamic group
            size). Blocks of several columns, such as heads, go one at a time.
        grouped_cholesky: what a block costs is computed exactly and again after each removal; without, from the first
            H⁻¹ with columns taken for independent (the paper's ablation).

    An axis that several matrices consume is decided where the first of them runs; the others make up for it. What the
    data never reaches goes by the size of its weights. A weight that is tied to another is pruned, but not adapted.
    """

    def run(program: Program) -> None:
        surgery = _Surgery(program, damping, group, grouped_cholesky)
        surgery.run(calibration_batches(program))
        make_plan(program, surgery.removed)
        program.updates.update(surgery.updates())

    return Pass("prune_by_obs", run, requires=("counts",), ensures=("plan",))


@dataclass
class _Surgery:
    program: Program
    damping: float
    group: int | None
    grouped_cholesky: bool
    removed: dict[str, torch.Tensor] = field(default_factory=dict)
    _sites: dict[int, _Site] = field(default_factory=dict)

    def __post_init__(self) -> None:
        axes, tensors = self.program.need("axes"), names(self.program.model)
        losing = {
            find(group.axis): group
            for group in self.program.need("prunable")
            if self.program.need("counts").get(group.name)
        }
        for _, name, dim in weight_contractions(self.program):
            groups = [losing[leaf] for leaf in dict.fromkeys(leaves(axes.tensors[name][dim])) if leaf in losing]
            if groups:
                site = _Site(name, dim, tensors[name], groups, len(self._sites))
                self._sites.setdefault(id(site.weight), site)
        self._by_place = {site.place: site for site in self._sites.values()}

    def run(self, batches: list[dict[str, Any]]) -> None:
        scratch = scratch_copy(self.program.model, self.program.need("trace").written)

        def work(batch: dict[str, Any]) -> None:
            mode = Consumers((site.weight for site in self._sites.values()), self._see)
            try:
                with torch.no_grad(), mode:
                    scratch(**batch)
            except _Finished:
                return

        self._lockstep = Lockstep(work, lambda place: self._solve(self._by_place[place]))
        try:
            with without_hooks(scratch):
                self._lockstep.run(batches)
        except GraphPruneError:
            raise
        except REFUSALS as error:
            raise GraphPruneError(
                f"Calibration failed while data ran through the model: {type(error).__name__}: {error}. "
                "Nothing was changed."
            ) from error
        for site in self._by_place.values():
            if not site.solved:  # nothing reached it
                self._solve(site)

    def updates(self) -> dict[int, torch.Tensor]:
        """``id`` of a weight → what it becomes, for those that adapt."""
        return {key: site.pruned for key, site in self._sites.items() if site.pruned is not None and self._adapts(site)}

    def _adapts(self, site: _Site) -> bool:
        canonical = self.program.need("axes").canonical
        return sum(name == site.name for name in canonical.values()) == 1

    def _see(self, weight: torch.Tensor, product: Product, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
        site = self._sites[id(weight)]
        if not site.solved:
            self._add(site, product, args, kwargs)
            self._lockstep.wait(site.place)
        if all(one.solved for one in self._sites.values()):
            raise _Finished
        return site.pruned

    @staticmethod
    def _add(site: _Site, product: Product, args: tuple, kwargs: dict[str, Any]) -> None:
        seen = seen_by(product, args, kwargs)
        seen = seen.to(torch.promote_types(seen.dtype, torch.float32))
        if site.hessian is None:
            site.product = product
            site.matrices = matrices(site.weight.detach(), site.dim, product, conv_groups(product, args, kwargs))
            site.hessian = torch.zeros(len(seen), seen.shape[-1], seen.shape[-1], dtype=seen.dtype, device=seen.device)
        site.hessian.baddbmm_(seen.mT, seen)

    def _solve(self, site: _Site) -> None:
        if site.hessian is None or site.matrices is None:
            site.matrices = matrices(site.weight.detach(), site.dim, site.product)
            site.hessian = site.matrices.new_zeros(len(site.matrices), *[site.matrices.shape[-1]] * 2)
        dtype = torch.promote_types(site.matrices.dtype, torch.float32)
        try:
            surgeon = Surgeon(site.matrices.to(dtype, copy=True), site.hessian.to(dtype), self.damping)
        except GraphPruneError as error:
            raise GraphPruneError(f"{site.name} cannot be pruned: {error}. Nothing was changed.") from None
        site.hessian = None
        for group in site.groups:
            blocks = self._blocks(site, group, surgeon.weight.shape[-1])
            if group.name in self.removed:
                surgeon.remove(blocks[self.removed[group.name].to(blocks.device)].flatten())
            else:
                gone = choose(surgeon, blocks, self._group_sizes(group, blocks), anew=self.grouped_cholesky)
                self.removed[group.name] = gone.cpu()
        if not self._adapts(site):
            surgeon.weight = site.matrices.to(dtype) * (surgeon.weight != 0).any(1, keepdim=True)
        site.pruned = put_matrices(surgeon.weight, site.weight, site.dim, site.product)
        site.matrices = None

    def _group_sizes(self, group: NodeGroup, blocks: torch.Tensor) -> list[int]:
        count = self.program.need("counts")[group.name]
        if blocks.shape[1] > 1:
            return [1] * count
        return dynamic_groups(count) if self.group is None else fixed_groups(count, self.group)

    def _blocks(self, site: _Site, group: NodeGroup, columns: int) -> torch.Tensor:
        """The columns that each index of a group owns: int64 of shape ``(size, columns per index)``."""
        axis = self.program.need("axes").tensors[site.name][site.dim]
        owners = owners_of(axis, find(group.axis)).repeat_interleave(columns // axis.size)
        order = owners.argsort(stable=True)
        return order[owners[order] >= 0].view(group.size, -1).to(site.weight.device)


def owners_of(axis: Axis, leaf: Axis) -> torch.Tensor:
    """The index of ``leaf`` that owns each position of ``axis``, int64; -1 where none does."""
    found: Iterable[torch.Tensor] = (place for other, place in coordinates(axis, lambda one: one.size) if other is leaf)
    return torch.stack(list(found)).amax(0)
