"""Models to draw, traced once for all tests."""

from __future__ import annotations

import functools

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune
from graphprune.inspection import Inspection

MLP = "model.layers.*.mlp.gate_proj.weight[0]"
HEADS = "model.layers.*.self_attn.q_proj.weight[0].0"
# Two things that a page could take for its own: markup, and what ends a script.
HOSTILE = "</script><img src=x onerror=alert(1)>"


def llama(layers: int = 4, heads: int = 4) -> LlamaForCausalLM:
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=32,
        intermediate_size=44,
        num_attention_heads=heads,
        num_key_value_heads=2,
        vocab_size=50,
    )
    return LlamaForCausalLM(config).eval()


class Hostile(nn.Module):
    """A perceptron whose layers are called whatever they like."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(HOSTILE, nn.Linear(4, 6))
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(getattr(self, HOSTILE)(x)))


@functools.cache
def traced() -> Inspection:
    return graphprune.inspect(llama())


@functools.cache
def hostile() -> Inspection:
    return graphprune.inspect(Hostile().eval(), example_inputs=torch.randn(2, 4))
