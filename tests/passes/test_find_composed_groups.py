"""Composed groups are found from the graph and the module tree, whoever wrote the adapter."""

from __future__ import annotations

from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import graphprune
from graphprune.drawing import build_graph, to_pydot
from tests.helpers import look


class LowRank(nn.Module):
    """An adapter as anyone could write it; ``between`` is what happens at the rank."""

    def __init__(self, inputs: int, outputs: int, base: bool = True, between: nn.Module | None = None):
        super().__init__()
        self.base = nn.Linear(inputs, outputs) if base else None
        self.reads, self.writes = nn.Linear(inputs, 4, bias=False), nn.Linear(4, outputs, bias=False)
        self.between = between or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        update = self.writes(self.between(self.reads(x))) * 0.5
        return update if self.base is None else self.base(x) + update


class Net(nn.Module):
    def __init__(self, **options: object):
        super().__init__()
        self.up, self.down = LowRank(6, 20, **options), nn.Linear(20, 5)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def net(**options: object) -> graphprune.Inspection:
    from torch import randn

    return look(Net(**options), (randn(3, 6),))


def test_an_adapter_of_ones_own() -> None:
    found = net()
    (composed,) = found.composed
    assert (composed.module, composed.base) == ("up", "up.base.weight")
    assert composed.factors == [("up.reads.weight", "up.writes.weight")]
    assert set(composed.tensors) == {"up.base.weight", "up.base.bias", "up.reads.weight", "up.writes.weight"}
    assert composed.ranks == ["up.reads.weight[0]"]
    assert composed.overlaps == ["up.base.weight[0]", "up.base.weight[1]"]
    assert "up.reads.weight[0]" not in [group.name for group in found.prunable]
    assert found.skipped["up.reads.weight[0]"] == "the rank of what is added to up"


def test_without_a_weight_to_add_to_the_rank_is_an_axis_like_any_other() -> None:
    found = net(base=False)
    assert found.composed == []
    assert "up.reads.weight[0]" in [group.name for group in found.prunable]


def test_a_branch_that_is_not_linear_is_none() -> None:
    assert net(between=nn.ReLU()).composed == []


def llama() -> graphprune.Inspection:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = AutoConfig.for_model("llama", num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    return graphprune.inspect(get_peft_model(model, LoraConfig(r=5, target_modules="all-linear")))


def test_figure_2_of_lorashear() -> None:
    found = llama()
    assert len(found.composed) == 14
    by_module = {one.module.removeprefix("base_model.model.model.layers."): one for one in found.composed}
    ffn = "model.layers.0.mlp.gate_proj.weight[0]"
    assert all(ffn in by_module[f"0.mlp.{name}_proj"].overlaps for name in ("gate", "up", "down"))
    assert ffn not in by_module["0.self_attn.q_proj"].overlaps
    heads = next(group for group in found.prunable if group.name == "model.layers.0.self_attn.q_proj.weight[0].0")
    assert {m.tensor.split(".")[-3] for m in heads.members if "lora_" in m.tensor} == {"lora_A", "lora_B"}
    text = str(found)
    assert "Composed, each with a rank" in text
    assert "self_attn.q_proj  ×2: base_layer.weight + lora_B.default.weight · lora_A.default.weight (rank 5)" in text


def test_the_picture_has_a_box_for_every_composed_group() -> None:
    graph = build_graph(llama())
    ranks = [about for _, about in graph.nodes(data=True) if about.get("kind") == "rank"]
    assert len(ranks) == 7
    assert {about["size"] for about in ranks} == {5}
    drawn = to_pydot(graph).to_string()
    assert drawn.count(": a composed group") == 7
