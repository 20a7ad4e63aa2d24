"""Axis rules, one small function per ATen operator, one file per family. Importing this package registers them all."""

from graphprune.rules import (
    attention,
    blocks,
    complex_numbers,
    convolution,
    factories,
    indexing,
    linear,
    normalisation,
    pointwise,
    reductions,
    views,
)
from graphprune.rules.registry import Contraction, Dims, Facts, Rule, SizeUse, find_rule, rule, rule_by_name

__all__ = [
    "Contraction",
    "Dims",
    "Facts",
    "Rule",
    "SizeUse",
    "attention",
    "blocks",
    "complex_numbers",
    "convolution",
    "factories",
    "find_rule",
    "indexing",
    "linear",
    "normalisation",
    "pointwise",
    "reductions",
    "rule",
    "rule_by_name",
    "views",
]
