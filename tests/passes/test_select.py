"""Budget, order and selection: how much goes, what goes first, and what is spared."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from helpers import X, analyse, numel, randomise, toy
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import graphprune
from graphprune import GraphPruneError
from graphprune.ir.plan import Plan
from graphprune.ir.program import Options, Program
from graphprune.passes import run_passes
from graphprune.passes.find_removal_structures import find_removal_structures


class Mlp(nn.Module):
    def __init__(self, hidden: int = 40) -> None:
        super().__init__()
        self.first = nn.Linear(7, hidden)
        self.second = nn.Linear(hidden, 20)
        self.last = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Mlp())


@functools.cache
def analysed() -> Program:
    """A transformer of five blocks, traced once."""
    return analyse(toy(5), X)


def free(**options: Any) -> tuple[set[str], dict[str, str]]:
    """Names of the prunable axes under some options, and the reasons of the others."""
    program = analysed()
    program.options = Options(**options)
    run_passes(program, (find_removal_structures,))
    return {group.name for group in program.need("prunable")}, program.need("skipped")


def blocks(**options: Any) -> set[str]:
    return {name.split(".")[1] for name in free(**options)[0]}


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.25, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_ratio_is_reached_to_within_one_structure(ratio: float, allocation: str) -> None:
    model = mlp()
    total = numel(model)
    report = graphprune.report(
        graphprune.compile(model, ratio, method="magnitude", example_inputs=X, allocation=allocation)
    )
    assert report.ratio <= ratio
    hidden, inner = (
        report.widths.get(f"{name}.weight[0]", (size, size))[1] for name, size in (("first", 40), ("second", 20))
    )
    costs = [7 + 1 + inner if hidden > 1 else 0, hidden + 1 + 5 if inner > 1 else 0]
    smallest = min(cost for cost in costs if cost)
    assert (ratio - report.ratio) * total < smallest  # not one more structure would have fitted


def test_the_smallest_go_first() -> None:
    model = mlp()
    with torch.no_grad():
        for part in (model.first.weight, model.first.bias, model.second.weight.T):
            part[[3, 17, 30]] *= 1e-3
    share = 3 * (8 + 20) / numel(model)
    report = graphprune.report(
        graphprune.compile(
            model, share + 1e-6, method="magnitude", example_inputs=X, allocation="global", include=["first"]
        )
    )
    assert set(range(40)) - set(report.plan.keep["first.weight[0]"]) == {3, 17, 30}


def test_uniform_allocation_shrinks_all_axes_alike() -> None:
    report = graphprune.report(
        graphprune.compile(mlp(), 0.4, method="magnitude", example_inputs=X, allocation="uniform")
    )
    shares = [after / before for before, after in report.widths.values()]
    assert len(shares) == 2
    assert max(shares) - min(shares) <= 0.06


def test_global_allocation_takes_from_where_structures_differ() -> None:
    model = mlp()
    with torch.no_grad():  # half of the first axis is next to nothing; the second axis is even
        model.first.weight[:20] *= 1e-3
        model.first.bias[:20] *= 1e-3
        model.second.weight[:, :20] *= 1e-3
    report = graphprune.report(
        graphprune.compile(model, 0.3, method="magnitude", example_inputs=X, allocation="global")
    )
    assert list(report.widths) == ["first.weight[0]"]
    assert set(range(20, 40)) <= set(report.plan.keep["first.weight[0]"])


def test_at_least_one_index_stays_everywhere() -> None:
    with pytest.raises(GraphPruneError) as caught:
        graphprune.compile(mlp(), 0.999, method="magnitude", example_inputs=X)
    most = float(str(caught.value).split("cannot be reached: ")[1].split(" ")[0])
    pruned = graphprune.compile(mlp(), most - 1e-4, example_inputs=X)
    assert min(pruned.first.out_features, pruned.second.out_features) == 1
    assert numel(pruned) >= 7 + 1 + 1 + 1 + 5 + 5


def test_unreachable_with_round_to_says_so() -> None:
    with pytest.raises(GraphPruneError, match="round_to=16"):
        graphprune.compile(mlp(), 0.8, method="magnitude", example_inputs=X, round_to=16)


@pytest.mark.parametrize("round_to", [4, 8])
def test_widths_are_multiples_of_round_to(round_to: int) -> None:
    pruned = graphprune.compile(mlp(), 0.4, method="magnitude", example_inputs=X, round_to=round_to)
    assert pruned.first.out_features % round_to == 0
    assert pruned.first.out_features < 40


def test_round_to_counts_the_width_of_a_head() -> None:
    """A head is 8 rows: widths in multiples of 16 take two heads at a time."""
    pruned = graphprune.compile(toy(2), 0.3, method="magnitude", round_to=16, example_inputs=X)
    for layer in pruned.layers:
        assert layer.attention.q_proj.out_features in (16, 32)
        assert layer.mlp.up.out_features % 16 == 0


def test_skip_first_and_last_spare_blocks() -> None:
    assert blocks() == {"0", "1", "2", "3", "4"}
    assert blocks(skip_first=1, skip_last=2) == {"1", "2"}
    assert blocks(skip_first=3, skip_last=3) == set()


def test_a_spared_block_says_so() -> None:
    _, skipped = free(skip_first=2)
    assert "skip_first" in skipped["layers.1.mlp.up.weight[0]"]
    assert "layers.2.mlp.up.weight[0]" not in skipped


def test_include_prunes_nothing_else() -> None:
    assert free(include=["*.mlp"])[0] == {f"layers.{i}.mlp.up.weight[0]" for i in range(5)}
    assert free(include=["*.mlp"])[1]["layers.0.attention.q_proj.weight[0].0"] == "not included"
    assert free(include=["layers.3"])[0] == {"layers.3.mlp.up.weight[0]", "layers.3.attention.q_proj.weight[0].0"}


def test_exclude_spares_and_says_so() -> None:
    names, skipped = free(exclude=["*.mlp"])
    assert not any(".mlp." in name for name in names)
    assert skipped["layers.0.mlp.up.weight[0]"] == "excluded"


def test_exclude_wins_over_include() -> None:
    assert blocks(include=["*.mlp"], exclude=["layers.0"]) == {"1", "2", "3", "4"}


def test_a_pattern_may_be_one_string_and_reaches_the_plan() -> None:
    report = graphprune.report(
        graphprune.compile(toy(2), 0.1, method="magnitude", example_inputs=X, include="*.mlp", skip_first=1)
    )
    assert list(report.widths) == ["layers.1.mlp.up.weight[0]"]
    assert report.skipped == report.plan.skipped


def test_a_group_that_reaches_into_an_excluded_module_is_spared() -> None:
    with pytest.raises(GraphPruneError, match=r"first\.weight\[0\] .*: excluded"):
        graphprune.compile(mlp(), 0.1, method="magnitude", example_inputs=X, exclude=["second"])


def test_inner_axes_are_opt_in() -> None:
    default = graphprune.inspect(toy(), example_inputs=X)
    asked = graphprune.inspect(toy(), example_inputs=X, inner_axes=True)
    assert all(group.outer for group in default.prunable)
    more = {g.name: g.size for g in asked.prunable if not g.outer}
    assert sorted(more.values()) == [8, 8, 8, 8]  # channels of every head, for keys and for values, in two blocks
    assert all("an inner factor" in default.skipped[name] for name in more)
    assert [g.name for g in asked.prunable if g.outer] == [g.name for g in default.prunable]


def test_one_parameter_tensor_of_two_pruned_dimensions_counts_once() -> None:
    """second.weight loses rows and columns: what it loses is not the sum of both."""
    pruned = graphprune.compile(mlp(), 0.5, method="magnitude", example_inputs=X)
    report = graphprune.report(pruned)
    assert report.plan.ratio == pytest.approx(report.ratio, abs=1e-12)
    assert numel(pruned) == report.parameters_after


def test_widths_that_a_kernel_takes() -> None:
    """Grouped products read rows of whole 16 bytes: four numbers in float32."""
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    report = graphprune.report(graphprune.compile(model, 0.3, method="magnitude", include=["*.experts"]))
    ((name, (before, after)),) = report.widths.items()
    assert before == 24
    assert after < 24
    assert after % 4 == 0
    plan = Plan(0.0, {name: list(range(22))}, {name: 24})
    with pytest.raises(GraphPruneError, match="multiples of 4"):
        graphprune.compile(model, plan=plan)
