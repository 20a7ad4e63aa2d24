"""The pass interface: what is required, what is ensured, and who is named when something fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphprune import GraphPruneError
from graphprune.ir.program import Options, Program
from graphprune.passes import compiler_pass, pipelines, run_passes
from graphprune.passes.base import Pass
from graphprune.passes.methods import passes_of


def program() -> Program:
    return Program(nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 5)), ((torch.randn(3, 7),), {}), Options(ratio=0.2))


@compiler_pass(ensures=("scores",))
def make_scores(program: Program) -> None:
    program.scores = {}


@compiler_pass(requires=("scores",), ensures=("counts",))
def forget_counts(program: Program) -> None:
    """Promises an order and makes none."""


@compiler_pass()
def fall_over(program: Program) -> None:
    raise ZeroDivisionError("by zero")


def test_a_pass_has_the_name_of_its_function() -> None:
    assert make_scores.name == "make_scores"
    assert make_scores.ensures == ("scores",)


def test_passes_run_in_order_and_are_timed() -> None:
    seconds = run_passes(program(), (make_scores,))
    assert list(seconds) == ["make_scores"]
    assert seconds["make_scores"] >= 0


def test_what_is_missing_is_named_with_the_passes_before() -> None:
    empty = compiler_pass(ensures=())(lambda program: None)
    with pytest.raises(GraphPruneError, match=r"Pass forget_counts requires scores, .* \(none\)"):
        run_passes(program(), (forget_counts,))
    with pytest.raises(GraphPruneError, match=r"requires scores.*\(<lambda>\)"):
        run_passes(program(), (empty, forget_counts))


def test_a_broken_promise_is_named() -> None:
    with pytest.raises(GraphPruneError, match=r"Pass forget_counts promised counts .*\(passes before: make_scores\)"):
        run_passes(program(), (make_scores, forget_counts))


def test_an_unexpected_error_names_the_pass_the_model_and_the_passes_before() -> None:
    with pytest.raises(
        GraphPruneError,
        match=r"Pass fall_over failed on Sequential \(passes before it: make_scores\)"
        r"\. ZeroDivisionError: by zero",
    ) as caught:
        run_passes(program(), (make_scores, fall_over))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_errors_for_the_user_pass_through() -> None:
    @compiler_pass()
    def complain(program: Program) -> None:
        raise GraphPruneError("the user can act on this")

    with pytest.raises(GraphPruneError, match=r"^the user can act on this$"):
        run_passes(program(), (complain,))


@pytest.mark.parametrize("name", ["EMIT", "EMIT_IN_PLACE", "EMIT_UNVERIFIED"])
def test_every_pipeline_provides_what_its_passes_require(name: str) -> None:
    made: set[str] = set()
    steps: tuple[Pass, ...] = (*pipelines.plan(passes_of("magnitude")), *getattr(pipelines, name))
    for step in steps:
        assert set(step.requires) <= made, step.name
        made |= set(step.ensures)
    assert "pruned" in made


def test_a_pipeline_of_ones_own_runs() -> None:
    """Passes are data: a user composes them."""
    own = program()
    seen: list[int] = []

    @compiler_pass(requires=("plan",))
    def look_at_the_plan(program: Program) -> None:
        seen.append(len(program.need("plan").keep))

    run_passes(own, (*pipelines.plan(passes_of("magnitude")), look_at_the_plan, *pipelines.EMIT))
    assert seen == [1]
    assert own.need("pruned") is not own.model


def test_needing_what_is_not_there_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="plan is not there yet"):
        program().need("plan")
