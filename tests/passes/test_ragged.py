"""Ragged axes: found where every outer index stands by itself, and nowhere else; proven by the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import X, analyse, look, numel, randomise, snapshot, toy
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError, Plan
from graphprune.ir.program import Program
from graphprune.passes import pipelines, run_passes
from graphprune.passes.follow_sizes import follow_sizes
from graphprune.passes.replay_plan import replay_plan

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 211,
    "pad_token_id": 0,
}


def hf(model: str, config: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    made = getattr(transformers, config)(**SIZES | settings)
    return randomise(getattr(transformers, model)(made)).eval()


def llama() -> nn.Module:
    return hf("LlamaForCausalLM", "LlamaConfig")


class Experts(nn.Module):
    """Batched experts that all tokens go through, weighed by a router; (experts, in, out) as bmm takes it."""

    def __init__(self, experts: int = 4, hidden: int = 10) -> None:
        super().__init__()
        self.router = nn.Linear(7, experts)
        self.up = nn.Parameter(torch.randn(experts, 7, hidden))
        self.bias = nn.Parameter(torch.randn(experts, 1, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, 7))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        hidden = torch.baddbmm(self.bias, x.expand(self.up.shape[0], -1, -1), self.up).relu()
        mixed = torch.bmm(hidden, self.down) * self.router(x).softmax(-1).T.unsqueeze(-1)
        return mixed.sum(0)


class Nested(nn.Module):
    """Experts whose hidden width is parts · channels: channels under parts, parts under experts."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = 5
        self.up = nn.Parameter(torch.randn(3, 7, 5 * 4))
        self.down = nn.Parameter(torch.randn(3, 5 * 4, 7))

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x.flatten(0, 1) @ self.up).unflatten(-1, (self.parts, -1)).relu().flatten(2)
        return (hidden @ self.down).sum(0)


class Grouped(nn.Module):
    """A convolution in groups: its channels under their group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv1d(5, 12, 1), nn.BatchNorm1d(12)
        self.grouped = nn.Conv1d(12, 20, 3, groups=4)
        self.head = nn.Conv1d(20, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.grouped(self.norm(self.stem(x)).relu()).relu())


class Tiled(nn.Module):
    """Query heads numbered (member, key head), so that the ragged factor is the outer one of its dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.members, self.heads = 3, 2
        self.q, self.k, self.v, self.o = nn.Linear(7, 24), nn.Linear(7, 8), nn.Linear(7, 8), nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.members, self.heads, -1)).permute(2, 3, 0, 1, 4)
        k, v = (p(x).unflatten(-1, (self.heads, -1)).permute(2, 0, 1, 3) for p in (self.k, self.v))
        mixed = (q * 0.4 @ k.mT).softmax(-1) @ v
        return self.o(mixed.permute(2, 3, 0, 1, 4).flatten(2))


class Fused(nn.Module):
    """One projection for q, k and v: heads·qk + heads·qk + heads·v."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.key, self.value = 3, 4, 5
        self.project, self.o = nn.Linear(7, 3 * (4 + 4 + 5)), nn.Linear(3 * 5, 7)

    def forward(self, x: Tensor) -> Tensor:
        widths = [self.heads * self.key, self.heads * self.key, self.heads * self.value]
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.project(x).split(widths, dim=-1)
        )
        return self.o(((q @ k.mT) * 0.4).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


def llama4() -> nn.Module:
    sizes = {"num_local_experts": 3, "intermediate_size_mlp": 40, "head_dim": 8, "intermediate_size": 20}
    return hf("Llama4ForCausalLM", "Llama4TextConfig", **sizes)


def bloom() -> nn.Module:
    return hf("BloomForCausalLM", "BloomConfig", n_layer=2, num_attention_heads=4)


# Model, its inputs, and {size of a ragged axis: size of the axis it is under}.
MODELS: dict[str, tuple[Any, Any, set[tuple[int, int]]]] = {
    "attention": (toy, X, {(8, 4)}),
    "experts": (Experts, X, {(10, 4)}),
    "nested": (Nested, X, {(4, 5), (5, 3)}),
    "grouped convolution": (Grouped, torch.randn(3, 5, 9), {(3, 4), (5, 4)}),
    "tiled query heads": (Tiled, X, {(3, 2), (4, 2)}),
    "fused projection": (Fused, X, {(4, 3), (5, 3)}),
    "llama": (llama, None, {(3, 2)}),
    "llama4": (llama4, None, {(20, 3), (3, 2)}),
    "bloom": (bloom, None, {(12, 4)}),
}


def built(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    make, inputs, _ = MODELS[name]
    return randomise(make()).eval(), inputs


def random_plan(program: Program, seed: int = 0, *, others: bool = False) -> Plan:
    """A random choice under every outer index, for every ragged axis; with ``others`` of all other axes too."""
    generator = torch.Generator().manual_seed(seed)

    def some(size: int, count: int) -> list[int]:
        return sorted(torch.randperm(size, generator=generator)[:count].tolist())

    sizes = {group.name: group.size for group in program.need("groups")}
    plan = Plan(0.0, method="test")
    for group in program.need("prunable"):
        outer = program.need("ragged").get(group.name)
        count = int(torch.randint(1, group.size, (), generator=generator))
        if outer is not None:
            plan.keep[group.name] = [some(group.size, count) for _ in range(sizes[outer])]
            plan.under[group.name] = outer
        elif others:
            plan.keep[group.name] = some(group.size, count)
    plan.sizes = {name: sizes[name] for name in plan.keep}
    return plan


@pytest.mark.parametrize("name", MODELS)
def test_what_is_ragged(name: str) -> None:
    program = analyse(*built(name))
    sizes = {group.name: group.size for group in program.need("groups")}
    found = {(sizes[inner], sizes[outer]) for inner, outer in program.need("ragged").items()}
    assert found == MODELS[name][2]


@pytest.mark.parametrize("name", MODELS)
def test_the_oracle_holds_for_any_choice(name: str) -> None:
    program = analyse(*built(name))
    for seed in range(4):
        plan = random_plan(program, seed, others=seed > 1)
        run_passes(program, (replay_plan(plan), follow_sizes, *pipelines.EMIT))
        assert program.need("oracle_error") <= 1e-4
        assert numel(program.need("pruned")) < numel(program.model)


@pytest.mark.parametrize("name", MODELS)
def test_in_place_equals_a_copy(name: str) -> None:
    model, inputs = built(name)
    plan = random_plan(analyse(model, inputs), others=True)
    unchanged = snapshot(model)
    copied = graphprune.compile(model, plan=plan, example_inputs=inputs)
    unchanged()
    changed = graphprune.compile(model, plan=plan, example_inputs=inputs, inplace=True)
    assert changed is model
    for (name, a), (_, b) in zip(copied.state_dict().items(), changed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


# Each breaks one condition of find_ragged_axes and no other.


class Rotary(nn.Module):
    """A buffer that all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.up, self.down = nn.Linear(7, 12), nn.Linear(12, 7)
        self.register_buffer("cos", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.up(x).unflatten(-1, (self.heads, -1)) * self.cos).flatten(-2))


class Summed(Rotary):
    """The sum over all heads comes back to each."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).unflatten(-1, (self.heads, -1))
        return self.down((y + y.sum(-2, keepdim=True)).flatten(-2))


class Softmax(Rotary):
    """Every channel is normalised over the heads."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).unflatten(-1, (self.heads, -1)).softmax(-2).flatten(-2))


class Rolled(Rotary):
    """Every head meets the one before it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).unflatten(-1, (self.heads, -1))
        return self.down((y + y.roll(1, -2)).flatten(-2))


class Mixed(Rotary):
    """A matrix mixes the heads, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).unflatten(-1, (self.heads, -1)).transpose(-1, -2)
        return self.down((y + y @ self.mix).transpose(-1, -2).flatten(-2))


class Gram(Rotary):
    """Every head meets every other head."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).unflatten(-1, (self.heads, -1))
        return (y @ y.mT).sum(-1).sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", [Rotary, Summed, Softmax, Rolled, Mixed, Gram])
def test_heads_that_meet_keep_the_same_channels(kind: type[Rotary]) -> None:
    torch.manual_seed(0)
    program = analyse(kind(), X)
    channels = next(group for group in program.need("prunable") if group.size == 4)
    heads = next(group for group in program.need("groups") if group.size == 3)
    assert channels.name not in program.need("ragged")
    plan = Plan(0.0, {channels.name: [[0, 1], [0, 2], [1, 3]]}, {channels.name: 4}, under={channels.name: heads.name})
    with pytest.raises(GraphPruneError, match="has one choice for all"):
        run_passes(program, (replay_plan(plan),))
    # Were it ragged all the same, the oracle would not hold, or the tensor without heads could not be cut.
    program.ragged = {channels.name: heads.name}
    with pytest.raises(GraphPruneError, match=r"does not compute what|without its outer axis"):
        run_passes(program, (replay_plan(plan), follow_sizes, *pipelines.EMIT))


def test_a_lookup_of_the_outer_axis_elsewhere_does_no_harm() -> None:
    """The experts are pinned, by the softmax of their router; their channels are still ragged under them."""
    program = analyse(Experts(), X)
    experts = next(group for group in program.need("groups") if group.size == 4)
    assert experts.pins
    assert set(program.need("ragged").values()) == {experts.name}


@pytest.mark.parametrize("method", ["magnitude", "l1", "random", "wanda-sp"])
def test_the_least_of_every_expert_goes(method: str) -> None:
    torch.manual_seed(0)
    model = Experts()
    weak = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [1, 5, 9]]
    with torch.no_grad():
        for expert, channels in enumerate(weak):
            for tensor in (model.up[expert].T, model.bias[expert].T, model.down[expert]):
                tensor[channels] *= 1e-3
    share = 4 * 3 * 15 / numel(model)
    options: dict[str, Any] = {"data": [{"x": X}]} if method == "wanda-sp" else {}
    pruned = graphprune.compile(model, share + 1e-6, method=method, inner_axes=True, example_inputs=X, **options)
    report = graphprune.report(pruned)
    assert report.widths == {"up[2]": (10, 7)}
    assert report.plan.under == {"up[2]": "up[0]"}
    removed = [sorted(set(range(10)) - set(kept)) for kept in report.plan.keep["up[2]"]]  # type: ignore[arg-type]
    assert (removed == weak) == (method != "random")
    for expert, kept in enumerate(report.plan.keep["up[2]"]):
        assert torch.equal(pruned.up[expert], model.up[expert][:, kept])
        assert torch.equal(pruned.bias[expert], model.bias[expert][:, kept])
        assert torch.equal(pruned.down[expert], model.down[expert][kept])


def test_without_inner_axes_the_choice_is_shared() -> None:
    report = graphprune.report(graphprune.compile(Experts(), 0.2, example_inputs=X))
    assert report.plan.under == {}
    assert all(isinstance(index, int) for index in report.plan.keep["up[2]"])


def test_a_shared_choice_of_a_ragged_axis_is_still_a_plan() -> None:
    pruned = graphprune.compile(Experts(), plan=Plan(0.0, {"up[2]": [1, 4]}, {"up[2]": 10}), example_inputs=X)
    assert pruned.up.shape == (4, 7, 2)


def test_single_query_heads_of_llama(tmp_path: Path) -> None:
    """Other query heads go in every group of a key head; generation, saving and replaying are as ever."""
    model = llama()
    program = analyse(model)
    under: dict[str, str] = program.need("ragged")
    first, second = under
    keep: dict[str, Any] = {first: [[0, 2], [1, 2]], second: [[1], [0]]}
    plan = Plan(0.0, keep, {first: 3, second: 3}, under=dict(under))
    pruned = graphprune.compile(model, plan=Plan.from_json(plan.to_json()))
    assert graphprune.report(pruned).plan == plan
    for i, heads in enumerate(([0, 2, 4, 5], [1, 3])):
        before, after = model.model.layers[i].self_attn, pruned.model.layers[i].self_attn
        rows = torch.cat([torch.arange(8 * head, 8 * head + 8) for head in heads])
        assert torch.equal(after.q_proj.weight, before.q_proj.weight[rows])
        assert torch.equal(after.o_proj.weight, before.o_proj.weight[:, rows])
        assert torch.equal(after.k_proj.weight, before.k_proj.weight)
        assert after.num_key_value_groups == len(heads) // 2

    ids = torch.randint(3, 200, (2, 7))
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    cached = pruned.generate(ids, use_cache=True, **options)
    assert cached.shape == (2, 15)
    assert torch.equal(cached, pruned.generate(ids, use_cache=False, **options))

    graphprune.save(pruned, tmp_path / "saved")
    loaded = graphprune.load(tmp_path / "saved")
    assert graphprune.report(loaded).plan == plan
    assert graphprune.report(loaded).widths == {first: (3, 2), second: (3, 1)}
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, pruned(ids).logits)
    again = graphprune.compile(model, plan=graphprune.report(loaded).plan)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), pruned.parameters(), strict=True))


def test_a_plan_for_other_outer_axes_is_refused() -> None:
    good = {"keep": {"up[2]": [[1]] * 4}, "sizes": {"up[2]": 10}, "under": {"up[2]": "up[0]"}}
    for change, problem in (
        ({"under": {"up[2]": "router.weight[0]"}}, "choices under 'up\\[0\\]'"),
        ({"keep": {"up[2]": [[1]] * 3}}, "has 3 choices of 'up\\[2\\]', but 'up\\[0\\]' has 4 indices"),
    ):
        with pytest.raises(GraphPruneError, match=problem):
            graphprune.compile(Experts(), plan=Plan(0.0, **{**good, **change}), example_inputs=X)  # type: ignore[arg-type]


def test_inspect_says_what_is_ragged() -> None:
    text = str(look(Experts(), X))
    assert "up[2]  size 10 in each of 4" in text
    assert "in each of" not in str(graphprune.inspect(Experts(), example_inputs=X))
