"""Convolutional operators: channels, groups, depthwise, transposed, pooling, flattening to a linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check_every_axis, look, randomise, snapshot
from torch import nn

import graphprune


class Flow(nn.Module):
    """Submodules by name, and a forward over them."""

    def __init__(self, body: Callable[[Any, torch.Tensor], torch.Tensor], **parts: Any):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


def _chain(*names: str) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        for name in names:
            x = getattr(m, name)(x)
        return x

    return body


IMAGE, SIGNAL, VOLUME = (2, 3, 8, 8), (2, 3, 16), (2, 3, 4, 4, 4)

# name → (model, input shape, sizes of all prunable axes)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[int]]] = {
    "conv2d": (lambda: Flow(_chain("a", "b"), a=nn.Conv2d(3, 12, 3), b=nn.Conv2d(12, 5, 3)), IMAGE, [12]),
    "conv1d": (lambda: Flow(_chain("a", "b"), a=nn.Conv1d(3, 12, 3), b=nn.Conv1d(12, 5, 3)), SIGNAL, [12]),
    "conv3d": (lambda: Flow(_chain("a", "b"), a=nn.Conv3d(3, 6, 2), b=nn.Conv3d(6, 5, 2)), VOLUME, [6]),
    "stride_padding_dilation": (
        lambda: Flow(
            _chain("a", "b"),
            a=nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False),
            b=nn.Conv2d(12, 5, 3, dilation=2, padding="same"),
        ),
        IMAGE,
        [12],
    ),
    "reflect_padding": (
        lambda: Flow(_chain("a", "b"), a=nn.Conv2d(3, 12, 3), b=nn.Conv2d(12, 5, 3, padding=1, padding_mode="reflect")),
        IMAGE,
        [12],
    ),
    "no_batch": (lambda: Flow(_chain("a", "b"), a=nn.Conv2d(3, 12, 3), b=nn.Conv2d(12, 5, 3)), IMAGE[1:], [12]),
    # 4 groups of 3 channels in and 2 out: whole groups may go, and channels of every group
    "grouped": (
        lambda: Flow(
            _chain("a", "b", "c"), a=nn.Conv2d(3, 12, 3), b=nn.Conv2d(12, 8, 3, groups=4), c=nn.Conv2d(8, 5, 1)
        ),
        IMAGE,
        [2, 3, 4],
    ),
    "depthwise": (
        lambda: Flow(
            _chain("a", "b", "c"), a=nn.Conv2d(3, 12, 3), b=nn.Conv2d(12, 12, 3, groups=12), c=nn.Conv2d(12, 5, 1)
        ),
        IMAGE,
        [12],
    ),
    "depthwise_multiplied": (
        lambda: Flow(
            _chain("a", "b", "c"), a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 12, 3, groups=6), c=nn.Conv2d(12, 5, 1)
        ),
        IMAGE,
        [2, 6],
    ),
    "transposed": (
        lambda: Flow(_chain("a", "b"), a=nn.Conv2d(3, 12, 3), b=nn.ConvTranspose2d(12, 5, 3, stride=2)),
        IMAGE,
        [12],
    ),
    "transposed_first": (
        lambda: Flow(_chain("a", "b"), a=nn.ConvTranspose2d(3, 12, 3, stride=2), b=nn.Conv2d(12, 5, 3)),
        IMAGE,
        [12],
    ),
    "transposed_1d": (
        lambda: Flow(_chain("a", "b"), a=nn.ConvTranspose1d(3, 12, 3), b=nn.ConvTranspose1d(12, 5, 3)),
        SIGNAL,
        [12],
    ),
    "transposed_grouped": (
        lambda: Flow(
            _chain("a", "b", "c"),
            a=nn.Conv2d(3, 12, 3),
            b=nn.ConvTranspose2d(12, 8, 3, groups=4),
            c=nn.Conv2d(8, 5, 1),
        ),
        IMAGE,
        [],
    ),
    "batch_norm": (
        lambda: Flow(_chain("a", "n", "b"), a=nn.Conv2d(3, 12, 3), n=nn.BatchNorm2d(12), b=nn.Conv2d(12, 5, 3)),
        IMAGE,
        [12],
    ),
    "batch_norm_plain": (
        lambda: Flow(
            _chain("a", "n", "b"), a=nn.Conv2d(3, 12, 3), n=nn.BatchNorm2d(12, affine=False), b=nn.Conv2d(12, 5, 3)
        ),
        IMAGE,
        [12],
    ),
    # the channels of one group are normalised together: groups may go, channels inside may not
    "group_norm": (
        lambda: Flow(_chain("a", "n", "b"), a=nn.Conv2d(3, 12, 3), n=nn.GroupNorm(4, 12), b=nn.Conv2d(12, 5, 3)),
        IMAGE,
        [4],
    ),
    "instance_norm": (
        lambda: Flow(
            _chain("a", "n", "b"), a=nn.Conv2d(3, 12, 3), n=nn.InstanceNorm2d(12, affine=True), b=nn.Conv2d(12, 5, 3)
        ),
        IMAGE,
        [12],
    ),
    "max_pool": (
        lambda: Flow(_chain("a", "p", "b"), a=nn.Conv2d(3, 12, 3), p=nn.MaxPool2d(2), b=nn.Conv2d(12, 5, 3)),
        IMAGE,
        [12],
    ),
    "average_pool": (
        lambda: Flow(_chain("a", "p", "b"), a=nn.Conv1d(3, 12, 3), p=nn.AvgPool1d(2), b=nn.Conv1d(12, 5, 3)),
        SIGNAL,
        [12],
    ),
    "adaptive_pool_flatten": (
        lambda: Flow(
            _chain("a", "p", "f", "b"),
            a=nn.Conv2d(3, 12, 3),
            p=nn.AdaptiveAvgPool2d(1),
            f=nn.Flatten(),
            b=nn.Linear(12, 5),
        ),
        IMAGE,
        [12],
    ),
    # every channel owns 9 columns of the linear
    "flatten_to_linear": (
        lambda: Flow(
            _chain("a", "p", "f", "b"),
            a=nn.Conv2d(3, 12, 3),
            p=nn.AdaptiveAvgPool2d(3),
            f=nn.Flatten(),
            b=nn.Linear(108, 5),
        ),
        IMAGE,
        [12],
    ),
    "spatial_mean": (
        lambda: Flow(lambda m, x: m.b(m.a(x).mean((2, 3))), a=nn.Conv2d(3, 12, 3), b=nn.Linear(12, 5)),
        IMAGE,
        [12],
    ),
    "upsample": (
        lambda: Flow(
            _chain("a", "u", "b"), a=nn.Conv2d(3, 12, 3), u=nn.Upsample(scale_factor=2), b=nn.Conv2d(12, 5, 3)
        ),
        IMAGE,
        [12],
    ),
    "interpolate": (
        lambda: Flow(
            lambda m, x: m.b(F.interpolate(m.a(x), size=(7, 7), mode="bilinear")),
            a=nn.Conv2d(3, 12, 3),
            b=nn.Conv2d(12, 5, 3),
        ),
        IMAGE,
        [12],
    ),
    "residual": (
        lambda: Flow(
            lambda m, x: m.c(F.relu((y := m.a(x)) + m.b(y))),
            a=nn.Conv2d(3, 12, 3),
            b=nn.Conv2d(12, 12, 3, padding=1),
            c=nn.Conv2d(12, 5, 1),
        ),
        IMAGE,
        [12],
    ),
    "dense_block": (
        lambda: Flow(
            lambda m, x: m.c(torch.cat([y := m.a(x), m.b(y)], 1)),
            a=nn.Conv2d(3, 12, 3),
            b=nn.Conv2d(12, 7, 3, padding=1),
            c=nn.Conv2d(19, 5, 1),
        ),
        IMAGE,
        [7, 12],
    ),
    "squeeze_and_excite": (
        lambda: Flow(
            lambda m, x: m.d((y := m.a(x)) * m.c(F.relu(m.b(y.mean((2, 3), keepdim=True)))).sigmoid()),
            a=nn.Conv2d(3, 12, 3),
            b=nn.Conv2d(12, 4, 1),
            c=nn.Conv2d(4, 12, 1),
            d=nn.Conv2d(12, 5, 1),
        ),
        IMAGE,
        [4, 12],
    ),
    "prelu": (
        lambda: Flow(_chain("a", "p", "b"), a=nn.Conv2d(3, 12, 3), p=nn.PReLU(12), b=nn.Conv2d(12, 5, 3)),
        IMAGE,
        [12],
    ),
    "channel_dropout": (
        lambda: Flow(_chain("a", "p", "b"), a=nn.Conv2d(3, 12, 3), p=nn.Dropout2d(), b=nn.Conv2d(12, 5, 3)),
        IMAGE,
        [12],
    ),
    "padded": (
        lambda: Flow(lambda m, x: m.b(F.pad(m.a(x), (1, 2, 0, 1))), a=nn.Conv2d(3, 12, 3), b=nn.Conv2d(12, 5, 3)),
        IMAGE,
        [12],
    ),
    # the second half of the channels is moved behind the first by view and transpose
    "channel_shuffle": (
        lambda: Flow(
            lambda m, x: m.b(m.a(x).unflatten(1, (m.groups, m.each)).transpose(1, 2).flatten(1, 2)),
            a=nn.Conv2d(3, 12, 3),
            b=nn.Conv2d(12, 5, 1),
            groups=3,
            each=4,
        ),
        IMAGE,
        [3, 4],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_convolution(name: str) -> None:
    make, shape, sizes = CASES[name]
    model = randomise(make()).double().eval()
    x = torch.randn(*shape, dtype=torch.float64)
    found = look(model, x)
    assert sorted(g.size for g in found.prunable) == sizes
    unchanged = snapshot(model)
    assert check_every_axis(model, x) == [g.name for g in found.prunable]
    if sizes:
        report = graphprune.report(graphprune.compile(model, 0.5, example_inputs=x, inner_axes=True))
        assert 0 < report.ratio <= 0.5
    unchanged()


def test_attributes_of_a_grouped_convolution_follow() -> None:
    make, shape, _ = CASES["grouped"]
    model = make()
    plan = graphprune.Plan(0.0, {"a.weight[0].0": [0, 2, 3]}, {"a.weight[0].0": 4})
    pruned = graphprune.compile(model, plan=plan, example_inputs=torch.randn(*shape))
    assert (pruned.a.out_channels, pruned.b.in_channels, pruned.b.out_channels, pruned.b.groups) == (9, 9, 6, 3)
    assert model.b.groups == 4
    assert torch.equal(pruned.b.weight, model.b.weight[[0, 1, 4, 5, 6, 7]])


def test_attributes_of_a_depthwise_convolution_follow() -> None:
    make, shape, _ = CASES["depthwise"]
    pruned = graphprune.compile(make(), 0.5, example_inputs=torch.randn(*shape))
    width = pruned.a.out_channels
    assert width < 12
    assert (pruned.b.in_channels, pruned.b.out_channels, pruned.b.groups) == (width, width, width)


def test_a_pruned_batch_norm_keeps_its_statistics() -> None:
    make, shape, _ = CASES["batch_norm"]
    model = randomise(make())
    plan = graphprune.Plan(0.0, {"a.weight[0]": [1, 4, 11]}, {"a.weight[0]": 12})
    pruned = graphprune.compile(model, plan=plan, example_inputs=torch.randn(*shape))
    assert pruned.n.num_features == 3
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(pruned.n, name), getattr(model.n, name)[[1, 4, 11]])
