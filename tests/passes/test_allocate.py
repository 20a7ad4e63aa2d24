"""How the budget is spread over the axes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import X, analyse, toy
from torch import nn

import graphprune
from graphprune import GraphPruneError
from graphprune.passes import run_passes
from graphprune.passes.allocate_budget import FIRST, allocate_budget, allocation_names
from graphprune.passes.score import score_by


def shares(model: nn.Module, allocation: Any, ratio: float = 0.2, **options: Any) -> dict[str, float]:
    """Name of every axis → the share of it that goes."""
    program = analyse(model, X, inner_axes=False, ratio=ratio, allocation=allocation, **options)
    run_passes(program, (score_by("l2"), allocate_budget("uniform")))
    counts = program.need("counts")
    return {group.name: counts.get(group.name, 0) / group.size for group in program.need("prunable")}


def hidden(found: dict[str, float]) -> list[float]:
    """Of the MLPs, block by block."""
    return [share for name, share in found.items() if ".mlp." in name]


def deep(blocks: int = 10) -> nn.Module:
    return toy(blocks, width=16, heads=8, hidden=200)


@pytest.mark.parametrize("allocation", sorted({*allocation_names()}))
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.6])
def test_every_allocation_reaches_the_ratio(allocation: str, ratio: float) -> None:
    pruned = graphprune.compile(deep(4), ratio, example_inputs=X, allocation=allocation, verify=False)
    assert graphprune.report(pruned).ratio == pytest.approx(ratio, abs=0.01)


def test_uniform_shrinks_all_alike() -> None:
    assert hidden(shares(deep(), "uniform")) == pytest.approx([hidden(shares(deep(), None))[0]] * 10, abs=0.01)


def test_log_increasing_is_equation_6() -> None:
    found = hidden(shares(deep(), "log-increasing"))
    wanted = [FIRST + (1 - FIRST) * math.log(i + 1) / math.log(10) for i in range(10)]
    assert [share / found[-1] for share in found] == pytest.approx(wanted, abs=0.02)
    assert hidden(shares(deep(), "log-decreasing")) == pytest.approx(found[::-1], abs=0.02)


def test_sparing_leaves_the_ends_and_coarse_axes_until_the_rest_has_lost_half() -> None:
    model = toy(16, width=16, heads=4, hidden=200)
    found = shares(model, "sparing", 0.2)
    heads = [share for name, share in found.items() if ".attention." in name]
    assert hidden(found)[:2] == [0, 0]
    assert hidden(found)[-1] == 0
    assert 0 < min(hidden(found)[2:-1]) <= max(hidden(found)[2:-1]) < 0.5
    assert set(heads) == {0}
    far = hidden(shares(model, "sparing", 0.5))
    assert far[5] > 0.5 > far[0] > 0
    assert far[5] - far[0] == pytest.approx(0.5, abs=0.02)


def test_ratios_of_ones_own_are_relative_and_zero_spares() -> None:
    found = shares(deep(), {"layers.0": 0.0, "layers.1.mlp": 0.2, "layers.*.mlp": 0.4})
    assert hidden(found)[0] == 0
    assert hidden(found)[1] == pytest.approx(hidden(found)[2] / 2, abs=0.01)
    assert all(share == 0 for name, share in found.items() if ".attention." in name)


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        ("best", "no allocation 'best'"),
        ({"nowhere": 0.5}, "matches no axis"),
        ({"layers.0": 1.5}, r"ratios in \[0, 1\]"),
        ({"layers.0": "half"}, r"ratios in \[0, 1\]"),
    ],
)
def test_what_makes_no_allocation_is_refused(allocation: Any, message: str) -> None:
    with pytest.raises(GraphPruneError, match=message):
        graphprune.compile(toy(), 0.2, example_inputs=X, allocation=allocation)


def test_comparing_scores_without_any_is_refused() -> None:
    with pytest.raises(GraphPruneError, match="compares scores"):
        graphprune.compile(
            toy(), 0.2, example_inputs=X, allocation="global", passes=(allocate_budget("uniform"),), method="magnitude"
        )


def test_standardised_compares_in_standard_deviations() -> None:
    """An axis whose scores are all alike goes at zero, with the middle of the others."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(7, 40), nn.Linear(40, 40), nn.Linear(40, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(x).relu()).relu())

    torch.manual_seed(0)
    program = analyse(Two().eval(), X, ratio=0.4, allocation="standardised")
    run_passes(program, (score_by("l2"),))
    scores = program.need("scores")
    scores["a.weight[0]"] *= 1000  # of no consequence
    run_passes(program, (allocate_budget("uniform"),))
    scaled = dict(program.need("counts"))
    scores["a.weight[0]"] /= 1000
    run_passes(program, (allocate_budget("uniform"),))
    assert program.need("counts") == scaled
