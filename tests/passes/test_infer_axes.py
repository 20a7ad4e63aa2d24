"""What inference does where rules end."""

from __future__ import annotations

import torch
from helpers import analyse, check_every_axis
from torch import nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

import graphprune


class DataDependent(nn.Module):
    """A number of rows that depends on values in one branch, an ordinary network in the other."""

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


def test_a_number_of_rows_that_depends_on_values_leaves_channels_free():
    x = torch.randn(3, 5, 6)
    model = DataDependent()
    assert set(check_every_axis(model, x)) == {"first.weight[0]", "picked.weight[0]"}


class Flattened(nn.Module):
    """Channels and rows of unknown number in one dimension: neither may go."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.last = nn.Linear(5, 4)

    def forward(self, x):
        found = self.first(x[x.sum(-1) > 0]).flatten()
        return self.last(x[0, :, :5]) + found.cumsum(0).sum()


def test_what_is_flattened_together_with_unknown_rows_is_pinned():
    found = graphprune.inspect(Flattened(), example_inputs=torch.randn(3, 5, 6))
    assert not found.prunable
    assert "flatten" in found.skipped["first.weight[0]"]


class Mapped(nn.Module):
    """Looks up in a function over a batch, as masks are made: an operator that takes an object that is no tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x):
        places = torch.arange(5)
        with TransformGetItemToIndex():
            rows = torch.vmap(lambda place: places[place] > 2)(places)
        return self.last(self.first(x).relu()) * rows[:, None]


def test_operators_that_take_objects_are_traced():
    x = torch.randn(3, 5, 6)
    program = analyse(Mapped(), x)
    assert any(node.op == "get_attr" for node in program.need("trace").graph.nodes)
    assert check_every_axis(Mapped(), x) == ["first.weight[0]"]
