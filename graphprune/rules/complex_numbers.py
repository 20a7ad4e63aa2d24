"""Complex numbers: a real dimension of two becomes one number and back."""

from __future__ import annotations

import torch

from graphprune.rules.pointwise import pointwise
from graphprune.rules.registry import Dims, Rule, rule

aten = torch.ops.aten
_PARTS = "real and imaginary part"

rule(aten.polar, aten.complex, aten.conj, aten._conj, aten.conj_physical, aten.resolve_conj, aten.imag)(pointwise)


@rule(aten.view_as_complex)
def view_as_complex(r: Rule, x: Dims) -> Dims:
    r.pin(x[-1], _PARTS)
    return x[:-1]


@rule(aten.view_as_real)
def view_as_real(r: Rule, x: Dims) -> Dims:
    return (*x, r.fresh(2, _PARTS))
