"""The surgeon against least squares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphprune import GraphPruneError
from graphprune.passes.obs import Surgeon, choose, dynamic_groups, fixed_groups

DAMPING = 0.01


def problem(seed: int = 0, count: int = 1, out: int = 5, columns: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and Hessians of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, out, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(count, columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(count, 40, columns, generator=generator, dtype=torch.float64) @ mix
    return weight, x.mT @ x


def damped(hessian: torch.Tensor) -> torch.Tensor:
    return torch.stack([h + DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype) for h in hessian])


def best(weight: torch.Tensor, hessian: torch.Tensor, gone: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The weights without the columns ``gone`` nearest to ``weight`` in the metric of H, and their distance."""
    out, cost = torch.zeros_like(weight), 0.0
    for w, h, o in zip(weight, damped(hessian), out, strict=True):
        stays = torch.ones(len(h), dtype=torch.bool)
        stays[gone] = False
        o[:, stays] = torch.linalg.solve(h[stays][:, stays], h[stays] @ w.T).T
        cost += float((((o - w) @ h) * (o - w)).sum())
    return out, cost


@pytest.mark.parametrize("count", [1, 3])
def test_costs_and_weights_are_those_of_least_squares(count: int) -> None:
    weight, hessian = problem(count=count)
    blocks = torch.arange(12).view(4, 3)
    surgeon = Surgeon(weight.clone(), hessian, DAMPING)
    costs = surgeon.costs(blocks)
    for block, cost in zip(blocks, costs, strict=True):
        assert cost.item() == pytest.approx(best(weight, hessian, block)[1])
    for column, cost in zip(range(12), surgeon.costs(torch.arange(12).view(-1, 1)), strict=True):
        assert cost.item() == pytest.approx(best(weight, hessian, torch.tensor([column]))[1])
    surgeon.remove(blocks[2])
    surgeon.remove(torch.tensor([0, 11]))
    gone = torch.tensor([6, 7, 8, 0, 11])
    assert torch.allclose(surgeon.weight, best(weight, hessian, gone)[0])
    # What further blocks cost now is what they cost on top.
    now = best(weight, hessian, gone)[1]
    assert surgeon.costs(blocks[1:2]).item() == pytest.approx(
        best(weight, hessian, torch.tensor([*gone, 3, 4, 5]))[1] - now
    )


def test_one_at_a_time_finds_what_greedy_search_finds() -> None:
    weight, hessian = problem(1)
    surgeon = Surgeon(weight.clone(), hessian, DAMPING)
    taken, _ = choose(surgeon, torch.arange(12).view(6, 2), [1, 1, 1])
    gone: list[int] = []
    for block in taken.tolist():
        left = [b for b in range(6) if b not in gone]
        cost = {
            b: best(weight, hessian, torch.tensor([c for x in (*gone, b) for c in (2 * x, 2 * x + 1)]))[1] for b in left
        }
        assert block == min(left, key=cost.__getitem__)
        gone.append(block)


def test_first_costs_take_columns_for_independent() -> None:
    weight, hessian = problem(2)
    blocks = torch.arange(12).view(4, 3)
    inverse = torch.linalg.inv(damped(hessian))[0]
    simple = torch.stack([sum(weight[0, :, p].square().sum() / inverse[p, p] for p in block) for block in blocks])
    taken, _ = choose(Surgeon(weight.clone(), hessian, DAMPING), blocks, [1, 1], anew=False)
    assert set(taken.tolist()) == set(simple.topk(2, largest=False).indices.tolist())


def test_dead_columns_go_first_and_an_unseen_matrix_goes_by_size() -> None:
    weight, hessian = problem(3)
    hessian[0, [2, 5]], hessian[0, :, [2, 5]] = 0, 0
    taken, _ = choose(Surgeon(weight.clone(), hessian, DAMPING), torch.arange(12).view(-1, 1), [2])
    assert set(taken.tolist()) == {2, 5}
    unseen = Surgeon(weight.clone(), torch.zeros_like(hessian), DAMPING)
    sizes = weight[0].square().sum(0)
    assert torch.allclose(unseen.costs(torch.arange(12).view(-1, 1)), sizes)
    unseen.remove(torch.tensor([4]))
    assert torch.equal(unseen.weight[0, :, [0, 1, 2, 3]], weight[0, :, [0, 1, 2, 3]])


def test_a_singular_hessian_is_damped_until_it_can_be_inverted() -> None:
    weight = torch.randn(1, 5, 12)
    x = torch.randn(1, 3, 12) * 1e4
    surgeon = Surgeon(weight, x.mT @ x, 1e-9)
    assert torch.isfinite(surgeon.inverse).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight, hessian = problem()
    hessian[0, 3, 3] = bad
    with pytest.raises(GraphPruneError, match="NaN or infinite"):
        Surgeon(weight, hessian, DAMPING)


def test_a_hessian_that_nothing_helps_is_refused() -> None:
    with pytest.raises(GraphPruneError, match="cannot be inverted"):
        Surgeon(torch.ones(1, 2, 2), torch.tensor([[[1.0, 9999.0], [9999.0, 1.0]]]), DAMPING)


@given(st.integers(0, 20_000))
def test_groups_shrink_from_large_to_small(count: int) -> None:
    groups = dynamic_groups(count)
    assert sum(groups) == count
    assert groups == sorted(groups, reverse=True)
    assert all(8 <= size <= 1024 for size in groups[:-1])
    assert sum(fixed_groups(count, 128)) == count
