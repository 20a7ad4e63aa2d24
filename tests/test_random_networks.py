"""Random networks: whatever is prunable in them is pruned right, proved by the oracle in float64.

``make test`` looks at 100 networks, ``make test-slow`` at 200 more, ``make fuzz`` at 2,000, or
``make fuzz FIRST=5000 NETWORKS=10000``. The number of a network is its seed. A failure prints the smallest network it
could be cut down to, as Python.
"""

from __future__ import annotations

import copy
import os
from random import Random

import pytest
import torch
from helpers import analyse, plan_removing, snapshot
from random_networks import STEPS, Network, random_network, smallest
from torch import nn

import graphprune
from graphprune import GraphPruneError, Plan
from graphprune.ir.program import NodeGroup, Program
from graphprune.passes import pipelines, run_passes
from graphprune.passes.follow_sizes import follow_sizes
from graphprune.passes.methods import passes_of
from graphprune.passes.replay_plan import replay_plan
from graphprune.rules import registry
from graphprune.trace.skeleton import names

FIRST, NETWORKS, BLOCK = int(os.environ.get("FIRST", 0)), int(os.environ.get("NETWORKS", 300)), 50
BLOCKS = range(FIRST, FIRST + NETWORKS, BLOCK)
QUICK = 2  # blocks
EXACT = 1e-9


def check(network: Network) -> list[str]:
    """Every prunable axis by itself, all together, by ratio in two allocations, and in place; their names."""
    model, x = network.build()
    unchanged = snapshot(model)
    program = analyse(model, x, method="random")
    random = Random(network.seed)
    gone = {}
    for group in program.need("prunable"):
        gone[group.name] = (group.size, random.sample(range(group.size), random.randint(1, group.size - _least(group))))
        _emit(program, plan_removing({group.name: gone[group.name]}), group.name)
    if gone:
        plan = plan_removing(gone)
        assert Plan.from_json(plan.to_json()) == plan
        pruned = _emit(program, plan, "all axes together")
        _by_ratio(program)
        unchanged()
        if network.seed % 4 == 0:  # the public way traces once more, which is what costs time
            given = copy.deepcopy(model)
            _same(graphprune.compile(given, plan=plan, example_inputs=x, inplace=True), pruned)
            assert 0 < graphprune.report(given).ratio < 1
        unchanged()
        program.options.inplace = True
        run_passes(program, (replay_plan(plan), follow_sizes, *pipelines.EMIT_IN_PLACE))
        _same(model, pruned)
    return list(gone)


def _least(group: NodeGroup) -> int:
    return max(group.minimum, group.careful)


def _emit(program: Program, plan: Plan, what: str) -> nn.Module:
    run_passes(program, (replay_plan(plan), follow_sizes, *pipelines.EMIT))
    assert program.need("oracle_error") <= EXACT, what
    return program.need("pruned")


def _by_ratio(program: Program) -> None:
    """The passes from scores to the proof, at the largest of a few ratios that can be reached."""
    for program.options.allocation in ("uniform", "global"):
        for program.options.ratio in (0.5, 0.2, 0.05):
            try:
                run_passes(program, (*passes_of("magnitude"), follow_sizes, *pipelines.EMIT))
            except GraphPruneError as error:
                if "cannot be reached" not in str(error):
                    raise
                continue
            assert program.need("oracle_error") <= EXACT, program.options.allocation
            break


def _same(a: nn.Module, b: nn.Module) -> None:
    assert list(names(a)) == list(names(b))
    for name, tensor in names(a).items():
        assert torch.equal(tensor, names(b)[name]), name
    numbers = [{k: v for k, v in vars(m).items() if isinstance(v, int)} for m in (a, b)]
    assert numbers[0] == numbers[1]


def failure(network: Network) -> str:
    """What is wrong with a network, or nothing."""
    try:
        check(network)
    except (GraphPruneError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _kind(text: str) -> str:
    """Two failures of one kind are taken for one failure while a network is cut down."""
    kinds = ("does not compute", "does not run", "This is a bug", "could not be traced")
    return next((kind for kind in kinds if kind in text), text[:20])


def _explain(network: Network, what: str) -> str:
    least = smallest(network, lambda candidate: _kind(failure(candidate)) == _kind(what))
    return f"random_network({network.seed}): {failure(least)}\n\n{least.source}\nwhich is\n{least!r}"


@pytest.mark.parametrize(
    "first", [*BLOCKS[:QUICK], *(pytest.param(first, marks=pytest.mark.slow) for first in BLOCKS[QUICK:])]
)
def test_random_networks(first: int) -> None:
    """No network is pruned wrong, and in most of them there is something to prune."""
    seeds = range(first, min(first + BLOCK, FIRST + NETWORKS))
    with_axes = 0
    for seed in seeds:
        network = random_network(seed)
        try:
            with_axes += bool(check(network))
        except (GraphPruneError, AssertionError) as error:
            pytest.fail(_explain(network, f"{type(error).__name__}: {error}"))
    assert with_axes >= 0.6 * len(seeds), f"only {with_axes} of {len(seeds)} have an axis that may be pruned"


def test_every_step_is_drawn() -> None:
    steps = {step for seed in range(600) for step in random_network(seed).steps}
    assert steps == set(STEPS)


def test_a_network_prints_as_itself() -> None:
    network = random_network(7)
    again = eval(repr(network))
    assert again == network == random_network(7)
    assert failure(again) == ""


def test_a_broken_rule_is_found_and_cut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax that does not pin is wrong; what is left of the network shows little else."""
    softmax = torch.ops.aten.softmax
    monkeypatch.setitem(registry._RULES, softmax, lambda r, x, dim, *options: x)
    for seed in range(60):
        network = random_network(seed)
        if "does not compute" in failure(network):
            least = smallest(network, lambda n: "does not compute" in failure(n))
            assert "softmax" in least.source
            assert len(least.forward) <= min(len(network.forward), 12)
            return
    pytest.fail("no network shows it")
