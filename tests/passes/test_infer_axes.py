"""What inference does where rules end."""

from __future__ import annotations

import torch
from torch import nn

import graphprune


class DataDependent(nn.Module):
    """A size that depends on values in one branch, an ordinary network in the other."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.second = nn.Linear(16, 4)
        self.picked = nn.Linear(6, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        rows = x.reshape(-1, 6)
        chosen = rows[rows.sum(-1) > 0]
        extra = self.last(self.picked(chosen).relu()).sum(0)
        return self.second(self.first(x).relu()) + extra


def test_sizes_that_depend_on_values_pin_only_what_they_touch():
    x = torch.randn(3, 5, 6)
    model = DataDependent()
    found = graphprune.inspect(model, example_inputs=x)
    assert [group.name for group in found.prunable] == ["first.weight[0]"]
    assert any("depends on values" in name for name in found.unruled)
    assert "depends on values" in found.skipped["picked.weight[0]"]
    pruned = graphprune.compile(model, 0.2, example_inputs=x)
    assert graphprune.report(pruned).oracle_error < 1e-5
    assert pruned.picked.out_features == 8
