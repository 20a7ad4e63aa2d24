"""One operator at a time, between two linear layers: what is prunable, what is pinned and why.

Every case is proved by the oracle three ways: each axis by itself, all axes together, and by ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check_every_axis, look, prunable, randomise, snapshot
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError


class Sandwich(nn.Module):
    """``x (3, 5, 7) → first → body → last``; attributes and submodules for the body are given by name."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], hidden: int, after: int, attributes: dict[str, Any]):
        super().__init__()
        self.first = nn.Linear(7, hidden)
        self.body = body
        for name, value in attributes.items():
            setattr(self, name, value)
        self.last = nn.Linear(after, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self, self.first(x)))


@dataclass
class Case:
    """A body, its widths, and what inference must find: sizes of ``first.weight[0]`` leaves, and pin reasons."""

    body: Callable[[Any, Tensor], Tensor]
    free: list[int]  # sizes of the prunable leaves of first.weight[0]
    pinned: str = ""  # part of the reason of at least one pinned leaf of first.weight[0]
    others: list[int] = field(default_factory=list)  # sizes of all other prunable axes
    after: int = 24
    attributes: dict[str, Callable[[], Any]] = field(default_factory=dict)
    hidden: int = 24
    reachable: bool = True  # whether 45% of all parameters can go

    def model(self) -> Sandwich:
        torch.manual_seed(0)
        built = {name: make() if callable(make) else make for name, make in self.attributes.items()}
        return randomise(Sandwich(self.body, self.hidden, self.after, built)).double().eval()  # type: ignore[return-value]


HEADS: dict[str, Any] = {"heads": 4, "width": 6}


def _halves(m: Any, h: Tensor) -> Tensor:
    a, b = h.split(m.half, -1)
    return a * b


def _chunks(m: Any, h: Tensor) -> Tensor:
    a, b = h.chunk(2, -1)
    return a * b.sigmoid()


def _swapped_chunks(m: Any, h: Tensor) -> Tensor:
    a, b = h.chunk(2, -1)
    return torch.cat([b, a.sin()], -1)


def _split_sizes(m: Any, h: Tensor) -> Tensor:
    a, b, c = torch.split(h, [m.a, m.b, m.c], dim=-1)
    return torch.cat([c, a.tanh(), b], dim=-1)


def _rotate_half(m: Any, h: Tensor) -> Tensor:
    half = h.shape[-1] // 2
    return torch.cat([-h[..., half:], h[..., :half]], -1) + h


def _every_two(m: Any, h: Tensor) -> Tensor:
    return torch.stack((-h[..., 1::2], h[..., ::2]), -1).flatten(-2) + h


def _unbound(m: Any, h: Tensor) -> Tensor:
    a, b, c = h.unflatten(-1, (3, m.rest)).unbind(-2)
    return torch.cat([a, b * c], -1)


def _fused_heads(m: Any, h: Tensor) -> Tensor:
    q, k, v = h.view(h.shape[0], h.shape[1], m.heads, 3, m.width).permute(0, 2, 3, 1, 4).unbind(2)
    scores = (q @ k.transpose(-1, -2)).softmax(-1)
    return (scores @ v).transpose(1, 2).flatten(2)


def _attention(m: Any, h: Tensor) -> Tensor:
    def split(x: Tensor, width: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1, width).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        split(h, m.width), split(m.k(h), m.width), split(m.v(h), m.v_width), **m.options
    )
    return out.transpose(1, 2).reshape(h.shape[0], h.shape[1], -1)


def _viewed_attention(m: Any, h: Tensor) -> Tensor:
    q, k = (p(h).unflatten(-1, (m.heads, -1)).transpose(1, 2) for p in (m.q, m.k))
    v = h.unflatten(-1, (m.heads, m.width)).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2).contiguous()
    return out.view(*h.shape[:2], m.heads * m.width)


def _repeat_kv(m: Any, h: Tensor) -> Tensor:
    b, s, _ = h.shape
    x = h.view(b, s, m.kv, 1, m.width).expand(b, s, m.kv, m.groups, m.width)
    return x.reshape(b, s, m.kv * m.groups * m.width)


def _repeat_kv_literal(m: Any, h: Tensor) -> Tensor:
    b, s, _ = h.shape
    return h.view(b, s, m.kv, 1, m.width).expand(-1, -1, -1, 2, -1).reshape(b, s, -1)


def _asserted(m: Any, h: Tensor) -> Tensor:
    assert h.shape[-1] == m.width
    return h.relu()


def _asserted_multiple(m: Any, h: Tensor) -> Tensor:
    if h.shape[-1] % m.heads != 0:
        raise ValueError("the width is no multiple of the heads")
    return h.unflatten(-1, (m.heads, h.shape[-1] // m.heads)).sin().flatten(-2)


def _attention_of_torch(m: Any, h: Tensor) -> Tensor:
    return m.attention(h, h, h, need_weights=False)[0]


def _write(m: Any, h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    return out.index_add(0, torch.tensor([0, 1, 2]), h)


def _write_channels(m: Any, h: Tensor) -> Tensor:
    return torch.zeros_like(h).index_add(2, torch.arange(23, -1, -1), h)


def _scatter_positions(m: Any, h: Tensor) -> Tensor:
    return torch.zeros_like(h).scatter_add(1, torch.zeros_like(h, dtype=torch.long), h)


def _scatter_channels(m: Any, h: Tensor) -> Tensor:
    return h.scatter(2, torch.zeros_like(h, dtype=torch.long), h)


def _put_positions(m: Any, h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, torch.tensor([2, 0])] = h[:, :2]
    return out + h


def _put_channels(m: Any, h: Tensor) -> Tensor:
    out = h.clone()
    out[..., torch.tensor([2, 0])] = h[..., :2]
    return out


MASK: dict[str, Any] = {"mask": lambda: nn.Buffer(torch.arange(24) % 2 == 0)}
CASES: dict[str, Case] = {
    # views
    "nothing": Case(lambda m, h: h, [24]),
    "relu": Case(lambda m, h: h.relu(), [24]),
    "hardswish": Case(lambda m, h: F.hardswish(h), [24]),
    "type_as": Case(lambda m, h: h.type_as(torch.ops.aten.zeros([5], dtype=torch.float64)), [24]),
    "masked_scatter": Case(
        lambda m, h: h.masked_scatter(h > 0, h * 2), [], "written where a mask says", reachable=False
    ),
    "weight_norm": Case(
        lambda m, h: m.conv(h.mT).mT,
        [],
        "normalised",
        others=[12],
        after=12,
        attributes={"conv": lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(24, 12, 1), dim=0)},
        reachable=False,
    ),
    "attributes_follow": Case(
        lambda m, h: h.view(h.shape[0], h.shape[1], m.heads, m.width).sin().flatten(2), [4, 6], attributes=HEADS
    ),
    "reshape_back_by_shape": Case(
        lambda m, h: h.view(*h.shape[:-1], m.heads, m.width).sin().reshape(h.shape), [4, 6], attributes=HEADS
    ),
    "minus_one_follows": Case(
        lambda m, h: h.view(h.shape[0], h.shape[1], m.heads, -1).sin().flatten(2), [4, 6], attributes=HEADS
    ),
    "literal_pins_all": Case(
        lambda m, h: h.view(h.shape[0], h.shape[1], 4, 6).flatten(2), [], "the number 4", reachable=False
    ),
    "literal_pins_its_own": Case(
        lambda m, h: h.view(h.shape[0], h.shape[1], m.heads, 6).flatten(2), [4], "the number 6", attributes=HEADS
    ),
    "literal_joined": Case(
        lambda m, h: h.view(h.shape[0], h.shape[1], m.heads, m.width).reshape(h.shape[0], h.shape[1], 24),
        [],
        "the number 24",
        attributes=HEADS,
        reachable=False,
    ),
    "product_of_attributes": Case(
        lambda m, h: h.view(h.shape[0], h.shape[1], m.heads, m.width).reshape(
            h.shape[0], h.shape[1], m.heads * m.width
        ),
        [4, 6],
        attributes=HEADS,
    ),
    "floor_division": Case(
        lambda m, h: h.view(h.shape[0], h.shape[1], m.heads, m.total // m.heads).sin().flatten(2),
        [4, 6],
        attributes={"heads": 4, "total": 24},
    ),
    "permute": Case(
        lambda m, h: (
            h.view(h.shape[0], h.shape[1], m.heads, m.width)
            .permute(2, 0, 3, 1)
            .cos()
            .permute(1, 3, 2, 0)
            .reshape(*h.shape[:2], -1)
        ),
        [4, 6],
        attributes=HEADS,
    ),
    "transpose": Case(lambda m, h: h.transpose(1, 2).cos().mT, [24]),
    "movedim": Case(lambda m, h: h.movedim(-1, 0).cos().movedim(0, -1), [24]),
    "unflatten": Case(lambda m, h: h.unflatten(-1, (m.heads, m.width)).cos().flatten(-2), [4, 6], attributes=HEADS),
    "joined_with_positions": Case(lambda m, h: h.flatten(0, 1).cos().unflatten(0, (h.shape[0], h.shape[1])), [24]),
    "across_its_parts": Case(
        lambda m, h: h.view(h.shape[0], h.shape[1], 4, 6).sin().transpose(2, 3).reshape(*h.shape[:2], 4, 6).flatten(2),
        [],
        "",
        reachable=False,
    ),
    "squeeze_unsqueeze": Case(lambda m, h: h.unsqueeze(1).cos().squeeze(1), [24]),
    "expand_to_groups": Case(_repeat_kv, [4, 6], others=[3], attributes={"kv": 4, "groups": 3, "width": 6}, after=72),
    "expand_literal_groups": Case(
        _repeat_kv_literal,
        [4, 6],
        attributes={"kv": 4, "width": 6},
        after=48,
    ),
    "repeat": Case(lambda m, h: h.repeat(1, 1, 2), [24], after=48),
    "repeat_interleave": Case(lambda m, h: h.repeat_interleave(2, -1), [24], after=48),
    "repeat_interleave_attribute": Case(
        lambda m, h: h.repeat_interleave(m.times, dim=-1),
        [24],
        others=[2],
        after=48,
        attributes={"times": 2},
    ),
    "expand_as": Case(lambda m, h: h[:, :1].expand_as(h) + h, [24]),
    # cutting and joining
    "split": Case(_halves, [12], after=12, attributes={"half": 12}),
    "split_literal": Case(
        lambda m, h: h.split(12, -1)[0] * h.split(12, -1)[1], [], "the number 12", after=12, reachable=False
    ),
    "split_uneven": Case(
        lambda m, h: torch.cat(h.split(m.size, -1)[::-1], -1), [], "", attributes={"size": 10}, reachable=False
    ),
    "split_with_a_rest": Case(
        lambda m, h: h.split(m.size, -1)[0],
        [],
        "the last is smaller",
        attributes={"size": 16},
        after=16,
        reachable=False,
    ),
    "narrow_from_the_end": Case(lambda m, h: h.narrow(-1, -m.n, m.n), [8, 16], after=8, attributes={"n": 8}),
    "narrow_from_the_end_literal": Case(lambda m, h: h.narrow(-1, -8, 8), [16], "the number 8", after=8),
    "split_sizes": Case(_split_sizes, [4, 8, 12], attributes={"a": 4, "b": 8, "c": 12}),
    "split_sizes_tuple": Case(
        lambda m, h: torch.cat(h.split(m.sizes, dim=-1)[::-1], dim=-1), [4, 8, 12], attributes={"sizes": (4, 8, 12)}
    ),
    "split_sizes_list": Case(
        lambda m, h: torch.cat(h.split(m.sizes, dim=-1)[::-1], dim=-1), [4, 20], attributes={"sizes": lambda: [4, 20]}
    ),
    "chunk_multiplied": Case(_chunks, [12], after=12),
    "chunk_swapped": Case(_swapped_chunks, [], "equal parts", reachable=False),
    "cat_twice": Case(lambda m, h: torch.cat([h, h.sin()], -1), [24], after=48),
    "cat_with_other": Case(
        lambda m, h: torch.cat([h, m.side(h)], -1),
        [24],
        others=[9],
        after=33,
        attributes={"side": lambda: nn.Linear(24, 9)},
    ),
    "stack_summed": Case(lambda m, h: torch.stack([h, h.sin(), h.cos()]).sum(0), [24]),
    "slice_middle": Case(
        lambda m, h: h[..., m.a : m.b], [6, 8, 10], after=8, attributes={"a": 6, "b": 14}, reachable=True
    ),
    "slice_halves": Case(lambda m, h: h[..., : m.half] * h[..., m.half :], [12], after=12, attributes={"half": 12}),
    "slice_from_end": Case(
        lambda m, h: torch.cat([h[..., -m.tail :], h[..., : -m.tail].sin()], -1), [8, 16], attributes={"tail": 8}
    ),
    "slice_literal": Case(lambda m, h: torch.cat([h[..., 8:], h[..., :8]], -1), [16], "the number 8", reachable=True),
    "narrow": Case(
        lambda m, h: h.narrow(-1, 0, m.half) + h.narrow(-1, m.half, m.half), [12], after=12, attributes={"half": 12}
    ),
    "rotate_half": Case(_rotate_half, [12]),
    "strided": Case(_every_two, [12], "one index in every few is taken"),
    "strided_misfit": Case(lambda m, h: h[..., ::5], [], "sliced with a step", after=5, reachable=False),
    "select": Case(
        lambda m, h: h.unflatten(-1, (2, m.half))[..., 1, :],
        [12],
        "one index of it is taken",
        after=12,
        attributes={"half": 12},
    ),
    "unbind": Case(_unbound, [8], "unbound into its indices", after=16, attributes={"rest": 8}),
    "pad": Case(lambda m, h: F.pad(h, (1, 2)), [24], after=27),
    "pad_cuts": Case(lambda m, h: F.pad(h, (-1, 1)), [], "padded", reachable=False),
    "roll": Case(lambda m, h: h.roll(1, -1), [], "its order matters", reachable=False),
    "flip": Case(lambda m, h: h.flip(-1), [], "its order matters", reachable=False),
    "flip_positions": Case(lambda m, h: h.flip(1), [24]),
    "unfold": Case(lambda m, h: h.unfold(-1, 4, 4).flatten(-2), [], "unfolded into windows", reachable=False),
    "diagonal": Case(
        lambda m, h: h[:, :1] * torch.diagonal(h.unsqueeze(-1) * h.unsqueeze(-2), dim1=-2, dim2=-1),
        [],
        "its diagonal is taken",
        reachable=False,
    ),
    # contractions
    "linear_no_bias": Case(
        lambda m, h: m.mid(h).relu(),
        [24],
        others=[10],
        after=10,
        attributes={"mid": lambda: nn.Linear(24, 10, bias=False)},
    ),
    "matmul_weight": Case(
        lambda m, h: (h @ m.w).relu(),
        [24],
        others=[10],
        after=10,
        attributes={"w": lambda: nn.Parameter(torch.randn(24, 10))},
    ),
    "weight_on_the_left": Case(
        lambda m, h: (m.w @ h.mT).mT,
        [24],
        others=[10],
        after=10,
        attributes={"w": lambda: nn.Parameter(torch.randn(10, 24))},
    ),
    "addmm": Case(
        lambda m, h: torch.addmm(m.b, h.flatten(0, 1), m.w).unflatten(0, h.shape[:2]),
        [24],
        others=[10],
        after=10,
        attributes={"w": lambda: nn.Parameter(torch.randn(24, 10)), "b": lambda: nn.Parameter(torch.randn(10))},
    ),
    "bmm": Case(
        lambda m, h: torch.bmm(torch.bmm(h, h.mT), m.side(h)),
        [24],
        others=[9],
        after=9,
        attributes={"side": lambda: nn.Linear(24, 9)},
    ),
    "baddbmm": Case(
        lambda m, h: torch.baddbmm(h, torch.bmm(h, h.mT), m.side(h)),
        [24],
        attributes={"side": lambda: nn.Linear(24, 24)},
    ),
    "gram": Case(lambda m, h: h @ (h.mT @ h), [24]),
    "matvec": Case(
        lambda m, h: h * (h @ m.v).unsqueeze(-1), [24], attributes={"v": lambda: nn.Parameter(torch.randn(24))}
    ),
    "einsum_batch": Case(lambda m, h: torch.einsum("bsh,bsh->bsh", h, h.sin()), [24]),
    "einsum_contracts": Case(
        lambda m, h: torch.einsum("bsh,ho->bso", h, m.w),
        [24],
        others=[10],
        after=10,
        attributes={"w": lambda: nn.Parameter(torch.randn(24, 10))},
    ),
    "einsum_ellipsis": Case(
        lambda m, h: torch.einsum("...h,ho->...o", h, m.w),
        [24],
        others=[10],
        after=10,
        attributes={"w": lambda: nn.Parameter(torch.randn(24, 10))},
    ),
    "bilinear": Case(
        lambda m, h: m.pair(h, h.sin()),
        [24],
        others=[6],
        after=6,
        attributes={"pair": lambda: nn.Bilinear(24, 24, 6)},
    ),
    "outer": Case(
        lambda m, h: h * torch.outer(m.v, m.u).sum(0),
        [24],
        others=[3],
        attributes={"v": lambda: nn.Parameter(torch.randn(3)), "u": lambda: nn.Parameter(torch.randn(24))},
    ),
    # attention
    "attention_by_hand": Case(
        _fused_heads, [2, 4], "unbound into its indices", after=8, attributes={"heads": 2, "width": 4}
    ),
    "sdpa_default_scale": Case(
        _attention,
        [4],
        "the default scale of attention is derived from this width",
        others=[6],  # the width of the values
        attributes={
            "width": 6,
            "v_width": 6,
            "k": lambda: nn.Linear(24, 24),
            "v": lambda: nn.Linear(24, 24),
            "options": lambda: {"is_causal": True},
        },
    ),
    "sdpa_own_scale": Case(
        _attention,
        [4, 6],
        others=[6],
        attributes={
            "width": 6,
            "v_width": 6,
            "k": lambda: nn.Linear(24, 24),
            "v": lambda: nn.Linear(24, 24),
            "options": lambda: {"scale": 0.3},
        },
    ),
    "sdpa_grouped": Case(
        _attention,
        [2, 2, 6],  # groups of query heads on key heads
        others=[6],
        attributes={
            "width": 6,
            "v_width": 6,
            "k": lambda: nn.Linear(24, 12),
            "v": lambda: nn.Linear(24, 12),
            "options": lambda: {"scale": 0.3, "enable_gqa": True},
        },
    ),
    # normalisation and reductions
    "layer_norm": Case(
        lambda m, h: m.norm(h), [], "normalised", attributes={"norm": lambda: nn.LayerNorm(24)}, reachable=False
    ),
    "rms_norm": Case(
        lambda m, h: m.norm(h), [], "normalised", attributes={"norm": lambda: nn.RMSNorm(24)}, reachable=False
    ),
    "batch_norm": Case(lambda m, h: m.norm(h.mT).mT, [24], attributes={"norm": lambda: nn.BatchNorm1d(24)}),
    "group_norm": Case(
        lambda m, h: m.norm(h.mT).mT, [4], "normalised", attributes={"norm": lambda: nn.GroupNorm(4, 24)}
    ),
    "softmax": Case(lambda m, h: h.softmax(-1), [], "normalised by softmax", reachable=False),
    "log_softmax": Case(lambda m, h: F.log_softmax(h, -1), [], "normalised by softmax", reachable=False),
    "softmax_positions": Case(lambda m, h: h.softmax(1), [24]),
    "mean": Case(lambda m, h: h - h.mean(-1, keepdim=True), [], "averaged", reachable=False),
    "mean_positions": Case(lambda m, h: h.mean(1), [24]),
    "variance": Case(lambda m, h: h / (1 + h.var(-1, keepdim=True)), [], "averaged", reachable=False),
    "sum": Case(lambda m, h: h + h.sum(-1, keepdim=True), [24]),
    "sum_of_squares": Case(lambda m, h: h * h.pow(2).sum(-1, keepdim=True).sqrt(), [24]),
    "sum_of_exponentials": Case(lambda m, h: h.exp() / h.exp().sum(-1, keepdim=True), [24]),
    "sum_all": Case(lambda m, h: h * h.sum().tanh(), [24]),
    "norm": Case(
        lambda m, h: h / torch.linalg.vector_norm(h, dim=-1, keepdim=True), [], "a norm over it", reachable=False
    ),
    "amax": Case(lambda m, h: h - h.amax(-1, keepdim=True), [], "largest or smallest", reachable=False),
    "max_with_index": Case(lambda m, h: h - h.max(-1, keepdim=True).values, [], "largest or smallest", reachable=False),
    "argmax": Case(lambda m, h: h * h.argmax(-1, keepdim=True), [], "largest or smallest", reachable=False),
    "max_positions": Case(lambda m, h: h.max(1).values, [24]),
    "product": Case(lambda m, h: h + h.tanh().prod(-1, keepdim=True), [], "multiplied up", reachable=False),
    "logsumexp": Case(lambda m, h: h - h.logsumexp(-1, keepdim=True), [], "largest or smallest", reachable=False),
    "topk": Case(lambda m, h: h.topk(5, -1).values, [], "sorted", after=5, reachable=False),
    "sort_positions": Case(lambda m, h: h.sort(1).values, [24]),
    "sort": Case(lambda m, h: h.sort(-1).values, [], "sorted", reachable=False),
    "cumsum": Case(lambda m, h: h.cumsum(-1), [], "accumulated along it", reachable=False),
    "cumsum_positions": Case(lambda m, h: h.cumsum(1), [24]),
    "diff": Case(lambda m, h: h.diff(dim=-1), [], "differences along it", after=23, reachable=False),
    # pointwise
    "where_masked": Case(lambda m, h: torch.where(h > 0, h, h.sin()).masked_fill(h < -1, 0.5), [24]),
    "in_place": Case(lambda m, h: h.sin().mul_(h).add_(1.0).clamp_(-1, 2), [24]),
    "copies_and_casts": Case(lambda m, h: h.to(torch.float64) + h.type_as(h) + h.clone(), [24]),
    "cast_by_name": Case(lambda m, h: h.float().to(h.dtype) + h.half().double(), [24]),
    "dropout": Case(lambda m, h: F.dropout(h, 0.5, m.training), [24]),
    "parameter_scale": Case(
        lambda m, h: h * m.scale, [24], attributes={"scale": lambda: nn.Parameter(torch.randn(24))}
    ),
    "parameter_of_one": Case(
        lambda m, h: h * m.scale, [24], attributes={"scale": lambda: nn.Parameter(torch.randn(1))}
    ),
    "buffer_scale": Case(lambda m, h: h * m.scale, [24], attributes={"scale": lambda: nn.Buffer(torch.randn(24))}),
    "residual": Case(lambda m, h: h + m.mid(h.relu()), [24], attributes={"mid": lambda: nn.Linear(24, 24)}),
    "prelu": Case(lambda m, h: m.act(h.mT).mT, [24], attributes={"act": lambda: nn.PReLU(24)}),
    "prelu_shared": Case(lambda m, h: m.act(h), [24], attributes={"act": lambda: nn.PReLU()}),
    "glu": Case(lambda m, h: F.glu(h, -1), [12], after=12),
    "activations": Case(
        lambda m, h: F.gelu(h) + F.silu(h) + F.softplus(h) + F.hardtanh(h) + F.elu(h) + F.mish(h), [24]
    ),
    "complex": Case(
        lambda m, h: torch.view_as_real(torch.complex(h, h.sin())).flatten(-2),
        [24],
        after=48,
    ),
    "rotation": Case(
        lambda m, h: torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (-1, 2))) * m.turn).flatten(-2),
        [12],
        "real and imaginary part",
        attributes={"turn": lambda: nn.Buffer(torch.polar(torch.ones(12), torch.arange(12.0)).to(torch.complex128))},
    ),
    "smaller_of_two": Case(lambda m, h: torch.min(h, h.sin()) + torch.max(h, h.cos()), [24]),
    "broadcast_to": Case(lambda m, h: h[:, :1].broadcast_to(h.shape) + h, [24]),
    # indexing
    "gather": Case(
        lambda m, h: h.gather(-1, torch.zeros_like(h, dtype=torch.long)), [], "looked up by index", reachable=False
    ),
    "index": Case(lambda m, h: h[..., [3, 1, 2]], [], "looked up by index", after=3, reachable=False),
    "index_positions": Case(lambda m, h: h[:, [3, 1, 2]], [24]),
    "index_select": Case(
        lambda m, h: h.index_select(-1, torch.tensor([3, 1])), [], "looked up by index", after=2, reachable=False
    ),
    "index_select_positions": Case(lambda m, h: h.index_select(1, torch.tensor([3, 1])), [24]),
    "index_add": Case(_write, [24]),
    "index_add_channels": Case(_write_channels, [], "looked up by index", reachable=False),
    "scatter": Case(_scatter_positions, [24]),
    "scatter_channels": Case(_scatter_channels, [], "looked up by index", reachable=False),
    "index_put": Case(_put_positions, [24]),
    "index_put_channels": Case(_put_channels, [], "looked up by index", reachable=False),
    "mask_picks_rows": Case(lambda m, h: h + h[h.detach().sum(-1) > 0].sum(0), [24]),
    "mask_picks_channels": Case(
        lambda m, h: h * h[:, :, m.mask].sum(), [], "picked by a mask", attributes=MASK, reachable=False
    ),
    "histogram": Case(lambda m, h: h + torch.histc(h.detach(), bins=5).sum(), [], "counted", reachable=False),
    "one_hot": Case(
        lambda m, h: h + m.table(F.one_hot((h.sum(-1) > 0).long(), 2).to(h)),
        [24],
        attributes={"table": lambda: nn.Linear(2, 24)},
    ),
    "triangle": Case(lambda m, h: h.tril(), [], "its order matters", reachable=False),
    "embedding": Case(
        lambda m, h: h + m.table((h.sum(-1) > 0).long()),
        [24],
        attributes={"table": lambda: nn.Embedding(2, 24)},
    ),
    # made inside forward
    "ones_by_attribute": Case(lambda m, h: h + torch.ones(m.n), [24], attributes={"n": 24}),
    "zeros_by_shape": Case(lambda m, h: h + torch.zeros(h.shape[-1]), [24]),
    "full_by_shape": Case(lambda m, h: h + torch.full((h.shape[-1],), 0.3), [24]),
    "new_ones_by_size": Case(lambda m, h: h + h.new_ones(h.size(-1)), [24]),
    "zeros_like": Case(lambda m, h: h + torch.ones_like(h), [24]),
    "zeros_literal": Case(lambda m, h: h + torch.zeros(24), [], "the number 24", reachable=False),
    "arange": Case(
        lambda m, h: h + torch.arange(h.shape[-1]), [], "a constant computed inside forward", reachable=False
    ),
    "linspace": Case(
        lambda m, h: h * torch.linspace(0, 1, m.n), [], "a constant computed", attributes={"n": 24}, reachable=False
    ),
    "constant": Case(lambda m, h: h + torch.tensor([0.1] * 24), [], "a constant of forward", reachable=False),
    # numbers that are more than sizes
    "scaled_by_width": Case(lambda m, h: h * h.shape[-1] ** -0.5, [], "enters the computation", reachable=False),
    "divided_by_width": Case(lambda m, h: h / h.shape[-1], [], "", reachable=False),
    "branch_on_width": Case(
        lambda m, h: h * (2.0 if h.shape[-1] > 20 else 0.5), [], "forward asks whether", reachable=False
    ),
    "branch_that_cannot_change": Case(lambda m, h: h * (2.0 if h.shape[-1] < 25 else 0.5), [24]),
    "asserted_width": Case(_asserted, [24], attributes={"width": 24}),
    "asserted_multiple": Case(_asserted_multiple, [4, 6], attributes={"heads": 4, "width": 6}),
    "padded_to_a_multiple": Case(
        lambda m, h: F.pad(h, (0, -h.shape[-1] % 5)), [], "shape[2] % 5", after=25, reachable=False
    ),
    "parity_of_width": Case(lambda m, h: h + (h.shape[-1] & 1), [], "enters the computation", reachable=False),
    "multiplied_by_number_of_elements": Case(lambda m, h: h / h.numel(), [], "which cannot follow", reachable=False),
    "multiplied_by_length": Case(lambda m, h: h * len(h.transpose(0, -1)), [], "enters", reachable=False),
    "multiplied_by_int": Case(lambda m, h: h * int(h.shape[-1]), [], "enters", reachable=False),
    "branch_on_remainder": Case(
        lambda m, h: h * (2.0 if h.shape[-1] % 5 else 0.5), [], "asks whether", reachable=False
    ),
    "multiplied_by_width_of_what_is_cast": Case(
        lambda m, h: h.float().to(h.dtype) * h.shape[-1], [], "which cannot follow", reachable=False
    ),
    "shape_of_what_is_cast": Case(lambda m, h: h.float().to(h.dtype).reshape(h.shape), [24]),
    "looked_up_width": Case(lambda m, h: h * {24: 2.0}.get(h.shape[-1], 1.0), [], "", reachable=False),
    "number_of_a_quotient": Case(lambda m, h: h * (h.shape[-1] // 3) ** -0.5, [], "enters", reachable=False),
    "multiplied_by_width": Case(lambda m, h: h * h.shape[-1], [], "", reachable=False),
    "scaled_by_attribute": Case(
        lambda m, h: (h.unflatten(-1, (m.heads, m.width)) * m.width**-0.5).flatten(-2),
        [4],
        "enters the computation",
        attributes=HEADS,
    ),
    "viewed_attention": Case(
        _viewed_attention,
        [4, 6],
        others=[6],
        attributes={**HEADS, "q": lambda: nn.Linear(24, 24), "k": lambda: nn.Linear(24, 24)},
    ),
    "multi_head_attention": Case(
        _attention_of_torch,
        [],
        "which cannot follow",
        others=[24],
        attributes={"attention": lambda: nn.MultiheadAttention(24, 4, batch_first=True)},
        reachable=False,
    ),
    # no rule
    "fft": Case(lambda m, h: torch.fft.fft(h).real, [], "aten.fft_fft.default has no rule", reachable=False),
}


@pytest.mark.parametrize("name", CASES)
def test_operator(name: str) -> None:
    case = CASES[name]
    model, x = case.model(), torch.randn(3, 5, 7, dtype=torch.float64)
    found = look(model, x)
    of_first = [g for g in found.groups if any(str(m) == "first.weight[0]" for m in g.members)]
    assert sorted(g.size for g in found.prunable if g in of_first) == case.free
    assert sorted(g.size for g in found.prunable if g not in of_first) == case.others
    if case.pinned:
        reasons = [pin for group in of_first for pin in group.pins]
        assert any(case.pinned in reason for reason in reasons), reasons
    unchanged = snapshot(model)
    assert check_every_axis(model, x) == [g.name for g in found.prunable]
    if case.reachable:
        report = graphprune.report(
            graphprune.compile(model, 0.45, method="magnitude", example_inputs=x, inner_axes=True)
        )
        assert report.oracle_error is not None
        assert 0 < report.ratio <= 0.45
    else:
        with pytest.raises(GraphPruneError, match="cannot be reached"):
            graphprune.compile(model, 0.95, method="magnitude", example_inputs=x, inner_axes=True)
    unchanged()


def test_every_registered_sandwich_line_names_this_file() -> None:
    """A pin says where in the user's code it comes from."""
    reasons = look(CASES["softmax"].model(), torch.randn(3, 5, 7, dtype=torch.float64)).skipped
    assert "test_sandwich.py:" in reasons["first.weight[0]"]


def test_an_operator_without_a_rule_is_listed() -> None:
    found = look(CASES["fft"].model(), torch.randn(3, 5, 7, dtype=torch.float64))
    assert list(found.unruled) == ["aten.fft_fft.default has no rule"]
    assert "test_sandwich.py" in found.unruled["aten.fft_fft.default has no rule"][0]
    assert "Operators without a rule" in str(found)


@torch.library.custom_op("graphprune_tests::double_it", mutates_args=())
def double_it(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@double_it.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_a_custom_operator_pins_and_is_listed() -> None:
    model = Case(lambda m, h: double_it(h), []).model()
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    assert prunable(model, x) == {}
    assert any("graphprune_tests.double_it" in name for name in look(model, x).unruled)


def test_attributes_get_their_new_values() -> None:
    model = CASES["attributes_follow"].model()
    plan = graphprune.Plan(
        0.0,
        {"first.weight[0].0": [0, 3], "first.weight[0].1": [1, 2, 5]},
        {"first.weight[0].0": 4, "first.weight[0].1": 6},
    )
    pruned = graphprune.compile(model, plan=plan, example_inputs=torch.randn(3, 5, 7, dtype=torch.float64))
    assert (pruned.heads, pruned.width) == (2, 3)
    assert (model.heads, model.width) == (4, 6)
    assert (pruned.first.out_features, pruned.last.in_features) == (6, 6)
    rows = [head * 6 + place for head in (0, 3) for place in (1, 2, 5)]
    assert torch.equal(pruned.first.weight, model.first.weight[rows])
    assert torch.equal(pruned.first.bias, model.first.bias[rows])
    assert torch.equal(pruned.last.weight, model.last.weight[:, rows])


def test_tuple_attributes_get_their_new_values() -> None:
    model = CASES["split_sizes_tuple"].model()
    plan = graphprune.Plan(0.0, {"first.weight[0].1": [0, 5]}, {"first.weight[0].1": 8})
    pruned = graphprune.compile(model, plan=plan, example_inputs=torch.randn(3, 5, 7, dtype=torch.float64))
    assert pruned.sizes == (4, 2, 12)
    assert type(pruned.sizes) is tuple
