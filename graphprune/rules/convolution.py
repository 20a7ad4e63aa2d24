"""Convolutions and what usually stands around them: pooling, upsampling."""

from __future__ import annotations

from typing import Any

import torch

from graphprune.ir.axes import Axis, Misaligned, factor, product
from graphprune.rules.registry import Dims, Rule, rule

aten = torch.ops.aten


def _convolve(r: Rule, x: Dims, weight: Dims, bias: Dims | None, groups: Any) -> Dims:
    """``x (N, G·Ci, …)``, ``weight (G·Co, Ci, …)`` → ``(N, G·Co, …)``; with one group ``G`` is nothing."""
    channel = 1 if len(x) == len(weight) else 0
    group = Axis(int(groups))
    r.size(groups, group)
    try:
        outer, inner = factor(x[channel], (group.size, x[channel].size // group.size))
        out_group, _out = factor(weight[0], (group.size, weight[0].size // group.size))
    except Misaligned as error:
        for axis in (x[channel], weight[0], weight[1]):
            r.pin(axis, str(error))
    else:
        r.same(outer, group)
        r.same(out_group, group)
        r.same(inner, weight[1])
        if inner.size > 1:
            r.contract(0, channel - len(x), weight=(1, 1), factor=inner)
    if bias is not None:
        r.same(weight[0], bias[0])
    for axis in (*x[channel + 1 :], *weight[2:]):
        r.pin(axis, "a position in space")
    shape = r.output_shape()
    space = tuple(r.fresh(size, "a position in space") for size in shape[channel + 1 :])
    return (*x[:channel], weight[0], *space)


@rule(aten.conv1d, aten.conv2d, aten.conv3d)
def convolution(
    r: Rule,
    x: Dims,
    weight: Dims,
    bias: Dims | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> Dims:
    return _convolve(r, x, weight, bias, groups)


@rule(aten.convolution)
def general_convolution(
    r: Rule,
    x: Dims,
    weight: Dims,
    bias: Dims | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: Any,
) -> Dims:
    if not transposed:
        return _convolve(r, x, weight, bias, groups)
    return _transposed(r, x, weight, bias, groups)


@rule(aten.conv_transpose1d, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def transposed_convolution(
    r: Rule,
    x: Dims,
    weight: Dims,
    bias: Dims | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: Any = 1,
    dilation: Any = 1,
) -> Dims:
    return _transposed(r, x, weight, bias, groups)


def _transposed(r: Rule, x: Dims, weight: Dims, bias: Dims | None, groups: Any) -> Dims:
    """``weight (Ci, Co/G, …)``; more than one group pins, since its channels interleave with the groups."""
    channel = 1 if len(x) == len(weight) else 0
    r.same(x[channel], weight[0])
    out = weight[1]
    if int(groups) == 1:
        r.contract(0, channel - len(x), weight=(1, 0))
    else:
        r.pin(x[channel], "a grouped transposed convolution")
        r.pin(weight[1], "a grouped transposed convolution")
        out = product([r.fresh(int(groups), "a grouped transposed convolution"), weight[1]])
    if bias is not None:
        r.same(out, bias[0])
    for axis in (*x[channel + 1 :], *weight[2:]):
        r.pin(axis, "a position in space")
    space = tuple(r.fresh(size, "a position in space") for size in r.output_shape()[channel + 1 :])
    return (*x[:channel], out, *space)


def _spatial(rank: int) -> Any:
    def spatial(r: Rule, x: Dims, *options: Any, **more: Any) -> Any:
        """The last dimensions are positions in space and change; batch and channels pass through."""
        for axis in x[-rank:]:
            r.pin(axis, "a position in space")
        value = r.node.meta["val"]
        if isinstance(value, (tuple, list)):
            indices: list[int | None] = list(range(len(value)))
            return [_keep_front(r, x, rank, i) for i in indices]
        return _keep_front(r, x, rank, None)

    return spatial


def _keep_front(r: Rule, x: Dims, rank: int, index: int | None) -> Dims:
    shape = r.output_shape(index)
    return (*x[:-rank], *(r.fresh(size, "a position in space") for size in shape[-rank:]))


for _rank, _names in {
    1: "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d max_pool1d_with_indices upsample_nearest1d "
    "upsample_linear1d reflection_pad1d replication_pad1d",
    2: "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices upsample_nearest2d "
    "upsample_bilinear2d upsample_bicubic2d reflection_pad2d replication_pad2d",
    3: "max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d max_pool3d_with_indices upsample_nearest3d "
    "upsample_trilinear3d",
}.items():
    rule(*(getattr(aten, name) for name in _names.split()))(_spatial(_rank))
