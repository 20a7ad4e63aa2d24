"""Loops over what nonzero finds are traced over every index, whichever the example inputs hit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graphprune


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Loop(nn.Module):
    """Runs only the experts that a token chose."""

    def __init__(self, experts: int = 5) -> None:
        super().__init__()
        self.router = nn.Linear(6, experts)
        self.experts = nn.ModuleDict({f"expert_{i}": Expert() for i in range(experts)})

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).topk(1, -1)
        mask = nn.functional.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for index in mask.sum((-1, -2)).gt(0).nonzero():
            _, tokens = torch.where(mask[index].squeeze(0))
            out.index_add_(0, tokens, self.experts[f"expert_{index[0]}"](x[tokens]) * weight[tokens])
        return out


def test_experts_that_no_example_token_chose_are_pruned_too() -> None:
    torch.manual_seed(0)
    model = Loop().eval()
    example = torch.randn(1, 6).repeat(3, 1)  # all tokens alike: one expert
    pruned = graphprune.compile(model, 0.4, method="l2", example_inputs=example)
    widths = [expert.up.out_features for expert in pruned.experts.values()]
    assert len(widths) == 5
    assert max(widths) < 16
    assert graphprune.report(pruned).oracle_error <= 1e-4


def test_the_rest_of_the_experts_is_the_same_as_masked() -> None:
    """On other tokens, which choose other experts, the pruned model is the original without the removed channels."""
    torch.manual_seed(0)
    model = Loop().eval()
    pruned = graphprune.compile(model, 0.4, method="l2", example_inputs=torch.randn(1, 6).repeat(3, 1))
    plan = graphprune.report(pruned).plan
    with torch.no_grad():
        for name, kept in plan.keep.items():
            path = name.partition(".up.")[0]
            gone = sorted(set(range(16)) - set(kept))
            model.get_submodule(path).down.weight[:, gone] = 0
    x = torch.randn(40, 6)
    assert len(model.router(x).argmax(-1).unique()) > 2
    torch.testing.assert_close(pruned(x), model(x))
