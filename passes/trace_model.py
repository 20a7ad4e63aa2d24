"""nn.Module → fx graph."""

from __future__ import annotations

from graphprune.ir.program import Program
from graphprune.passes.base import compiler_pass
from graphprune.passes.emit_graph import state_scales
from graphprune.trace.export import trace


@compiler_pass(ensures=("trace",), analysis=True)
def trace_model(program: Program) -> None:
    """Export the model to ATen operators; see :func:`graphprune.trace.export.trace`."""
    program.trace = trace(program.model, program.inputs)
    if program.options.emit == "graph":
        state_scales(program.trace)
