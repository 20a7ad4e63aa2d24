"""Gradients of the calibration loss, one layer after another: never those of the whole model at once.

A criterion such as ``Σ|w·g|`` needs the gradient summed over all calibration data before the absolute value, so batches
cannot be scored one by one. Plain accumulation over batches would hold a gradient as large as the model. Here

- one batch alone is one backward pass, and each gradient is used and dropped as soon as it is there;
- of several batches, first all run forward, and the graph is *cut* behind every block. Then one block after another,
  the last first, runs backward for all batches; its gradients are then complete, are used and dropped. The blocks are
  those that transformers marks as fit for gradient checkpointing: of them only the inputs are kept, and their
  activations are computed again, one block of one batch at a time. What is outside of the blocks counts as one layer;
  in a model without such blocks that is all of it.

Held at once are the inputs of every block for all data, the activations of one block (and of what follows the last)
for one batch, and the gradients of one block, in float32. Squares of single samples are kept the same way; a parameter
whose gradient comes in parts (a tied embedding, a block that runs twice) cannot be squared part by part, so such
parameters get full backward passes of their own, in which their gradients alone are held.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from graphprune.data.calibration import calibration_batches
from graphprune.data.texts import Say
from graphprune.errors import GraphPruneError
from graphprune.ir.program import Program
from graphprune.passes.score.loss import calibration_loss, count_samples, single_samples
from graphprune.trace.inputs import forward_parameters
from graphprune.trace.placement import placed
from graphprune.trace.quiet import REFUSALS, seeded, without_hooks
from graphprune.trace.skeleton import copy_structure, names

# Name of a parameter, its gradient, the mean of its squared gradients of single samples (if asked for): of the shape
# of the parameter, float32 or its own dtype if that is wider.
Use = Callable[[str, torch.Tensor, torch.Tensor | None], None]


def each_gradient(program: Program, wanted: Iterable[str], use: Use, squares: bool = False) -> None:
    """Call ``use`` once for each of the ``wanted`` parameters (canonical names) that the loss depends on.

    The loss is the mean over all samples of ``data=`` (:func:`graphprune.passes.score.loss.calibration_loss`). With
    ``squares`` every sample runs by itself, for the diagonal of the empirical Fisher information. The model is not
    changed: a copy that shares its weights runs, in eval mode.

    Raises :class:`GraphPruneError` when the model cannot run the data, or the loss is not finite.
    """
    batches = calibration_batches(program)
    if squares:
        batches = [sample for batch in batches for sample in single_samples(batch)]
    model, parameters = _differentiable_copy(program, wanted)
    sums = _Sums(parameters, sum(map(count_samples, batches)), squares, use)

    def run(batch: dict[str, Any]) -> torch.Tensor:
        batch = tree_map_only(torch.Tensor, lambda tensor: tensor.to(program.device), batch)
        return _finite(calibration_loss(model, batch, program.options.seed))

    try:
        with (
            seeded(program.options.seed),
            torch.inference_mode(False),
            torch.enable_grad(),
            without_hooks(model),
            placed(model, program.device),
        ):
            if "use_cache" in forward_parameters(model):
                model.forward = functools.partial(model.forward, use_cache=False)  # type: ignore[method-assign]
            if len(batches) == 1:
                sums.at_once = True
                _backward(run(batches[0]))
            else:
                _block_by_block(model, batches, run, sums, program.say)
    except REFUSALS as error:
        raise GraphPruneError(f"The gradients of the calibration loss could not be computed: {error}") from error


def _differentiable_copy(program: Program, wanted: Iterable[str]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy to run and throw away, whose parameters are new objects over the same memory; the wanted ones by name."""
    held = names(program.model)
    chosen = {id(held[name]): name for name in wanted}
    written = {id(held[name]) for name in program.need("trace").written}
    parameters: dict[str, nn.Parameter] = {}

    def replace(tensor: torch.Tensor) -> torch.Tensor:
        value = program.weight(tensor)
        value = value.clone() if id(tensor) in written else value
        if not isinstance(tensor, nn.Parameter):
            return value
        parameter = nn.Parameter(value, requires_grad=id(tensor) in chosen)
        if id(tensor) in chosen:
            parameters[chosen[id(tensor)]] = parameter
        return parameter

    return copy_structure(program.model, replace).eval(), parameters


def _finite(loss: torch.Tensor) -> torch.Tensor:
    if not math.isfinite(loss.item()):
        raise GraphPruneError(
            f"The loss of a calibration batch is {loss.item()}: data= or the weights hold NaN or infinite values, or "
            "the activations overflow in this dtype. Nothing was changed."
        )
    return loss


def _backward(loss: torch.Tensor, retain_graph: bool = False) -> None:
    if loss.requires_grad:
        loss.backward(retain_graph=retain_graph)


def _nested(name: str) -> GraphPruneError:
    return GraphPruneError(
        f"{name} gets a part of its gradient after its own module is done, as it does in a nested backward pass "
        "(reentrant checkpointing). Switch that off."
    )


class _Sums:
    """Takes the gradients off the parameters as they come, and hands them on when they are complete.

    ``batch`` is the number of the batch that runs backward. Of the parameters ``in_parts`` there are no squares yet.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], samples: int, squares: bool, use: Use):
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._samples, self._squares, self._use = samples, squares, use
        self._held: dict[nn.Parameter, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._finished: set[nn.Parameter] = set()
        self._seen: set[tuple[nn.Parameter, int]] = set()
        self._again: set[nn.Parameter] = set()
        self.in_parts: set[nn.Parameter] = set()
        self.batch = 0
        self.at_once = False  # the next gradient of every parameter is its last
        for parameter in parameters.values():
            parameter.register_post_accumulate_grad_hook(self._take)

    def only_in_parts(self) -> None:
        """Go on with the gradients of ``in_parts`` alone, from nothing, each now in one piece per batch."""
        self._again, self.in_parts = self.in_parts, set()
        for parameter in self._names:
            parameter.requires_grad_(parameter in self._again)
        self._seen.clear()

    def _take(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        if parameter in self._finished:
            raise _nested(self._names[parameter])
        gradient, parameter.grad = parameter.grad, None
        if self._squares and (parameter, self.batch) in self._seen:
            if parameter in self._again:
                raise _nested(self._names[parameter])
            self.in_parts.add(parameter)
            self._held.pop(parameter, None)
        self._seen.add((parameter, self.batch))
        if parameter not in self.in_parts:
            gradient = gradient.to_dense().to(torch.promote_types(parameter.dtype, torch.float32))
            first, second = self._held.get(parameter, (None, None))
            if self._squares:
                second = gradient.square() if second is None else second.addcmul_(gradient, gradient)
            self._held[parameter] = (gradient if first is None else first.add_(gradient), second)
        if self.at_once:
            self.finish([parameter])

    def finish(self, parameters: Iterable[nn.Parameter]) -> None:
        """No more gradients of these will come: use them and let go of them."""
        for parameter in parameters:
            if parameter in self._held:
                self._finished.add(parameter)
                first, second = self._held.pop(parameter)
                second = None if second is None else second.div_(self._samples)
                self._use(self._names[parameter], first.div_(self._samples), second)

    def finish_all(self) -> None:
        self.finish(list(self._held))


@dataclass
class _Output:
    """One tensor that a block returned: the graph that made it, and the gradient that has come back to it so far."""

    made_by: GradientEdge
    value: torch.Tensor | None
    gradient: torch.Tensor | None = None


class _Cut(torch.autograd.Function):
    """The value of an output as the start of a new graph; the gradient stops here and is kept."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, output: _Output) -> torch.Tensor:
        ctx.output = output
        value, output.value = output.value, None
        assert value is not None
        return value

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        output: _Output = ctx.output
        output.gradient = gradient if output.gradient is None else output.gradient + gradient
        return None, None


Calls = list[tuple[nn.Module, list[_Output]]]  # every call of a block, with the tensors that it returned


@contextmanager
def _cut(blocks: Iterable[nn.Module]) -> Iterator[Calls]:
    """Cuts the graph behind every block inside; gives the list that calls are appended to."""
    calls: Calls = []
    anchor = torch.zeros((), requires_grad=True)

    def cut(block: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs: list[_Output] = []

            def restart(tensor: torch.Tensor) -> torch.Tensor:
                if not tensor.requires_grad:
                    return tensor
                outputs.append(_Output(get_gradient_edge(tensor), tensor.detach()))
                return _Cut.apply(anchor, outputs[-1])

            found = tree_map_only(torch.Tensor, restart, _run_repeatably(block, plain, args, kwargs))
            calls.append((block, outputs))
            return found

        return forward

    plain = [(block, block.forward) for block in blocks]
    try:
        for block, forward in plain:
            block.forward = cut(block, forward)
        yield calls
    finally:
        for block, forward in plain:
            block.forward = forward


def _run_repeatably(block: nn.Module, plain: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run a block so that backward computes its activations again; only its inputs stay."""
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    versions = [tensor._version for tensor in inputs]
    found = checkpoint(plain, *args, use_reentrant=False, **kwargs)
    if [tensor._version for tensor in inputs] != versions:
        raise GraphPruneError(
            f"{type(block).__name__} writes to its inputs in place, so it cannot run a second time for its gradient: "
            "pass data= as one batch, a list with one dict of tensors."
        )
    return found


def _block_by_block(
    model: nn.Module,
    batches: list[dict[str, Any]],
    run: Callable[[dict[str, Any]], torch.Tensor],
    sums: _Sums,
    say: Say,
) -> None:
    """Backward for all batches, all of one call of a block before any of the call before it.

    Everything is linear in the gradients that come back to the cuts, so it does not matter which part of the graph
    runs when, as long as what uses a value runs before what made it; hence also ``retain_graph``: what two blocks
    share outside of both runs twice, each time for another part of the gradient.
    """
    calls: list[Calls] = []
    with _cut(blocks_of(model)) as of_batch:
        for sums.batch, batch in enumerate(batches):
            _backward(run(batch), retain_graph=True)
            calls.append(of_batch.copy())
            of_batch.clear()
            say(f"gradients: {sums.batch + 1} of {len(batches)} batches")
    first_call: dict[nn.Module, int] = {}
    for of_batch in calls:
        for place, (block, _) in enumerate(of_batch):
            first_call[block] = min(place, first_call.get(block, place))
    complete_after = _complete_after(model, first_call)
    deepest = max(map(len, calls))
    for place in reversed(range(deepest)):
        for sums.batch, of_batch in enumerate(calls):
            if len(of_batch) > place:
                outputs = [output for output in of_batch.pop()[1] if output.gradient is not None]
                edges, gradients = [o.made_by for o in outputs], [o.gradient for o in outputs]
                torch.autograd.backward(edges, gradients, retain_graph=True)  # type: ignore[arg-type]
        sums.finish(complete_after.get(place, ()))
        say(f"gradients of blocks: {deepest - place} of {deepest}")
    sums.finish_all()
    if sums.in_parts:
        sums.only_in_parts()
        for sums.batch, batch in enumerate(batches):
            _backward(run(batch))
        sums.finish_all()


def _complete_after(model: nn.Module, first_call: dict[nn.Module, int]) -> dict[int, list[nn.Parameter]]:
    """Place of a call → parameters that no earlier call, and nothing outside of the blocks, uses."""
    outside = {parameter for module in _outside(model, first_call) for parameter in module._parameters.values()}
    place_of: dict[nn.Parameter, int] = {}
    for block, place in first_call.items():
        for parameter in block.parameters():
            if parameter not in outside:
                place_of[parameter] = min(place, place_of.get(parameter, place))
    found: dict[int, list[nn.Parameter]] = {}
    for parameter, place in place_of.items():
        found.setdefault(place, []).append(parameter)
    return found


def _outside(model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Every module that is in none of these blocks."""
    inside = {module for block in blocks for module in block.modules()}
    return (module for module in model.modules() if module not in inside)


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that transformers marks as fit to run a second time."""
    if isinstance(model, GradientCheckpointingLayer):
        yield model
    else:
        for child in model.children():
            yield from blocks_of(child)
