"""Numbers that no weight and no float decides are like the shapes of the example inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import X, check_every_axis, randomise, snapshot
from torch import Tensor, nn

from graphprune.trace.export import trace
from graphprune.trace.reads import find_reads

LENGTHS = torch.tensor([2, 3])


class Reader(nn.Module):
    """A layer whose ``kind`` of body reads numbers out of tensors."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.linear, self.other = nn.Linear(16, 16), nn.Linear(16, 16) if kind == "other_weights" else None
        self.register_buffer("chances", torch.tensor([0.2, 0.8]))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, h: Tensor, lengths: Tensor) -> Tensor:
        return getattr(self, self.kind)(self.linear(h), lengths)

    def split(self, h: Tensor, lengths: Tensor) -> Tensor:
        return torch.cat([part * len(part[0]) for part in torch.split(h, lengths.tolist(), 1)], 1)

    def number(self, h: Tensor, lengths: Tensor) -> Tensor:
        return h[:, : int(lengths.max())].sum(1, keepdim=True) + h

    def grid(self, h: Tensor, lengths: Tensor) -> Tensor:
        for rows, columns in (lengths[None] - torch.tensor([[1, 1]])).tolist():
            h = h[:, : rows * columns].sum(1, keepdim=True) * columns + h
        return h

    def branch(self, h: Tensor, lengths: Tensor) -> Tensor:
        return h * 2 if (lengths > 2).any() else -h

    def constant(self, h: Tensor, lengths: Tensor) -> Tensor:
        return h * 2 if self.chances[1] > 0.5 else -h

    def indices(self, h: Tensor, lengths: Tensor) -> Tensor:
        return h[:, (lengths > 2).nonzero()[:, 0]] + h

    def sizes(self, h: Tensor, lengths: Tensor) -> Tensor:
        return F.pad(h, (0, 0, lengths[0], 0))[:, lengths[0] :].reshape(3, lengths.sum(), -1)

    def other_weights(self, h: Tensor, lengths: Tensor) -> Tensor:
        return h if lengths.any() else self.other(h)

    def activation(self, h: Tensor, lengths: Tensor) -> Tensor:
        return h * 2 if h.sum() > 0 else -h

    def activation_by_index(self, h: Tensor, lengths: Tensor) -> Tensor:
        return h[:, : int(h.sum((0, 2)).argmax()) % 2 + 1].sum(1, keepdim=True) + h

    def weight(self, h: Tensor, lengths: Tensor) -> Tensor:
        return h * 2 if self.linear.weight[0, 0] > 0 else -h

    def random(self, h: Tensor, lengths: Tensor) -> Tensor:
        return h * 2 if torch.rand(()) > 0.5 else -h

    def state(self, h: Tensor, lengths: Tensor) -> Tensor:
        self.count.add_(1)
        return h * 2 if self.count > 1 else -h

    def written_over(self, h: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.zeros_like(lengths)
        mask[:1].copy_(h[0, 0, :1] > 0)
        return h * 2 if mask.any() else -h

    def after_an_activation(self, h: Tensor, lengths: Tensor) -> Tensor:
        chosen = torch.tensor([int(h.sum((0, 2)).argmax())])
        return h * 2 if chosen.any() else -h

    def by_numpy(self, h: Tensor, lengths: Tensor) -> Tensor:
        return h * 2 if torch.from_numpy(h.numpy()).sum() > 0 else -h


class Net(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.first, self.up, self.down = nn.Linear(7, 16), nn.Linear(16, 24), nn.Linear(24, 3)
        self.reader = Reader(kind)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.down(self.up(self.reader(self.first(x), lengths)).relu())


def net(kind: str) -> Any:
    torch.manual_seed(0)
    return randomise(Net(kind)).eval()


@pytest.mark.parametrize("kind", ["split", "number", "grid", "branch", "constant", "indices", "sizes"])
def test_nothing_is_opaque(kind: str) -> None:
    model = net(kind)
    unchanged = snapshot(model)
    assert not trace(model, ((X, LENGTHS), {})).opaque.why
    assert "up.weight[1]" in check_every_axis(model, (X, LENGTHS))
    unchanged()


@pytest.mark.parametrize(
    "kind",
    [
        *("activation", "activation_by_index", "weight", "random", "state", "written_over", "after_an_activation"),
        "by_numpy",
    ],
)
def test_what_a_float_decides_is_not_kept(kind: str) -> None:
    model = net(kind)
    assert not find_reads(model, ((X, LENGTHS), {}))
    assert list(trace(model, ((X, LENGTHS), {})).opaque.why) == ["reader"]
    assert check_every_axis(model, (X, LENGTHS)) == ["up.weight[0]"]


def test_a_branch_that_hides_weights_is_not_taken() -> None:
    model = net("other_weights")
    assert find_reads(model, ((X, LENGTHS), {}))
    assert list(trace(model, ((X, LENGTHS), {})).opaque.why) == ["reader"]
