"""What the compiler passes work on: the model, and everything found out about it so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from graphprune.ir.axes import Axis, describe, find
from graphprune.ir.knowledge import Knowledge
from graphprune.ir.plan import Plan
from graphprune.ir.score_spread import ScoreSpread
from graphprune.ir.selection import Kept, Selection
from graphprune.ir.sizes import Polynomial
from graphprune.rules.registry import Dims, Facts
from graphprune.trace.export import Trace
from graphprune.trace.inputs import Inputs
from graphprune.trace.provenance import Attribute
from graphprune.trace.quantised import quantised_value
from graphprune.trace.skeleton import names
from graphprune.trace.stored import Stored, stored_of

if TYPE_CHECKING:
    from graphprune.deploy.fields import Fields
    from graphprune.deploy.solve import Stated


@dataclass
class AxisMap:
    """The axes of every tensor of a traced model.

    ``values`` has the dims of every node (a list of dims for several outputs), ``tensors`` those of every distinct
    parameter and buffer under its canonical name, ``canonical`` every name of a tied tensor → that name.
    ``facts`` are what rules found beside the axes. ``unruled`` counts, per operator without a usable rule, the source
    lines it pinned. Of the leaves in ``more_than_one`` a planner keeps two indices, since forward asks whether there
    is one (``if groups == 1``).
    """

    values: dict[fx.Node, Any]
    tensors: dict[str, Dims]
    canonical: dict[str, str]
    facts: Facts
    unruled: dict[str, list[str]] = field(default_factory=dict)
    more_than_one: set[Axis] = field(default_factory=set)


@dataclass(frozen=True)
class Member:
    """Dimension ``dim`` of the parameter or buffer ``tensor`` on an axis. ``consumes`` if it is summed away there."""

    tensor: str
    dim: int
    consumes: bool

    def __str__(self) -> str:
        return f"{self.tensor}[{self.dim}]"


@dataclass
class NodeGroup:
    """A basic node group: one leaf axis and all that must go together with it.

    ``name`` is that of the first parameter dimension on the ``axis``; ``members`` are all of them, ``operators`` the
    nodes of the graph, and ``modules`` the paths of the modules that own a member.
    ``outer`` is True when the axis is the outermost factor of every parameter dimension it occurs in (a head, a
    channel), False for an inner factor (a channel *of every* head). The size must stay a multiple of ``multiple``,
    which is more than 1 where a kernel demands it, and at least ``minimum``. A planner leaves at least ``careful``:
    with fewer, forward takes another branch or memory another layout, which need not work the same.
    """

    name: str
    axis: Axis
    members: list[Member]
    operators: list[fx.Node]
    outer: bool
    modules: list[str]
    multiple: int = 1
    minimum: int = 1
    careful: int = 1

    @property
    def size(self) -> int:
        return self.axis.size

    @property
    def pins(self) -> list[str]:
        return [str(pin) for pin in find(self.axis).pins]


@dataclass
class ComposedGroup:
    """A weight and the low-rank updates that are added to it: one whole, whose ranks are never pruned.

    ``base`` is the weight, ``factors`` the two parameters of each update, the one that reads first. ``tensors`` are all
    parameters of the ``module`` around them: these, a bias, DoRA's magnitudes. ``ranks`` are the names of the groups of
    the ranks, ``overlaps`` those of the basic groups that some of the tensors belong to as well.
    """

    module: str
    base: str
    factors: list[tuple[str, str]]
    ranks: list[str]
    tensors: list[str]
    overlaps: list[str]


@dataclass
class Options:
    """What the user asked for; see :func:`graphprune.compile`."""

    ratio: float | None = None
    method: str = "magnitude"
    data: Any = None
    tokenizer: Any = None
    allocation: str | Mapping[str, float] | None = None
    aggregation: str = "last"
    round_to: int = 1
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    skip_first: int = 0
    skip_last: int = 0
    inner_axes: bool = False
    width: bool = False
    experts: bool = False
    seed: int = 0
    samples: int | None = None
    length: int = 128
    verify: bool = True
    inplace: bool = False
    emit: str = "module"
    merge: bool = False
    device: str | torch.device | None = None
    deploy: str | None = None


@dataclass
class Program:
    """The state that passes hand on. A pass reads fields that earlier passes ensured and sets its own.

    ``model``, ``inputs`` and ``options`` are what the user gave. The analysis makes ``trace``, ``axes``, ``attributes``
    (integer of the model → polynomial in sizes of axes), ``groups``, ``composed``, ``ragged`` (group → the one it is
    ragged under), ``prunable`` and ``skipped`` (group → why not). A method makes ``knowledge``, ``scores`` (group →
    float32 ``(size,)``), ``counts`` (group → structures to go) and ``plan``. Then come ``new_attributes``, ``pruned``
    and ``oracle_error``, relative to the largest output. ``progress`` is told what happens.

    ``updates`` has new values, at full size, of parameters that a pass changed to make up for what is removed:
    ``id(parameter)`` → tensor; ``new_biases`` those of linear layers that had none: module path → tensor. The pruned
    model and the masked original have them alike.
    ``batches`` are what :func:`graphprune.data.calibration.calibration_batches` made.
    Only with ``deploy``: ``fields`` are what the fields of the config say, ``classes`` the groups that must shrink
    together for the config to say it, each with how many of its indices go in one step, ``stated`` the new config, and
    ``unsaid`` the groups that are left alone because no field says their size, with the reasons.
    ``spill``, for a model whose weights are on disk, writes a tensor there and returns its stand-in. ``chosen_by``
    are scores of a pass that makes them as it prunes; ``spreads`` those of a plan that was kept.
    """

    model: nn.Module
    inputs: Inputs
    options: Options
    trace: Trace | None = None
    axes: AxisMap | None = None
    attributes: dict[Attribute, Polynomial] | None = None
    groups: list[NodeGroup] | None = None
    composed: list[ComposedGroup] | None = None
    ragged: dict[str, str] | None = None
    prunable: list[NodeGroup] | None = None
    skipped: dict[str, str] | None = None
    fields: Fields | None = None
    classes: list[dict[str, int]] | None = None
    stated: Stated | None = None
    unsaid: dict[str, str] = field(default_factory=dict)
    batches: list[dict[str, Any]] | None = None
    knowledge: Knowledge | None = None
    scores: dict[str, torch.Tensor] | None = None
    chosen_by: dict[str, torch.Tensor] = field(default_factory=dict)
    spreads: dict[str, ScoreSpread] | None = None
    counts: dict[str, int] | None = None
    plan: Plan | None = None
    pruned: nn.Module | None = None
    new_attributes: dict[Attribute, int] | None = None
    updates: dict[int, torch.Tensor] = field(default_factory=dict)
    new_biases: dict[str, torch.Tensor] = field(default_factory=dict)
    oracle_error: float | None = None
    progress: Callable[[str], None] | None = None
    spill: Callable[[str, torch.Tensor], torch.Tensor] | None = None
    _selection: tuple[Plan, Selection] | None = None

    def say(self, text: str) -> None:
        """Tell ``progress``, if there is one."""
        if self.progress is not None:
            self.progress(text)

    @property
    def device(self) -> torch.device:
        """Where calibration data runs; weights that are elsewhere come there as they are needed."""
        chosen, first = self.options.device, next(self.model.parameters())
        if chosen is None and stored_of(first) is not None:
            return torch.device("cpu")
        return first.device if chosen is None else torch.device(chosen)

    def need(self, name: str) -> Any:
        """A field that an earlier pass must have set."""
        value = getattr(self, name)
        if value is None:
            raise AssertionError(f"{name} is not there yet: a pass that ensures it has to run first")
        return value

    def weight(self, tensor: torch.Tensor | str) -> torch.Tensor:
        """A parameter or buffer of the model, or the one of that name, with the value that it is to be pruned with.

        Detached. Of a quantised one the value is made for this call, of one on disk it is read.
        """
        if isinstance(tensor, str):
            tensor = names(self.model)[tensor]
        stored = self.stored(tensor)
        if stored is not None:
            return stored.read()
        quantised = quantised_value(tensor) if id(tensor) not in self.updates else None
        return self.updates.get(id(tensor), tensor).detach() if quantised is None else quantised.dequantize()

    def current(self, tensor: torch.Tensor) -> torch.Tensor:
        """What :meth:`weight` is the value of: ``tensor`` itself, or what a pass put in its place."""
        return self.updates.get(id(tensor), tensor)

    def stored(self, tensor: torch.Tensor) -> Stored | None:
        """Where on disk the value of :meth:`weight` is, None if it is in memory."""
        return stored_of(self.current(tensor))

    def at_home(self, value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """``value`` in the dtype of a parameter, and where that is; in memory for one on disk."""
        return value.to("cpu" if stored_of(tensor) is not None else tensor.device, tensor.dtype)

    def put_away(self, name: str, value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """A new value of the parameter ``tensor``, which is called ``name``: where that is, on disk too."""
        if stored_of(value) is not None:
            return value
        kept = self.at_home(value, tensor)
        return kept if self.spill is None or stored_of(tensor) is None else self.spill(name, kept)

    def consumed(self) -> set[tuple[str, int]]:
        """Every dimension of a parameter that is summed away: (canonical name, dimension)."""
        return {(m.tensor, m.dim) for group in self.need("groups") for m in group.members if m.consumes}

    def axis_name(self, axis: Axis) -> str:
        """The name of a leaf's group with its size, or its bare size when no parameter is on it."""
        names = {find(group.axis): group.name for group in self.groups or []}
        found = names.get(find(axis))
        return found if found is not None else str(axis.size)

    def selection(self) -> Selection:
        """What the plan keeps of every axis that it prunes."""
        plan: Plan = self.need("plan")
        if self._selection is None or self._selection[0] is not plan:
            self.follow(plan, {name: torch.tensor(kept) for name, kept in plan.keep.items()})
        assert self._selection is not None
        return self._selection[1]

    def follow(self, plan: Plan, kept: dict[str, torch.Tensor]) -> None:
        """Make ``plan`` the program's; ``kept`` are its indices as tensors."""
        axes = {group.name: find(group.axis) for group in self.need("groups")}
        selection = {}
        for name, indices in kept.items():
            outer = axes[plan.under[name]] if name in plan.under else None
            selection[axes[name]] = Kept(axes[name].size, indices, outer)
        self.plan, self._selection = plan, (plan, selection)

    def ragged_axes(self) -> dict[Axis, Axis]:
        """Every prunable leaf that may choose other indices under each index of another → that other one."""
        if not self.options.inner_axes:
            return {}
        axes = {group.name: find(group.axis) for group in self.need("groups")}
        ragged: dict[str, str] = self.need("ragged")
        return {axes[g.name]: axes[ragged[g.name]] for g in self.need("prunable") if g.name in ragged}


def describe_dims(program: Program, dims: Dims) -> list[str]:
    """Each dimension as an expression of group names."""
    return [describe(axis, program.axis_name) for axis in dims]
