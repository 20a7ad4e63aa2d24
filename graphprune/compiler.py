"""``compile``: the pipeline, from a model and a ratio to a smaller model of the same class."""

from __future__ import annotations

import copy
import inspect as inspect_module
import time
from collections.abc import Callable, Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

import graphprune.rules  # noqa: F401  (registers the rules)
from graphprune.data.calibration import MADE
from graphprune.errors import GraphPruneError
from graphprune.inspection import Inspection
from graphprune.ir.plan import Plan
from graphprune.ir.program import Options, Program
from graphprune.passes import pipelines
from graphprune.passes.analyze_knowledge import analyze_knowledge
from graphprune.passes.base import Pass, run_passes
from graphprune.passes.check_cached_sizes import UntracedSizes
from graphprune.passes.merge_adapters import merge_adapters
from graphprune.passes.methods import DEFAULT_METHOD, passes_of
from graphprune.passes.replay_plan import replay_plan
from graphprune.passes.score.taylor import AGGREGATIONS
from graphprune.passes.state_config import give_config, state_config
from graphprune.passes.tie_counts import tie_counts
from graphprune.reporting import REPORT_ATTRIBUTE, Report, make_report
from graphprune.trace.dispatched import gathered, is_dispatched, main_device
from graphprune.trace.inputs import example_inputs_for, normalise
from graphprune.trace.skeleton import is_on_meta, names
from graphprune.trace.stored import lacks_weights

if TYPE_CHECKING:
    from graphprune.recovery.settings import Recovery

_VALIDATION = 16  # rows held out of every source
# Arguments of compile that decide nothing about the result, or cannot be told as plain data.
_NOT_TOLD = {"model", "tokenizer", "example_inputs", "device", "inplace", "progress", "instruct", "recovery"}


def compile(
    model: nn.Module,
    ratio: float | None = None,
    *,
    method: str | None = None,
    data: Any = None,
    tokenizer: Any = None,
    example_inputs: Any = None,
    plan: Plan | None = None,
    allocation: str | Mapping[str, float] | None = None,
    aggregation: str = "last",
    unprunable_ratio: float = 0.0,
    passes: Sequence[Pass] | None = None,
    round_to: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    skip_first: int = 0,
    skip_last: int = 0,
    inner_axes: bool = False,
    width: bool = False,
    experts: bool = False,
    samples: int | None = None,
    length: int = 128,
    seed: int = 0,
    device: str | torch.device | None = None,
    verify: bool = True,
    inplace: bool = False,
    emit: str = "module",
    deploy: str | None = None,
    merge: bool | None = None,
    instruct: Any = None,
    recovery: Recovery | None = None,
    progress: Callable[[str], None] | None = None,
) -> nn.Module:
    """Remove ``ratio`` of all parameters of ``model`` and return a smaller dense model of the same class.

    Traces the model, infers from the graph alone which weights belong together, scores every removal structure,
    slices the least important away, and proves on a small batch that the result computes what the original computes
    without the removed structures. The model is not changed (unless ``inplace``).

    Args:
        model: any module; inputs are found by themselves for Hugging Face models. On the meta device only the plan
            is made real: the result is a smaller meta model. One that accelerate has dispatched (``device_map=``, with
            parts on several devices, in host memory or on disk) is gathered in host memory, data run through it on its
            main device, and the result is in host memory, without hooks.
        ratio: parameters to remove / all parameters, in (0, 1); reached to within one structure.
        method: how structures are chosen (:mod:`graphprune.passes.methods`). ``"ppm"`` (the default), ``"wanda-sp"``,
            ``"flap"`` and ``"slimgpt"`` look at what runs through the model, ``"llm-pruner"`` at gradients,
            ``"magnitude"`` only at weights; the name of a criterion (``"l1"``, ``"random"``, ``"taylor-mixed"``, …) by
            itself shrinks all axes by the same share.
        data: what scores that look at activations or gradients run through the model. Sampled, into ``samples`` rows:

            - a text or a list of texts, or paths of ``.txt`` and ``.jsonl`` files (field ``text``), with ``tokenizer``;
              a str of one line that ends so is a path. They are joined and cut at random into rows of ``length``.
            - tokens: an integer tensor of shape ``(tokens,)`` or a list of such rows, joined and cut likewise.
            - a ``datasets.Dataset``: its column ``input_ids`` or ``text``, as above; of any other, random rows of the
              columns that forward takes.
            - a ``DataLoader`` or another iterable of batches, read until it gave ``samples`` rows. A batch is a dict of
              arguments of forward, a tensor for the first, or a tuple in the order of ``example_inputs``, where what
              comes after that, such as labels, is left out.

            Used as they are: an integer tensor of shape ``(rows, length)``, and a list of batches.

            Made here: ``"random"``, which is random tokens of the vocabulary or, for a model that reads other things,
            random inputs in the shapes of its example inputs; ``"snippets"``, beginnings of 8 tokens that a language
            model writes itself, joined; ``"sampled"``, whole rows that it writes, which takes as many steps as they are
            long. When nothing is given, snippets of a model that generates, and random inputs for any other; that is
            enough to choose by, but ``"slimgpt"`` adapts weights to what it sees and wants real data.
        tokenizer: turns a text into ``{"input_ids": [...]}``.
        example_inputs: small tensors that forward accepts: one tensor, a tuple of arguments, or a dict; moved to the
            device of the model. Their batch and sequence sizes are best unlike any size in the model.
        plan: a plan to replay instead of scoring; ``ratio`` and all choices below it are then not used.
        allocation: how the budget is spread over the axes; by default as the method does it. ``"uniform"`` (every
            axis shrinks by the same share), ``"global"`` (scores over the mean of their axis are compared),
            ``"standardised"`` (scores as FLAP compares them), ``"sparing"`` (uniform, but the first and last blocks and
            axes of few indices keep all until the rest has lost half), ``"log-increasing"`` (SlimGPT's ratio, growing
            with depth), ``"log-decreasing"``, or a dict from patterns of module paths to ratios, relative to one
            another.
        aggregation: how the Taylor scores of the slices of a structure (one per parameter dimension that it owns)
            become one: ``"sum"``, ``"prod"``, ``"max"``, or ``"last"`` (the default: it measures best), those of the
            operator that runs last.
        unprunable_ratio: share of the node groups to leave whole, those that hold the most knowledge: masked alone,
            they raise the loss most (LoRAShear's γ; :mod:`graphprune.passes.analyze_knowledge`).
        passes: a tuple of passes that makes the plan, in place of those of ``method``, which is then only noted
            as their name; by default what they are called themselves.
        round_to: widths of weight dimensions stay multiples of this.
        include, exclude: shell-like patterns of module paths to prune only, or never (``"*.self_attn"``).
        skip_first, skip_last: how many blocks at both ends of every sequence of blocks to spare.
        inner_axes: also prune inner factors of products, such as channels of every head. Axes that stand by themselves
            under each index of another, such as the query heads of a key head or the channels of batched experts, then
            keep other indices under each (as many everywhere), where all share one choice otherwise.
        width: also prune axes that a norm or a mean is taken over, first of all the residual width that embeddings,
            norms and projections share. The statistic is then that of what is kept, in the pruned model as in the
            original it is compared with. It crosses all blocks, so sparing a block or excluding a module spares it.
        experts: also prune whole experts of mixtures: axes that a router chooses from. The router then never chooses
            a removed one, in the pruned model as in the original it is compared with. As many stay as it chooses.
        samples, length, seed: rows of calibration data (by default 32, and 8 of snippets), tokens per row, and the seed
            of every draw.
        device: where calibration data runs, such as ``"cuda"`` for a model in host memory; by default where the model
            is. Weights come to it as operators need them, and those of one block stay: it never holds the model.
        verify: run the oracle (see :mod:`graphprune.passes.verify`).
        inplace: change ``model`` itself, one tensor at a time, to save memory; verified before anything is changed.
        emit: ``"module"`` for the same class, or ``"graph"`` for a :class:`torch.fx.GraphModule`, for models whose
            Python cannot follow (axes pinned because "its size is given by the number …"). It takes and returns what
            forward takes and returns for ``example_inputs``, and only that: shapes other than those of the pruned
            axes, devices, eval mode and all other choices of forward are constants in it. It cannot be saved with
            :func:`save`; its ``state_dict`` and ``torch.export`` can.
        deploy: ``"transformers"`` for a result that the stock class of transformers loads with nothing of graphprune
            installed: what the config says once for all layers shrinks in all layers alike, what it says layer by layer
            (in a list, or in ``per_layer_config`` where the class reads it) does not, and what no field of it says
            stays. The report has the fields that changed and the share of groups that this left alone.
        merge: whether adapters of peft are merged into the weights of the pruned model; by default those that a method
            trains are, and others stay as they are, sliced to fit. A method that trains adds LoRA to a model without.
        instruct: instructions to train the pruned model on, after the texts of ``data``, so that it recovers what it
            lost (:func:`graphprune.recover`, which says what both may be); ``data`` must be texts then.
        recovery: settings of that; given alone, the texts are all that it is trained on. :func:`graphprune.shear` does
            the same in a folder, so that it can be interrupted, and measures what came of it.
        progress: called with the name of every pass that starts, and with how far the calibration data is.

    Returns:
        The pruned model: same class, dtype, device, requires_grad, train/eval state, tied weights, hooks.
        :func:`graphprune.report` says what was done.

    Raises:
        GraphPruneError: for anything the user can act on; the model is then as it was.
    """
    start = time.perf_counter()
    if method is None:
        method = _method_of(passes)
    _check_arguments(model, ratio, plan, round_to, skip_first, skip_last, aggregation, emit, inplace)
    _check_deploy(deploy, emit)
    options = Options(
        ratio=ratio,
        method=method,
        data=data,
        tokenizer=tokenizer,
        allocation=allocation,
        aggregation=aggregation,
        round_to=round_to,
        include=[include] if isinstance(include, str) else list(include),
        exclude=[exclude] if isinstance(exclude, str) else list(exclude),
        skip_first=skip_first,
        skip_last=skip_last,
        inner_axes=inner_axes,
        width=width or (plan is not None and plan.width),
        experts=experts or (plan is not None and plan.experts),
        seed=seed,
        device=device,
        samples=samples,
        length=length,
        verify=verify,
        inplace=inplace,
        emit=emit,
        deploy=deploy,
    )
    if device is not None:
        _check_device(device)
    how = (replay_plan(plan),) if plan is not None else passes_of(options.method) if passes is None else tuple(passes)
    if unprunable_ratio and plan is None:
        how = (analyze_knowledge(unprunable_ratio), *how)
    if deploy is not None:
        how = (tie_counts, *how)
    trains = any(step.prepare is not None for step in how)
    if inplace and trains:
        raise GraphPruneError(f"{method!r} trains a copy with adapters, so it cannot prune in place.")
    recovers = instruct is not None or recovery is not None
    if recovers and (inplace or emit == "graph" or is_on_meta(model)):
        raise GraphPruneError("Recovery compares with the dense model: leave out inplace= and emit=, and load weights.")
    if trains and device is not None:
        raise GraphPruneError(f"{method!r} trains where the model is: move it there, and leave out device=.")
    if is_dispatched(model):
        if inplace:
            raise GraphPruneError("inplace cannot change a model that accelerate has dispatched: leave it out.")
        options.device = main_device(model) if device is None else device
        model = gathered(model)
    if plan is None and passes is None and method != "random":
        _check_weights_are_here(model)
    traced = _prepared(model, how)
    options.merge = trains if merge is None else merge
    program = _program(traced, options, example_inputs)
    program.progress = progress
    before = measure(model)
    base_config = _base_config(model)
    earlier: Report | None = getattr(model, REPORT_ATTRIBUTE, None)
    try:
        seconds = run_passes(program, _pipeline(program, how))
    except UntracedSizes:
        args, kwargs = program.inputs
        inputs = (args, {**kwargs, "use_cache": True})
        program = Program(traced, inputs, options, progress=progress, batches=program.batches)
        seconds = run_passes(program, _pipeline(program, how))
    pruned = program.need("pruned")
    if traced is not model:
        _require_gradients_as(model, pruned)
    if program.stated is not None:
        base_config = program.stated.config
    report = make_report(program, before, measure(pruned), seconds, time.perf_counter() - start, base_config, earlier)
    report.settings = _settings(options, unprunable_ratio, plan, passes, how)
    object.__setattr__(pruned, REPORT_ATTRIBUTE, report)
    return _recovered(pruned, model, options, instruct, recovery) if recovers else pruned


def _method_of(passes: Sequence[Pass] | None) -> str:
    """What the method is called when nobody says so."""
    return DEFAULT_METHOD if passes is None else ", ".join(step.name for step in passes)


def _settings(
    options: Options, unprunable_ratio: float, plan: Plan | None, passes: Any, how: tuple[Pass, ...]
) -> dict[str, Any]:
    """See :class:`Report`. A plan that is replayed makes most of them idle."""
    if plan is not None:
        return {"plan": "given", **({"deploy": options.deploy} if options.deploy else {})}
    given = {**vars(options), "unprunable_ratio": unprunable_ratio}
    if options.method in (DEFAULT_METHOD, _method_of(passes)):
        given["method"] = None
    if passes is not None:
        given["passes"] = [step.name for step in how]
    if options.data is not None and not (isinstance(options.data, str) and options.data in MADE):
        given["data"] = "given"
    if isinstance(options.allocation, Mapping):
        given["allocation"] = dict(options.allocation)
    told: dict[str, Any] = {}
    for name, parameter in inspect_module.signature(compile).parameters.items():
        value = given.get(name, parameter.default)
        value = tuple(value) if isinstance(value, list) and name != "passes" else value
        if name not in _NOT_TOLD and value != parameter.default:
            told[name] = list(value) if isinstance(value, tuple) else value
    if options.merge == any(step.prepare is not None for step in how):
        told.pop("merge", None)
    return told


def _recovered(
    pruned: nn.Module, dense: nn.Module, options: Options, instruct: Any, settings: Recovery | None
) -> nn.Module:
    """``pruned``, trained back on the texts it was calibrated on and on instructions."""
    from graphprune.recovery.recover import recover  # with it come those parts of transformers that train

    with TemporaryDirectory(prefix="graphprune-") as folder:
        return recover(
            pruned,
            folder,
            data=options.data,
            instruct=instruct,
            tokenizer=options.tokenizer,
            dense=dense,
            settings=settings,
            length=options.length,
            validation=_VALIDATION,
        ).model


def inspect(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    inner_axes: bool = False,
    width: bool = False,
    experts: bool = False,
    emit: str = "module",
) -> Inspection:
    """What hangs together in ``model``: its node groups, what they tie, what is pinned, and why. Nothing is changed.

    ``print`` it to read it.

    Args:
        model: any module, also one without weights, on the meta device.
        example_inputs, inner_axes, width, experts, emit: as for :func:`compile`: what is prunable depends on them.

    Returns:
        The :class:`graphprune.inspection.Inspection`.

    Raises:
        GraphPruneError: when the model cannot be traced, or has no parameters.
    """
    _check_model(model)
    if is_dispatched(model):
        model = gathered(model)
    options = Options(inner_axes=inner_axes, width=width, experts=experts, emit=emit)
    program = _program(model, options, example_inputs)
    run_passes(program, pipelines.ANALYSE)
    return Inspection(program)


def _prepared(model: nn.Module, how: Sequence[Pass]) -> nn.Module:
    """The model to trace: the user's, or what a pass wants in its place."""
    for step in how:
        model = model if step.prepare is None else step.prepare(model)
    return model


def _require_gradients_as(model: nn.Module, pruned: nn.Module) -> None:
    """What trains in ``pruned``, of a copy of ``model`` that was frozen for its adapters."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(wanted.get(name, parameter.requires_grad))


def _check_weights_are_here(model: nn.Module) -> None:
    if lacks_weights(model):
        raise GraphPruneError(
            "The model is on the meta device, so there is nothing to score: load its weights, or use method='random'."
        )


def _check_device(device: Any) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise GraphPruneError(f"device={device!r} cannot be used here: {error}") from None


def _pipeline(program: Program, how: tuple[Pass, ...]) -> tuple[Pass, ...]:
    options = program.options
    on_meta = is_on_meta(program.model)
    front = pipelines.plan(how)
    back = (merge_adapters,) if options.merge else ()
    if options.deploy is not None:
        front, back = (*front, state_config), (*back, give_config)
    if options.emit == "graph":
        return (*front, *(pipelines.EMIT_GRAPH[:1] if on_meta or not options.verify else pipelines.EMIT_GRAPH))
    if on_meta or not options.verify:
        return (*front, *pipelines.EMIT_UNVERIFIED, *back)
    return (*front, *(pipelines.EMIT_IN_PLACE if options.inplace else pipelines.EMIT), *back)


def _program(model: nn.Module, options: Options, example_inputs: Any) -> Program:
    first = next(model.parameters(), None)
    if first is None:
        raise GraphPruneError(f"{type(model).__name__} has no parameters: there is nothing to prune.")
    if example_inputs is None:
        inputs = example_inputs_for(model, first.device, first.dtype)
    else:
        inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(first.device), normalise(example_inputs))
    return Program(model, inputs, options)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise GraphPruneError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    for name, tensor in names(model).items():
        if is_lazy(tensor):
            raise GraphPruneError(
                f"{name} has no shape yet: {type(model).__name__} builds its weights at the first forward. Run it once."
            )


def _check_arguments(
    model: Any,
    ratio: Any,
    plan: Any,
    round_to: int,
    skip_first: int,
    skip_last: int,
    aggregation: str,
    emit: str,
    inplace: bool,
) -> None:
    _check_model(model)
    if plan is not None:
        if not isinstance(plan, Plan):
            raise GraphPruneError("plan must be a graphprune.Plan; Plan.from_json reads one.")
        if ratio is not None:
            raise GraphPruneError("Give a ratio or a plan, not both.")
    elif not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 < ratio < 1:  # NaN is not either
        raise GraphPruneError(
            f"ratio is parameters removed / all parameters, between 0 and 1 (both excluded), not {ratio!r}."
        )
    if round_to < 1:
        raise GraphPruneError(f"round_to must be at least 1, not {round_to}.")
    if aggregation not in AGGREGATIONS:
        raise GraphPruneError(f"aggregation is one of {', '.join(AGGREGATIONS)}, not {aggregation!r}.")
    if emit not in ("module", "graph"):
        raise GraphPruneError(f"emit is 'module' (the same class) or 'graph' (a torch.fx.GraphModule), not {emit!r}.")
    if emit == "graph" and inplace:
        raise GraphPruneError("emit='graph' makes a new module: inplace is for emit='module'.")
    if skip_first < 0 or skip_last < 0:
        raise GraphPruneError("skip_first and skip_last count blocks and cannot be negative.")


def _check_deploy(deploy: Any, emit: str) -> None:
    if deploy not in (None, "transformers"):
        raise GraphPruneError(f"deploy is 'transformers', or None for a model that graphprune loads, not {deploy!r}.")
    if deploy is not None and emit == "graph":
        raise GraphPruneError("emit='graph' makes no model of a class: leave out deploy=.")


def _base_config(model: nn.Module) -> Any:
    """The config that builds what all prunings since started from: as it was before the first, or deployed last."""
    earlier: Report | None = getattr(model, REPORT_ATTRIBUTE, None)
    if earlier is not None:
        return earlier.base_config
    return copy.deepcopy(getattr(model, "config", None))


def measure(model: nn.Module) -> tuple[int, int]:
    """(parameters, bytes) of a model, tied ones once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
