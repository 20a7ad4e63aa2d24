"""SlimGPT over removal structures: against least squares, matrix by matrix, on what the pruned ones before leave."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import X, analyse, randomise, snapshot, toy
from torch import nn

import graphprune
from graphprune import GraphPruneError
from graphprune.passes import cuts, run_passes
from graphprune.passes.allocate_budget import allocate_budget
from graphprune.passes.methods import passes_of
from graphprune.passes.prune_in_order import prune_by_moments, prune_by_obs
from graphprune.trace.skeleton import names

# As the paper has it: little damping, and every vector as long as it is.
PAPER = (allocate_budget("sparing"), prune_by_obs(damping=0.01, longest=math.inf))


def batches(count: int = 12, *shape: int) -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.randn(*(shape or (3, 5, 7)), generator=torch.Generator().manual_seed(i))} for i in range(count)]


class Chain(nn.Module):
    """Two hidden layers that may shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(7, 20), nn.Linear(20, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def chain() -> Chain:
    torch.manual_seed(0)
    return randomise(Chain()).eval()  # type: ignore[return-value]


def refit(weight: torch.Tensor, seen: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """The columns of ``kept`` that come nearest to what ``weight`` makes of ``seen``, damped as the method damps."""
    gram = seen.T @ seen
    gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight.T).T


def test_each_matrix_adapts_to_what_the_pruned_ones_before_it_leave() -> None:
    model, data = chain(), batches()
    program = analyse(model, X, method="slimgpt", data=data, ratio=0.4)
    run_passes(program, PAPER)
    kept = program.need("plan").keep
    x = torch.cat([batch["x"] for batch in data]).flatten(0, -2)
    first = kept["a.weight[0]"]
    with torch.no_grad():
        hidden = model.a(x).relu()
        b = refit(model.b.weight, hidden, first)
        hidden = (hidden[:, first] @ b.T + model.b.bias).relu()
        c = refit(model.c.weight, hidden, kept["b.weight[0]"])
    assert torch.allclose(program.weight(model.b.weight)[:, first], b, atol=1e-4)
    assert torch.allclose(program.weight(model.c.weight)[:, kept["b.weight[0]"]], c, atol=1e-4)
    assert {id(model.b.weight), id(model.c.weight)} == set(program.updates)


def test_long_vectors_count_as_if_they_were_of_median_length() -> None:
    model, data = chain(), batches(1)
    data[0]["x"][0, 0] *= 100
    program = analyse(model, X, data=data, ratio=0.4)
    run_passes(program, (allocate_budget("uniform"), prune_by_obs(damping=0.01, longest=2.0)))
    kept = program.need("plan").keep["a.weight[0]"]
    with torch.no_grad():
        hidden = model.a(data[0]["x"]).relu().flatten(0, -2)
        lengths = hidden.norm(dim=1)
        most = 2 * lengths.median()
        assert 0 < (lengths > most).sum() < 4
        shorter = torch.where(lengths > most, most / lengths, 1.0)[:, None] * hidden
    assert torch.allclose(program.weight(model.b.weight)[:, kept], refit(model.b.weight, shorter, kept), atol=1e-4)
    zeros = cuts.ObsCut(torch.randn(1, 3, 4), 0.01, 1.0, None, True)
    zeros.see(torch.tensor([[[0.0] * 4, [0.0] * 4, [1.0, 2.0, 3.0, 4.0]]]))  # most of it nothing: no length to go by
    assert zeros._hessian[0, 0, 1] == 2


def error(model: nn.Module, pruned: nn.Module, data: list[dict[str, torch.Tensor]]) -> float:
    with torch.no_grad():
        return sum(float((model(**batch) - pruned(**batch)).square().mean()) for batch in data)


@pytest.mark.parametrize("options", [{}, {"inner_axes": True}, {"inplace": True}], ids=str)
def test_a_transformer_is_pruned_proven_and_better_than_by_size(options: dict[str, Any]) -> None:
    model, data = toy(3), batches()
    check = snapshot(model)
    pruned = graphprune.compile(model, 0.3, method="slimgpt", data=data, example_inputs=X, **options)
    report = graphprune.report(pruned)
    assert report.oracle_error is not None
    assert report.ratio == pytest.approx(0.3, abs=0.02)
    if options.get("inplace"):
        model = toy(3)
    else:
        check()
    plain = graphprune.compile(toy(3), 0.3, method="magnitude", example_inputs=X)
    assert error(model, pruned, data) < error(model, plain, data) / 4


def test_in_place_is_the_same() -> None:
    data = batches()
    new = graphprune.compile(toy(3), 0.3, method="slimgpt", data=data, example_inputs=X)
    same = graphprune.compile(toy(3), 0.3, method="slimgpt", data=data, example_inputs=X, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(names(new).values(), names(same).values(), strict=True))


class Pictures(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, 1, groups=groups)
        self.c = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_adapt_patch_by_patch(groups: int) -> None:
    torch.manual_seed(0)
    model = randomise(Pictures(groups)).eval()
    data = batches(8, 2, 3, 9, 8)
    inputs = {"x": torch.randn(2, 3, 9, 8)}
    options: dict[str, Any] = {"example_inputs": inputs, "inner_axes": True}
    pruned = graphprune.compile(model, 0.4, method="slimgpt", data=data, **options)
    plain = graphprune.compile(model, 0.4, method="magnitude", **options)
    assert error(model, pruned, data) < error(model, plain, data)


class Experts(nn.Module):
    """Four batched experts, each with its own matrices and its own inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 10)), nn.Parameter(torch.randn(4, 10, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.bmm(x, self.up).relu(), self.down)


def test_every_expert_of_a_batch_adapts_by_itself() -> None:
    torch.manual_seed(0)
    model, data = Experts().eval(), batches(10, 4, 9, 6)
    program = analyse(model, {"x": torch.randn(4, 9, 6)}, method="slimgpt", data=data, ratio=0.3, inner_axes=False)
    run_passes(program, PAPER)
    (kept,) = program.need("plan").keep.values()
    x = torch.cat([batch["x"] for batch in data], 1)
    with torch.no_grad():
        hidden = torch.bmm(x, model.up).relu()
        for expert in range(4):
            wanted = refit(model.down[expert].T, hidden[expert], kept).T
            assert torch.allclose(program.weight(model.down)[expert][kept], wanted, atol=1e-3)


class Branches(nn.Module):
    """An axis that two matrices consume, one of which the data of this test never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.other = nn.Linear(7, 12), nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor, both: bool = True) -> torch.Tensor:
        hidden = self.up(x).relu()
        return self.down(hidden) + (self.other(hidden) if both else 0)


@pytest.mark.parametrize("both", [True, False])
def test_whoever_else_consumes_an_axis_makes_up_for_it(both: bool) -> None:
    torch.manual_seed(0)
    model = randomise(Branches()).eval()
    data = [{**batch, "both": both} for batch in batches()]
    program = analyse(model, {"x": X}, method="slimgpt", data=data, ratio=0.3)
    run_passes(program, PAPER)
    (kept,) = program.need("plan").keep.values()
    x = torch.cat([batch["x"] for batch in data]).flatten(0, -2)
    with torch.no_grad():
        hidden = model.up(x).relu()
    for linear in (model.down, model.other):
        seen = hidden if both or linear is model.down else torch.zeros_like(hidden)
        wanted = refit(linear.weight.detach(), seen, kept) if seen.any() else linear.weight.detach()[:, kept]
        assert torch.allclose(program.weight(linear.weight)[:, kept], wanted, atol=1e-4)


def test_ppm_multiplies_what_columns_see_by_the_reach_of_all_weights() -> None:
    model, data = chain(), batches(4)
    program = analyse(model, X, data=data, ratio=0.4)
    run_passes(program, (allocate_budget("uniform"), prune_by_moments(cuts.norm, otherwise="l2", times="peak-to-peak")))
    x = torch.cat([batch["x"] for batch in data]).flatten(0, -2)
    with torch.no_grad():
        seen = model.a(x).relu().square().mean(0).sqrt()

    def reach(weight: torch.Tensor) -> torch.Tensor:
        found = weight.amax(1) - weight.amin(1)
        return found / found.max()

    importance = seen * (reach(model.a.weight.detach()) + reach(model.b.weight.detach().T))
    count = program.need("counts")["a.weight[0]"]
    gone = set(range(20)) - set(program.need("plan").keep["a.weight[0]"])
    assert gone == set(importance.topk(count, largest=False).indices.tolist())


@pytest.mark.parametrize("method", ["ppm", "wanda-sp", "flap", "slimgpt"])
def test_what_no_weight_consumes_goes_by_its_size(method: str) -> None:
    class Turned(nn.Module):
        """Multiplies by a weight that it turns first, which nobody sees as a weight."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(7, 9), nn.Linear(9, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x) @ self.down.weight.T

    model = randomise(Turned()).eval()
    pruned = graphprune.compile(model, 0.3, method=method, data=batches(), example_inputs=X)
    by_size = graphprune.compile(model, 0.3, method="magnitude", example_inputs=X)
    assert graphprune.report(pruned).plan.keep == graphprune.report(by_size).plan.keep != {}


def test_a_tied_weight_is_pruned_but_does_not_adapt() -> None:
    model = chain()
    model.d = model.c  # type: ignore[assignment]
    program = analyse(model, X, method="slimgpt", data=batches(), ratio=0.3)
    run_passes(program, passes_of("slimgpt"))
    assert set(program.updates) == {id(model.b.weight)}


@pytest.mark.parametrize(
    "options", [{"group": 3}, {"grouped_cholesky": False}, {"damping": 1.0}, {"longest": math.inf}], ids=str
)
def test_its_knobs_are_arguments_of_the_pass(options: dict[str, Any]) -> None:
    own = (allocate_budget("uniform"), prune_by_obs(**options))
    pruned = graphprune.compile(toy(), 0.3, passes=own, data=batches(), example_inputs=X)
    assert graphprune.report(pruned).oracle_error is not None


def test_low_precision_adapts_in_float32() -> None:
    model = toy().to(torch.bfloat16)
    data = [{"x": batch["x"].bfloat16()} for batch in batches()]
    pruned = graphprune.compile(model, 0.3, method="slimgpt", data=data, example_inputs=X.bfloat16())
    assert all(p.dtype == torch.bfloat16 for p in pruned.parameters())


def test_activations_that_are_not_finite_name_the_matrix() -> None:
    model, data = toy(), batches()
    data[3]["x"][0, 0, 0] = float("nan")
    check = snapshot(model)
    with pytest.raises(GraphPruneError, match=r"layers.0.mlp.down.weight cannot be pruned: .*NaN"):
        graphprune.compile(model, 0.3, method="slimgpt", data=data, example_inputs=X, inplace=True)
    check()


def test_a_batch_that_fails_half_way_leaves_the_model_as_it_was() -> None:
    model, data = toy(), batches()
    data[5]["x"] = torch.randn(3, 5, 6)
    check = snapshot(model)
    with pytest.raises(GraphPruneError, match="Calibration failed"):
        graphprune.compile(model, 0.3, method="slimgpt", data=data, example_inputs=X, inplace=True)
    check()


class Plain(nn.Module):
    """An MLP whose second matrix has no bias, and a third one whose bias is there."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(7, 20), nn.Linear(20, 16, bias=False), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.mid(self.up(x).relu() + 1).relu())


def plain() -> Plain:
    torch.manual_seed(0)
    return randomise(Plain()).eval()  # type: ignore[return-value]


def test_biases_take_what_removed_channels_add_on_average() -> None:
    model, data = plain(), batches()
    check = snapshot(model)
    pruned = graphprune.compile(model, 0.3, method="flap", data=data, example_inputs=X)
    check()
    report = graphprune.report(pruned)
    assert report.new_biases == ["mid"]
    kept = report.plan.keep
    up, mid = kept["up.weight[0]"], kept["mid.weight[0]"]
    gone, lost = [i for i in range(20) if i not in up], [i for i in range(16) if i not in mid]
    x = torch.cat([batch["x"] for batch in data]).flatten(0, -2)
    with torch.no_grad():
        hidden = model.up(x).relu() + 1
        offset = model.mid.weight[:, gone] @ hidden[:, gone].mean(0)
        hidden = (hidden[:, up] @ model.mid.weight[:, up].T + offset).relu()
        bias = model.down.bias + model.down.weight[:, lost] @ hidden[:, lost].mean(0)
    assert torch.allclose(pruned.mid.bias, offset[mid], atol=1e-5)
    assert torch.allclose(pruned.down.bias, bias, atol=1e-5)
    without = (allocate_budget("sparing"), prune_by_moments(cuts.weighted_variance, otherwise="l2"))
    assert error(model, pruned, data) < error(
        model, graphprune.compile(model, 0.3, passes=without, data=data, example_inputs=X), data
    )


@pytest.mark.parametrize("options", [{"inplace": True}, {"emit": "graph"}, {}], ids=str)
def test_a_model_with_new_biases_is_proven_saved_and_pruned_again(options: dict[str, Any], tmp_path: Any) -> None:
    data = batches()
    pruned = graphprune.compile(plain(), 0.2, method="flap", data=data, example_inputs=X, **options)
    if "emit" in options:
        assert graphprune.report(pruned).new_biases == []
        return
    again = graphprune.compile(pruned, 0.1, method="flap", data=data, example_inputs=X)
    assert graphprune.report(again).new_biases == ["mid"]
    graphprune.save(again, tmp_path / "saved")
    loaded = graphprune.load(tmp_path / "saved", model=Plain)
    assert torch.equal(loaded(X), again(X))


@pytest.mark.parametrize("method", ["wanda-sp", "flap"])
@pytest.mark.parametrize("allocation", [None, "global", "standardised", "log-increasing"])
def test_methods_in_order_take_any_allocation(method: str, allocation: str | None) -> None:
    model, data = toy(3), batches()
    pruned = graphprune.compile(model, 0.3, method=method, allocation=allocation, data=data, example_inputs=X)
    plain = graphprune.compile(model, 0.3, method="magnitude", example_inputs=X)
    assert error(model, pruned, data) < error(model, plain, data)


def test_importance_is_of_what_the_pruned_matrices_before_leave() -> None:
    model, data = chain(), batches()
    program = analyse(model, X, method="wanda-sp", data=data, ratio=0.4)
    run_passes(program, passes_of("wanda-sp"))
    kept = program.need("plan").keep
    x = torch.cat([batch["x"] for batch in data]).flatten(0, -2)
    first = kept["a.weight[0]"]
    with torch.no_grad():
        hidden = model.a(x).relu()
        of_first = model.b.weight.abs().mean(0) * hidden.square().mean(0).sqrt()
        hidden = (hidden[:, first] @ model.b.weight[:, first].T + model.b.bias).relu()
        of_second = model.c.weight.abs().mean(0) * hidden.square().mean(0).sqrt()
    for scores, stays in ((of_first, first), (of_second, kept["b.weight[0]"])):
        assert stays == scores.topk(len(stays)).indices.sort().values.tolist()
    assert program.updates.keys() <= {id(model.b.weight), id(model.c.weight)}
