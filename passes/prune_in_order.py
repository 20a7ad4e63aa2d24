"""Remove columns matrix by matrix as they run, so that each is judged by what the pruned ones before it leave.

All calibration data runs to a matrix, the matrix is pruned, and all go on through what is left of it
(:mod:`graphprune.passes.lockstep`). One forward in all, of any model: SlimGPT (arXiv 2412.18110), and Wanda-sp and FLAP
as FLAP's authors run them (arXiv 2312.11983).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphprune.data.calibration import calibration_batches
from graphprune.errors import GraphPruneError
from graphprune.ir.axes import Axis, find, leaves
from graphprune.ir.program import NodeGroup, Program
from graphprune.ir.selection import coordinates
from graphprune.passes.base import Pass
from graphprune.passes.biases import Bias, bias_of
from graphprune.passes.build_node_groups import weight_contractions
from graphprune.passes.consumers import Consumers, Product, conv_groups, matrices, put_matrices, seen_by
from graphprune.passes.cuts import Cut, Importance, MakeCut, MomentCut, ObsCut
from graphprune.passes.lockstep import Lockstep
from graphprune.passes.score import scores_of
from graphprune.passes.score.registry import factors_of
from graphprune.passes.select_structures import in_order, make_plan
from graphprune.trace.placement import placed
from graphprune.trace.quiet import REFUSALS, without_hooks
from graphprune.trace.skeleton import names, scratch_copy


def prune_by_obs(
    *, damping: float = 0.1, longest: float = 1.0, group: int | None = None, grouped_cholesky: bool = True
) -> Pass:
    """A pass that removes ``counts`` structures of every group, the cheapest ones, and lets the rest adapt.

    SlimGPT (arXiv 2412.18110): columns cost their Optimal Brain Surgeon error (Eq. 3 and 4), blocks of several what a
    grouped Cholesky factorisation gives (Eq. 5).

    Args:
        damping: share of the mean of the Hessian's diagonal that is added to it (the paper's is 0.01).
        longest: of what a matrix sees, vectors longer than so many times the median of their batch count as if they
            were that long, so that few tokens with massive activations do not decide for all; ``inf`` is the paper's.
        group: columns to remove at a time; by default many at first and few at the end (the paper's dynamic group
            size). Blocks of several columns, such as heads, go one at a time.
        grouped_cholesky: what a block costs is computed exactly and again after each removal; without, from the first
            H⁻¹ with columns taken for independent (the paper's ablation).

    An axis that several matrices consume is decided where the first of them runs; the others make up for it. What the
    data never reaches goes by the size of its weights. A weight that is tied to another is pruned, but not adapted.
    Axes that cannot be decided so, since no weight that is seen consumes them or since they are ragged, go by the
    scores of FLAP's WIFN or, without one, of magnitude.
    """
    return _in_order(lambda weight: ObsCut(weight, damping, longest, group, grouped_cholesky), "flap-wifn")


def prune_by_moments(importance: Importance, *, otherwise: str, bias: bool = False, times: str | None = None) -> Pass:
    """A pass that removes ``counts`` structures of every group, those of the least ``importance``, summed over columns.

    ``times`` is a criterion that this is multiplied by: what all weights of a structure say, where ``importance`` only
    knows the columns that consume it.
    With ``bias`` the bias of a consumer takes what the removed columns add on average (FLAP, arXiv 2312.11983, Eq. 7):
    it is added to a bias that is there, and a plain linear layer without one gets one. Axes that cannot be decided so,
    since no weight that is seen consumes them or since they are ragged, go by the criterion ``otherwise`` or, without a
    score, by magnitude.
    """
    return _in_order(lambda weight: MomentCut(weight, importance), otherwise, bias, times)


def _in_order(make: MakeCut, otherwise: str, bias: bool = False, times: str | None = None) -> Pass:
    def run(program: Program) -> None:
        operation = _Operation(program, make, bias, scores_of(program, times, _losing(program)) if times else {})
        operation.run(calibration_batches(program))
        _by_scores(program, operation, otherwise)
        program.chosen_by = operation.scores
        make_plan(program, operation.removed)
        operation.hand_over()

    return Pass("prune_in_order", run, requires=("counts",), ensures=("plan",))


def _losing(program: Program) -> list[NodeGroup]:
    """The groups that some structure goes of."""
    return [group for group in program.need("prunable") if program.need("counts").get(group.name)]


def _by_scores(program: Program, operation: _Operation, criterion: str) -> None:
    """Add what goes of the groups that ``operation`` removed nothing of, by their scores."""
    for name in (criterion, "l2"):
        left = [group for group in _losing(program) if group.name not in operation.removed]
        scores = scores_of(program, name, left) if left else {}
        operation.scores |= scores
        for group, values in scores.items():
            operation.removed[group] = in_order(values)[1][..., : program.need("counts")[group]]


@dataclass
class _Site:
    """One consumer matrix and the groups that lose columns in it. ``pruned`` is the weight to go on with."""

    name: str
    dim: int
    weight: torch.Tensor
    groups: list[NodeGroup]
    place: int
    node: fx.Node
    bias: Bias | None = None
    product: Product | None = None
    cut: Cut | None = None
    pruned: torch.Tensor | None = None
    offset: torch.Tensor | None = None


class _Finished(BaseException):
    """All matrices are pruned: what comes behind need not run."""


@dataclass
class _Operation:
    program: Program
    make: MakeCut
    bias: bool
    times: dict[str, torch.Tensor]
    removed: dict[str, torch.Tensor] = field(default_factory=dict)
    scores: dict[str, torch.Tensor] = field(default_factory=dict)
    _sites: dict[int, _Site] = field(default_factory=dict)

    def __post_init__(self) -> None:
        program = self.program
        axes, tensors, ragged = program.need("axes"), names(program.model), program.ragged_axes()
        adapters = factors_of(program)
        losing = {axis: group for group in _losing(program) if (axis := find(group.axis)) not in ragged}
        for node, name, dim in weight_contractions(program):
            groups = [losing[leaf] for leaf in dict.fromkeys(leaves(axes.tensors[name][dim])) if leaf in losing]
            if groups and id(tensors[name]) not in self._sites:
                site = _Site(name, dim, tensors[name], groups, len(self._sites), node)
                if self.bias and name not in adapters:  # a bias of theirs would be lost when they are merged
                    site.bias = bias_of(program, node, name)
                self._sites[id(site.weight)] = site
        self._by_place = {site.place: site for site in self._sites.values()}
        self._left = len(self._sites)

    def run(self, batches: list[dict[str, Any]]) -> None:
        scratch = scratch_copy(self.program.model, self.program.need("trace").written)
        here = placed(scratch, self.program.device)  # one for all batches, which bring each weight together

        def work(batch: dict[str, Any]) -> None:
            try:
                with torch.no_grad(), here, Consumers((s.weight for s in self._sites.values()), self._see):
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
            if site.pruned is None:  # nothing reached it
                self._solve(site)

    def hand_over(self) -> None:
        """Tell the program the new values of the weights and biases."""
        tensors = names(self.program.model)
        for key, site in self._sites.items():
            assert site.pruned is not None
            if self._adapts(site):
                self.program.updates[key] = self.program.put_away(site.name, site.pruned, site.weight)
            if site.bias is None or site.offset is None:
                continue
            if site.bias.new is not None:
                self.program.new_biases[site.bias.new] = self.program.at_home(site.offset, site.weight)
            elif site.bias.name is not None:
                old = tensors[site.bias.name]
                values = self.program.weight(old)
                self.program.updates[id(old)] = (values + site.offset.to(values.device)).to(old.dtype)

    def _adapts(self, site: _Site) -> bool:
        canonical = self.program.need("axes").canonical
        return sum(name == site.name for name in canonical.values()) == 1

    def _see(self, weight: torch.Tensor, product: Product, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        site = self._sites[id(weight)]
        if site.pruned is None:
            self._show(site, product, args, kwargs)
            self._lockstep.wait(site.place)
        if not self._left:
            raise _Finished
        return product.replaced(args, site.pruned, site.offset if site.bias is not None else None)

    def _show(self, site: _Site, product: Product, args: tuple, kwargs: dict[str, Any]) -> None:
        seen = seen_by(product, args, kwargs)
        dtype = torch.promote_types(seen.dtype, torch.float32)
        if site.cut is None:
            site.product = product
            dense = self.program.weight(site.weight)
            found = matrices(dense, site.dim, product, conv_groups(product, args, kwargs))
            site.cut = self.make(found.to(seen.device, dtype, copy=True))
        site.cut.see(seen.to(dtype))

    def _solve(self, site: _Site) -> None:
        dense = self.program.weight(site.weight)
        if site.cut is None:
            dtype = torch.promote_types(dense.dtype, torch.float32)
            site.cut = self.make(matrices(dense, site.dim, None).to(dtype, copy=True))
        cut = site.cut
        gone = torch.zeros(cut.weight.shape[-1], dtype=torch.bool, device=cut.weight.device)
        for group in site.groups:
            blocks = self._blocks(site, group, len(gone)).to(gone.device)
            try:
                if group.name in self.removed:
                    cut.remove(blocks[self.removed[group.name].to(blocks.device)].flatten())
                else:
                    count, times = self.program.need("counts")[group.name], self.times.get(group.name)
                    times = None if times is None else times.to(cut.weight)
                    taken, scores = cut.choose(blocks, count, times)
                    self.removed[group.name], self.scores[group.name] = taken.cpu(), scores.cpu()
            except GraphPruneError as error:
                raise GraphPruneError(f"{site.name} cannot be pruned: {error}. Nothing was changed.") from None
            gone[blocks[self.removed[group.name].to(blocks.device)].flatten()] = True
        if not self._adapts(site):
            groups = len(cut.weight) if site.product is not None and site.product.convolution else 1
            cut.weight = matrices(dense.to(gone.device), site.dim, site.product, groups).masked_fill(gone, 0)
        for other in self._by_place.values():  # all data is past those: what they hold need not be on the device
            if other.place < site.place and other.pruned is not None:
                other.pruned = self.program.put_away(other.name, other.pruned, other.weight)
        site.pruned, site.offset = put_matrices(cut.weight, dense, site.dim, site.product), cut.offset
        site.cut = None
        self._left -= 1
        self.program.say(f"adapting weights: {len(self._sites) - self._left} of {len(self._sites)}")

    def _blocks(self, site: _Site, group: NodeGroup, columns: int) -> torch.Tensor:
        """The columns that each index of a group owns: int64 of shape ``(size, columns per index)``."""
        axis = self.program.need("axes").tensors[site.name][site.dim]
        owners = owners_of(axis, find(group.axis)).repeat_interleave(columns // axis.size)
        return positions_of(owners, group.size)


def owners_of(axis: Axis, leaf: Axis) -> torch.Tensor:
    """The index of ``leaf`` that owns each position of ``axis``, int64; -1 where none does."""
    found = [place for other, place in coordinates(axis, lambda one: one.size) if other is leaf]
    return torch.stack(found).amax(0)


def positions_of(owners: torch.Tensor, size: int) -> torch.Tensor:
    """The positions that each of ``size`` indices owns, int64 of shape ``(size, positions per index)``."""
    order = owners.argsort(stable=True)
    return order[owners[order] >= 0].view(size, -1)
