"""Fused attention."""

from __future__ import annotations

import torch

from graphprune.ir.axes import Misaligned, factor
from graphprune.rules.registry import Dims, Rule, rule

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention)
def attention(
    r: Rule,
    query: Dims,
    key: Dims,
    value: Dims,
    attn_mask: Dims | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Dims:
    """``softmax(q kᵀ · scale + mask) v`` with q ``(…, L, E)``, k ``(…, S, E)``, v ``(…, S, Ev)``.

    E is contracted between activations, Ev passes through, S is normalised. With ``enable_gqa`` the query heads are
    the product of the key heads and a group.
    """
    r.same(query[-1], key[-1])
    r.contract(0, -1)
    if scale is None:
        r.pin(query[-1], "the default scale of attention is derived from this width")
    r.same(key[-2], value[-2])
    r.pin(key[-2], "normalised by softmax")
    if enable_gqa and query[-3].size != key[-3].size:
        r.same(key[-3], value[-3])
        try:
            heads, _group = factor(query[-3], (key[-3].size, query[-3].size // key[-3].size))
            r.same(heads, key[-3])
        except Misaligned as error:
            r.pin(query[-3], str(error))
            r.pin(key[-3], str(error))
        r.broadcast(query[:-3], key[:-3], value[:-3])
        batch = query[:-2]
    else:
        batch = r.broadcast(query[:-2], key[:-2], value[:-2])
    if attn_mask is not None:
        r.broadcast((*batch, query[-2], key[-2]), attn_mask)
    return (*batch, query[-2], value[-1])
