"""Knowledge distribution analysis (LoRAShear, arXiv 2310.18356, Alg. 3): what a model loses with each node group."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from os import PathLike
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import graphprune
from graphprune.data.calibration import calibration_batches
from graphprune.errors import GraphPruneError
from graphprune.io import fingerprint
from graphprune.io.loss_cache import CACHE, LossCache, cache_folder
from graphprune.ir.knowledge import GroupKnowledge, Knowledge
from graphprune.ir.program import NodeGroup, Program
from graphprune.passes.base import Pass
from graphprune.passes.budget import check_reachable
from graphprune.passes.masking import consuming_weights, kept_places
from graphprune.passes.prefix import Prefix
from graphprune.passes.score import scores_of
from graphprune.passes.score.loss import count_samples, own_loss
from graphprune.passes.select_structures import in_order
from graphprune.trace.export import output_tensors
from graphprune.trace.quiet import REFUSALS, seeded, without_hooks
from graphprune.trace.skeleton import copy_structure, is_on_meta, names, scratch_copy

RATIOS = (0.1, 0.3, 0.5)
SAMPLES = 8

Batch = dict[str, Any]


def analyze_knowledge(
    gamma: float = 0.1,
    ratios: Sequence[float] = RATIOS,
    *,
    data: Any = None,
    samples: int = SAMPLES,
    cache: str | PathLike[str] | None = CACHE,
    devices: Sequence[str | torch.device] | None = None,
) -> Pass:
    """A pass that makes the node groups which hold the most knowledge unprunable; it goes before those of any method.

    LoRAShear's knowledge distribution analysis (arXiv 2310.18356, Alg. 3).
    Each prunable group is masked alone, at several ratios, the structures of the smallest magnitude first. How much the
    loss on an evaluation set rises is its deviation, of which the mean over the ratios counts. What is found is
    ``program.knowledge``; the model is not changed.

    Args:
        gamma: share of the measured groups, those of the largest deviation, to leave whole; in [0, 1).
        ratios: shares of its structures that a group loses, each in (0, 1); at least one structure goes.
        data: the evaluation set, in any form that ``data=`` of :func:`graphprune.compile` takes; by default the first
            rows of that itself.
        samples: rows of it.
        cache: folder where losses are kept by the fingerprint of model, data and settings, group by group, so that
            an interrupted analysis goes on; ``~/.cache`` is ``$XDG_CACHE_HOME`` where that is set. None keeps nothing.
        devices: where copies of the model run, each measuring other groups; by default all CUDA devices for a model
            that is whole on one of them, else where the model is.

    Raises:
        GraphPruneError: for arguments out of range, data that the model cannot run, a loss that is not finite, and
            when the groups that are left are not enough for the ratio of the program.
    """
    _check(gamma, ratios, samples)

    def run(program: Program) -> None:
        if is_on_meta(program.model):
            raise GraphPruneError(
                "The model is on the meta device: there is no knowledge to measure. Load its weights."
            )
        check_reachable(program)  # before minutes are spent
        batches = _first_rows(_evaluation_set(program, data, samples), samples)
        program.knowledge = _measure(program, tuple(ratios), batches, cache, devices)
        _leave_whole(program, program.knowledge, gamma)

    return Pass("analyze_knowledge", run, requires=("prunable", "skipped"), ensures=("knowledge",))


def _check(gamma: float, ratios: Sequence[float], samples: int) -> None:
    if not 0 <= gamma < 1:
        raise GraphPruneError(
            f"gamma, or unprunable_ratio, is a share of the node groups, at least 0 and below 1, not {gamma!r}."
        )
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise GraphPruneError(f"ratios are shares of structures between 0 and 1 (both excluded), not {ratios!r}.")
    if samples < 1:
        raise GraphPruneError(f"samples must be at least 1, not {samples}.")


def _evaluation_set(program: Program, data: Any, samples: int) -> list[Batch]:
    if data is None:
        return calibration_batches(program)
    other = copy.copy(program)
    other.options, other.batches = dataclasses.replace(program.options, data=data, samples=samples), None
    return calibration_batches(other)


def _first_rows(batches: list[Batch], samples: int) -> list[Batch]:
    """Whole batches, until they have so many rows."""
    rows = 0
    for n, batch in enumerate(batches):
        rows += count_samples(batch)
        if rows >= samples:
            return batches[: n + 1]
    return batches


def _leave_whole(program: Program, knowledge: Knowledge, gamma: float) -> None:
    worst = knowledge.worst(gamma)
    at = ", ".join(f"{ratio:g}" for ratio in knowledge.ratios)
    what = "perplexity" if knowledge.measure == "perplexity" else "loss"
    for group in worst:
        rises = ", ".join(f"{rise:.4g}" for rise in knowledge.shown(group))
        program.need("skipped")[group.name] = f"unprunable: masked alone at {at} it raises the {what} by {rises}"
    gone = {group.name for group in worst}
    program.prunable = [group for group in program.need("prunable") if group.name not in gone]
    try:
        check_reachable(program)
    except GraphPruneError as error:
        raise GraphPruneError(
            f"{error}\ngamma={gamma:g} makes {len(worst)} of {len(knowledge.groups)} node groups unprunable: lower it, "
            "or the ratio."
        ) from None


# ------------------------------------------------------------------------------------------------------- measuring


@dataclasses.dataclass(frozen=True)
class _Job:
    """One group to measure: its ``weights``, and by number of masked structures the indices that stay."""

    group: NodeGroup
    weights: list[str]
    kept: dict[int, torch.Tensor]


def _measure(
    program: Program,
    ratios: tuple[float, ...],
    batches: list[Batch],
    cache: str | PathLike[str] | None,
    devices: Sequence[str | torch.device] | None,
) -> Knowledge:
    wanted, left_out = _jobs(program, ratios)
    known = LossCache.read(cache_folder(cache), _key(program, batches)) if cache is not None else LossCache(None)
    jobs = []
    for job in wanted:
        left = {count: kept for count, kept in job.kept.items() if count not in known.losses.get(job.group.name, {})}
        if left:
            jobs.append(dataclasses.replace(job, kept=left))
    if jobs or known.measure is None:
        _measure_jobs(program, jobs, batches, devices, known)
    assert known.measure is not None
    groups = []
    for job in wanted:
        removed = [_count(job.group, ratio) for ratio in ratios]
        losses = [known.losses[job.group.name][count] for count in removed]
        groups.append(GroupKnowledge(job.group.name, job.group.modules, job.group.size, removed, losses))
    rows = sum(map(count_samples, batches))
    return Knowledge(ratios, known.measure, known.dense, rows, groups, left_out)


def _jobs(program: Program, ratios: tuple[float, ...]) -> tuple[list[_Job], dict[str, str]]:
    """What to measure, and why not the other groups."""
    jobs, left_out = [], {}
    scores = scores_of(program, "l2", program.need("prunable"))
    for group in program.need("prunable"):
        weights = consuming_weights(program, group)
        if isinstance(weights, str):
            left_out[group.name] = weights
            continue
        order = in_order(scores[group.name])[1]
        kept = {count: order[..., count:].sort(-1).values for count in (_count(group, ratio) for ratio in ratios)}
        jobs.append(_Job(group, weights, kept))
    return jobs, left_out


def _count(group: NodeGroup, ratio: float) -> int:
    return min(max(1, round(ratio * group.size)), group.size - max(group.minimum, group.careful))


def _key(program: Program, batches: list[Batch]) -> str:
    """Whatever decides a loss: the model, the data, and what is one structure."""
    options = program.options
    settings = (options.inner_axes, options.width, options.experts, options.seed)
    versions = (graphprune.__version__, torch.__version__)
    parts = (fingerprint.of_model(program.model), fingerprint.of_batches(batches), repr(settings), repr(versions))
    return fingerprint.fingerprint(*parts)


def _measure_jobs(
    program: Program,
    jobs: list[_Job],
    batches: list[Batch],
    devices: Sequence[str | torch.device] | None,
    known: LossCache,
) -> None:
    """Measure and put into ``known``, group by group."""
    say = program.say
    weights = {name for job in jobs for name in job.weights}
    try:
        with seeded(program.options.seed):  # the generators of the user stay, whatever runs beside
            workers = [_Worker(program, batches, weights, device) for device in _devices(program, devices)]
            if workers[0].draws:  # all share one generator
                workers = workers[:1]
            if known.measure is None:
                known.measure, known.dense = workers[0].measure, workers[0].dense
            start = time.monotonic()
            with closing(_each(workers, jobs)) as found:
                for done, (job, losses) in enumerate(found, 1):
                    known.keep(job.group.name, losses)
                    left = (time.monotonic() - start) / done * (len(jobs) - done)
                    say(f"knowledge: {done} of {len(jobs)} groups, {left:.0f} s left")
    except GraphPruneError:
        raise
    except REFUSALS as error:
        raise GraphPruneError(
            f"The evaluation set could not run through the model: {type(error).__name__}: {error}. Nothing was changed."
        ) from error


def _devices(program: Program, devices: Sequence[str | torch.device] | None) -> Sequence[torch.device | None]:
    """Where to run; None is where the model is."""
    held = {tensor.device for tensor in names(program.model).values()}
    if devices is not None:
        if not devices:
            raise GraphPruneError("devices= names no device.")
        return [torch.device(device) for device in devices]
    if {device.type for device in held} == {"cuda"} and len(held) == 1:
        own = next(iter(held))
        others = [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
        return [own, *(device for device in others if device != own)]
    return [None]


def _each(workers: list[_Worker], jobs: list[_Job]) -> Iterator[tuple[_Job, dict[int, float]]]:
    """Every job with its losses as it is done, each by a worker that is idle."""
    if len(workers) == 1:
        for job in jobs:
            yield job, workers[0].losses(job)
        return
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def one(job: _Job) -> tuple[_Job, dict[int, float]]:
        worker = idle.get()
        try:
            return job, worker.losses(job)
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(len(workers)) as pool:
        futures = [pool.submit(one, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


class _Worker:
    """Runs masked copies of the model on one device.

    A copy shares the weights of the model, or of one copy of it on another device, except for those that are masked:
    these it has for itself, so nothing is ever to be restored. ``dense`` is the mean loss of the dense model, ``draws``
    whether its forward draws random numbers.
    """

    def __init__(self, program: Program, batches: list[Batch], weights: set[str], device: torch.device | None):
        self._program = program
        self._written = program.need("trace").written
        held = {tensor.device for tensor in names(program.model).values()}
        self._base = program.model if device is None or held == {device} else _moved(program.model, device)
        self._device = next(self._base.parameters()).device
        self._batches = [_to(batch, self._device) for batch in batches]
        self._rows = sum(map(count_samples, batches))
        self._dense = scratch_copy(self._base, self._written)
        self._prefixes = [Prefix() for _ in batches]
        self._outputs: list[list[torch.Tensor]] = []  # of the dense model, where it has no loss
        self._trusted: dict[int, bool] = {0: True}
        self.measure = ""
        own = {name: names(self._dense)[name] for name in weights}
        torch.manual_seed(program.options.seed)
        undrawn = self._random_state()
        self._of_batches = []
        for n, prefix in enumerate(self._prefixes):
            with prefix.record(self._dense, own):
                self._of_batches.append(self._run(self._dense, n))
            if n == 0:
                self.draws = not torch.equal(undrawn, self._random_state())
        self.dense = sum(self._of_batches) / self._rows
        if not math.isfinite(self.dense):
            raise GraphPruneError(
                f"The loss of the model on the evaluation set is {self.dense}: data= or the weights hold NaN or "
                "infinite values, or the activations overflow in this dtype. Nothing was changed."
            )

    def losses(self, job: _Job) -> dict[int, float]:
        """The mean loss with each number of structures masked."""
        copied = scratch_copy(self._base, {*self._written, *job.weights})
        own, original = names(copied), names(self._base)
        found = {}
        for count, kept in job.kept.items():
            for name in job.weights:
                places = kept_places(self._program, job.group, kept, name)
                with torch.no_grad():
                    own[name].copy_(original[name]).masked_fill_(~places.to(own[name].device), 0)
            loss = sum(self._from_prefix(copied, n, job.weights) for n in range(len(self._batches))) / self._rows
            found[count] = loss if math.isfinite(loss) else math.inf
        return found

    def _from_prefix(self, model: nn.Module, n: int, weights: list[str]) -> float:
        prefix = self._prefixes[n]
        calls = prefix.calls_before(weights)
        with prefix.replay(model, calls if self._trust(calls) else 0):
            return self._run(model, n)

    def _trust(self, calls: int) -> bool:
        """Whether the dense model computes the very same with so many calls replayed; side effects would be missed."""
        if calls not in self._trusted:
            with self._prefixes[0].replay(self._dense, calls):
                self._trusted[calls] = self._run(self._dense, 0) == self._of_batches[0]
        return self._trusted[calls]

    def _run(self, model: nn.Module, n: int) -> float:
        """The sum of the losses of the rows of batch ``n``."""
        batch = self._batches[n]
        torch.manual_seed(self._program.options.seed)
        with torch.no_grad(), without_hooks(model):
            output = model(**tree_map_only(torch.Tensor, torch.clone, batch))  # it may write to what it gets
        own = own_loss(model, batch, output)
        if own is not None:
            self.measure = "perplexity" if own[1] else "loss"
            return float(own[0])
        self.measure = "outputs"
        tensors = [t.detach() for t in output_tensors(output) if t.is_floating_point()]
        if not tensors:
            raise GraphPruneError("The model returns no floating-point tensor, so there is nothing to measure it by.")
        if n == len(self._outputs):
            self._outputs.append([tensor.clone() for tensor in tensors])
        return _distance(tensors, self._outputs[n]) * count_samples(batch)

    def _random_state(self) -> torch.Tensor:
        return torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else torch.get_rng_state()


def _distance(found: list[torch.Tensor], dense: list[torch.Tensor]) -> float:
    """The mean over outputs of ``‖y − y_dense‖² / ‖y_dense‖²``."""
    each = [
        float((a.double() - b.double()).square().sum() / b.double().square().sum().clamp(min=1e-30))
        for a, b in zip(found, dense, strict=True)
    ]
    return sum(each) / len(each)


def _to(batch: Batch, device: torch.device) -> Batch:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), batch)


def _moved(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of the model on another device."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.detach().to(device)
        return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved

    return copy_structure(model, move)
