"""Refuse weights that cannot be pruned, before anything is computed with them."""

from __future__ import annotations

import torch

from graphprune.errors import GraphPruneError
from graphprune.ir.program import Program
from graphprune.passes.base import compiler_pass

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@compiler_pass()
def check_weights(program: Program) -> None:
    """Every parameter is a plain floating-point tensor without NaN or infinite values.

    The values of one on disk are looked at when they are read.

    Raises :class:`GraphPruneError` naming the first that is not.
    """
    if getattr(program.model, "is_quantized", False) or getattr(program.model, "hf_quantizer", None) is not None:
        raise GraphPruneError(
            f"{type(program.model).__name__} is quantised. Load it without quantization (or dequantise it), prune, "
            "and quantise the result."
        )
    for name, parameter in program.model.named_parameters():
        if parameter.is_complex():
            raise GraphPruneError(
                f"The parameter {name} is complex ({parameter.dtype}), and scores of complex weights are not defined. "
                "Store it as real numbers (torch.view_as_real), and make it complex inside forward."
            )
        if parameter.dtype not in _FLOATS or type(parameter.data) is not torch.Tensor:
            kind = type(parameter.data).__name__
            raise GraphPruneError(
                f"The parameter {name} is a {kind} of {parameter.dtype}: quantised or packed weights cannot be sliced. "
                "Load the model in a floating-point dtype, prune, and quantise the result."
            )
        if not parameter.is_meta and not _finite(program.weight(parameter)):
            raise GraphPruneError(f"The parameter {name} holds NaN or infinite values; repair the model first.")


def _finite(tensor: torch.Tensor) -> bool:
    # One pass without a temporary: a sum is finite unless something in it is not, or it overflows.
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())
