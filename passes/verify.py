"""The oracle: the pruned model must compute what the masked original computes.

Removing a structure must equal dropping its term from every contraction that consumes it. The masked original is the
traced graph run at full size, with the original weights and the true operators, where every contracted operand is
multiplied by the 0/1 keep-mask of its axis, and every statistic that is to follow its axis is taken over what is kept
(:mod:`graphprune.passes.restrict`). A wrong rule cannot hide in it: where an axis was not safe to prune,
the full-size operator sees the removed indices and the sliced one does not.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map_only

from graphprune.errors import GraphPruneError
from graphprune.ir.program import Program
from graphprune.ir.selection import mask_of
from graphprune.passes.base import compiler_pass
from graphprune.passes.biases import new_biases_by_node
from graphprune.passes.precision import Substitute, running_in
from graphprune.passes.restrict import kept_indices, run_on_kept
from graphprune.passes.rewrite import collect_slices, finish, like, sliced, sliced_shape
from graphprune.rules.registry import Contraction
from graphprune.trace.adapters import show_all_adapters
from graphprune.trace.export import Trace, output_tensors
from graphprune.trace.quiet import REFUSALS, seeded, without_autocast, without_hooks
from graphprune.trace.skeleton import copy_structure, names, scratch_copy

# Largest difference allowed, relative to the largest output: rounding of the dtype that both are computed in.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


@compiler_pass(requires=("plan", "axes", "pruned"), ensures=("oracle_error",))
def verify(program: Program) -> None:
    """Compare the pruned model with the masked original on the example inputs.

    Raises :class:`GraphPruneError` if they differ by more than rounding, or the pruned model does not run.
    """
    _prove(program, program.need("pruned"), {})


@compiler_pass(requires=("plan", "axes", "new_attributes"), ensures=("oracle_error",))
def verify_before_rewrite(program: Program) -> None:
    """The same proof before anything is changed, for ``inplace``: weights are sliced one at a time as they are used."""
    slices = collect_slices(program)
    substitutes: dict[int, Substitute] = {}

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        keep = slices.get(id(tensor))
        if keep is None and id(tensor) not in program.updates:
            return tensor
        nothing = torch.zeros(1, dtype=tensor.dtype, device=tensor.device)
        made = like(tensor, nothing.expand(sliced_shape(tensor, keep or {})))
        substitutes[id(made)] = lambda _: sliced(program.weight(tensor), keep or {})
        return made

    preview = copy_structure(program.model, stand_in)
    finish(program, preview)
    _prove(program, preview, substitutes)


def _prove(program: Program, model: nn.Module, substitutes: dict[int, Substitute]) -> None:
    """Both sides in float32, or in the dtype of the model if that is finer; what fails there is tried in float64.

    A deep model can amplify float32 rounding beyond any useful bound; float64 tells that from a wrong rule.
    """
    for dtype in (torch.float32, torch.float64):
        expected, found = masked_outputs(program, dtype), model_outputs(program, model, dtype, substitutes)
        program.oracle_error = largest_difference(found, expected)
        if program.oracle_error <= TOLERANCE[_precision(program, dtype) or dtype]:
            return
    _check_trace(program)
    raise GraphPruneError(
        f"The pruned {type(model).__name__} does not compute what the masked original computes: in float64 the largest "
        f"difference is {program.oracle_error:.3g} of the largest output. An axis rule is wrong for this model, or "
        "its forward uses a size where nothing can follow it (as text, as a key, as an index of a list, in numpy). "
        "Nothing was changed; please report it with the output of graphprune.inspect(model)."
    )


def _check_trace(program: Program) -> None:
    """With nothing removed the graph must compute what the model computes, or nothing can be proven with it."""
    dense = copy.copy(program)
    dense.plan = dataclasses.replace(program.need("plan"), keep={}, under={})
    expected = masked_outputs(dense, torch.float64)
    difference = largest_difference(model_outputs(dense, program.model, torch.float64, {}), expected)
    if difference > TOLERANCE[torch.float64]:
        raise GraphPruneError(
            f"The graph that torch.export makes of {type(program.model).__name__} is not what the model computes: they "
            f"differ by {difference:.3g} of the largest output before anything is removed, so nothing can be proven. "
            "Its forward does something else while it is traced, or with these example inputs: pass others with "
            "example_inputs=, such as the masks that its processor makes. Nothing was changed."
        )


def _precision(program: Program, wanted: torch.dtype) -> torch.dtype | None:
    """The dtype to convert to, or None when all weights are in it anyway, so that nothing is to be converted."""
    have = {tensor.dtype for tensor in names(program.model).values() if tensor.is_floating_point()}
    if have == {torch.float64}:
        wanted = torch.float64
    return None if have == {wanted} and wanted is torch.float32 else wanted


def model_outputs(
    program: Program, model: nn.Module, dtype: torch.dtype, substitutes: dict[int, Substitute]
) -> list[torch.Tensor]:
    """What ``model`` returns for the example inputs, in eval mode and computed in ``dtype``; its state stays."""
    own = _own_copy(_precision(program, dtype))

    def clone(tensor: torch.Tensor) -> torch.Tensor:
        substitute = substitutes.get(id(tensor))
        return own(tensor if substitute is None else substitute(tensor))

    args, kwargs = tree_map_only(torch.Tensor, own, program.inputs)
    try:
        written = program.need("trace").written & set(names(model))
        scratch = scratch_copy(model, written, clone)
        show_all_adapters(scratch)
        with without_hooks(scratch), _quietly(program, dtype, substitutes):
            return output_tensors(scratch(*args, **kwargs))
    except Exception as error:
        raise GraphPruneError(
            f"The pruned {type(model).__name__} does not run: {type(error).__name__}: {error}. "
            "A size in its code did not follow; nothing was changed. Please report it."
        ) from error


def _own_copy(dtype: torch.dtype | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Copies what forward may write to, in the dtype that is computed in: a view of it is then no conversion."""

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(dtype if tensor.is_floating_point() else None, copy=True)

    return copy


@contextmanager
def _quietly(program: Program, dtype: torch.dtype, substitutes: dict[int, Substitute] | None = None) -> Iterator[None]:
    """What both sides run in: the same precision, no autocast, the same random numbers."""
    with torch.no_grad(), seeded(), without_autocast(), running_in(_precision(program, dtype), substitutes):
        yield


def masked_outputs(program: Program, dtype: torch.dtype) -> list[torch.Tensor]:
    """The outputs of the masked original on the example inputs, computed in ``dtype``."""
    found: Trace = program.need("trace")
    held = names(program.model)
    own = _own_copy(_precision(program, dtype))
    # One copy for all names of a tied tensor.
    copies = {id(held[name]): own(program.weight(held[name])) for name in found.written}
    given = iter(found.inputs)
    arguments: list[Any] = []
    for node in found.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in found.tensor_names:
            tensor = held[found.tensor_names[node.name]]
            arguments.append(copies.get(id(tensor), program.weight(tensor)))
        elif node.name in found.constants:
            arguments.append(own(found.constants[node.name]))
        else:
            arguments.append(own(next(given)))
    real = scratch_copy(program.model, found.written, own) if found.opaque.why else nn.Identity()
    with without_hooks(real), _quietly(program, dtype):
        show_all_adapters(real)
        return _Masked(program, real).run_outputs(arguments)


class _Masked(fx.Interpreter):
    """Runs the graph with the keep-mask of every contracted dimension applied to its operand."""

    def __init__(self, program: Program, real: nn.Module):
        """``real`` is the original, to run opaque modules of if there are any."""
        trace, axes = program.need("trace"), program.need("axes")
        super().__init__(trace.module)
        self._outputs = trace.outputs
        self._opaque = trace.opaque
        self._real = real
        selection = program.selection()
        self._masks: dict[fx.Node, list[tuple[Contraction, torch.Tensor]]] = {}
        for contraction in axes.facts.contractions:
            mask = mask_of(axes.values[contraction.operand], contraction.dim, selection)
            if mask is not None:
                self._masks.setdefault(contraction.node, []).append((contraction, mask))
        self._kept_indices = kept_indices(program)
        self._new_biases = new_biases_by_node(program)

    def run_outputs(self, arguments: list[Any]) -> list[torch.Tensor]:
        kept: dict[fx.Node, torch.Tensor] = {}
        self._kept = kept
        self.run(*arguments, enable_io_processing=False)
        return [kept[node] for node in self._outputs]

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and n.target in _NO_OPERATION:
            return None
        if n in self._kept_indices:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            out = run_on_kept(n.target, self._kept_indices[n], args, kwargs)
        else:
            out = super().run_node(n)
        if n in self._new_biases:
            out = out + self._new_biases[n]
        if n in self._outputs:
            self._kept[n] = out
        return out

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target is torch.ops.graphprune.enter.default:
            return list(args[0])
        if target is torch.ops.aten.view.default:
            # The trace was of fake tensors, whose fused attention may lay its output out otherwise than the real one.
            target = torch.ops.aten.reshape.default
        if target is torch.ops.graphprune.opaque.default:
            call = self._opaque.calls[args[2]]
            try:
                return call.run(self._real.get_submodule(call.path), args[0])
            except REFUSALS as error:
                raise GraphPruneError(
                    f"The module {call.path} cannot be traced, and fails on what the rest of the graph gives it "
                    f"({type(error).__name__}: {error}): forward does something else while it is traced. Pass other "
                    "example_inputs=, such as the masks that its processor makes. Nothing was changed."
                ) from error
        return super().call_function(target, args, kwargs)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple, dict]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if n in self._masks:
            operands = list(args)
            for contraction, mask in self._masks[n]:
                arg, item = contraction.arg, contraction.item
                if item is None:
                    operands[arg] = _masked(operands[arg], mask)
                else:
                    of_list = list(operands[arg])
                    of_list[item] = _masked(of_list[item], mask)
                    operands[arg] = of_list
            args = tuple(operands)
        return args, kwargs


def _masked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``x`` with zeros where ``mask`` keeps nothing, also where that is NaN or infinite."""
    return x.masked_fill(~mask.to(x.device), 0)


# The traced graph states dtypes and devices that hold for the traced inputs; the run repeats them anyway.
_NO_OPERATION = {torch.ops.aten._assert_tensor_metadata.default}


def largest_difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest absolute difference over the largest absolute value of each output; inf for other shapes or NaN."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.numel() == 0:
            continue
        a, b, floating = a.detach().double(), b.detach().double(), b.is_floating_point()
        scale = max(float(b.abs().max()), 1e-30) if floating else 1.0
        difference = float((a - b).abs().max()) / scale
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst
