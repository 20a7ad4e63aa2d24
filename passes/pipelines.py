"""The compiler as tuples of passes that can be read."""

from __future__ import annotations

from graphprune.passes.base import Pass
from graphprune.passes.build_node_groups import build_node_groups
from graphprune.passes.check_cached_sizes import check_cached_sizes
from graphprune.passes.check_weights import check_weights
from graphprune.passes.emit_graph import emit_graph
from graphprune.passes.find_composed_groups import find_composed_groups
from graphprune.passes.find_ragged_axes import find_ragged_axes
from graphprune.passes.find_removal_structures import find_removal_structures
from graphprune.passes.follow_sizes import follow_sizes
from graphprune.passes.infer_axes import infer_axes
from graphprune.passes.keep_magnitudes import keep_magnitudes
from graphprune.passes.rewrite import rewrite
from graphprune.passes.solve_sizes import solve_sizes
from graphprune.passes.trace_model import trace_model
from graphprune.passes.verify import verify, verify_before_rewrite

ANALYSE: tuple[Pass, ...] = (
    trace_model,
    infer_axes,
    solve_sizes,
    build_node_groups,
    find_composed_groups,
    find_ragged_axes,
    find_removal_structures,
)


def plan(how: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """Everything up to the plan and the sizes that follow from it; ``how`` are the passes that make the plan."""
    return (check_weights, *ANALYSE, *how, follow_sizes, keep_magnitudes)


EMIT: tuple[Pass, ...] = (check_cached_sizes, rewrite, verify)
EMIT_GRAPH: tuple[Pass, ...] = (emit_graph, verify)
EMIT_IN_PLACE: tuple[Pass, ...] = (check_cached_sizes, verify_before_rewrite, rewrite)
EMIT_UNVERIFIED: tuple[Pass, ...] = (check_cached_sizes, rewrite)
