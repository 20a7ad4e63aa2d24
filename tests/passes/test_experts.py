"""``experts=True``: whole experts of a mixture go, and the router never chooses a removed one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (registers its operators)
from helpers import analyse, check_every_axis, plan_removing, quick, randomise, snapshot
from test_architectures import _hf as hf
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError
from graphprune.ir.plan import Plan
from graphprune.passes import restrict
from graphprune.rules import linear
from graphprune.rules.registry import Rule

aten = torch.ops.aten
INFER = importlib.import_module("graphprune.passes.infer_axes")  # the name in the package may be the pass
X = torch.randn(11, 5, generator=torch.Generator().manual_seed(7)).double()
EXPERTS = "up[0]"
EXPERTS_OF = "experts.gate_up_proj[0]"
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 211,
}
LATENT: dict[str, Any] = {
    **TINY,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


class Mixture(nn.Module):
    """``route`` turns the logits of 6 experts into ids ``(tokens, 2)`` and weights; experts are looked up."""

    def __init__(self, route: Callable[[Any, Tensor], tuple[Tensor, Tensor]]):
        super().__init__()
        self.count = 6
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.router = nn.Linear(8, 6)
        self.up, self.down = nn.Parameter(torch.randn(6, 7, 8)), nn.Parameter(torch.randn(6, 8, 7))
        self.route = route

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        ids, weights = self.route(self, self.router(x))
        return self.head(self.mixed(x, ids, weights))

    def mixed(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tokens, chosen = ids.shape
        rows = x.repeat_interleave(chosen, 0).unsqueeze(-1)
        flat = ids.reshape(-1)
        out = torch.bmm(self.down[flat], torch.bmm(self.up[flat], rows).relu()).squeeze(-1)
        return (out.unflatten(0, (tokens, chosen)) * weights.unsqueeze(-1)).sum(1)


def mixture(route: Callable[[Any, Tensor], tuple[Tensor, Tensor]], cls: type[Mixture] = Mixture) -> Mixture:
    torch.manual_seed(0)
    return randomise(cls(route)).double().eval()  # type: ignore[return-value]


def top2(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).topk(2, -1)
    return ids, weights / weights.sum(-1, keepdim=True)


def unlocked(model: nn.Module, inputs: Any = None, **options: Any) -> set[str]:
    """The axes that are prunable with ``experts`` only."""
    with_it = graphprune.inspect(model, example_inputs=inputs, experts=True, **options)
    without = graphprune.inspect(model, example_inputs=inputs, **options)
    return {group.name for group in with_it.prunable} - {group.name for group in without.prunable}


# --- what is computed ---


@torch.no_grad()
def test_against_a_reference_written_by_hand() -> None:
    """Token by token, with the removed experts out of the softmax: nothing of the compiler is used to say so."""
    model = mixture(top2)
    kept = [0, 2, 3, 5]
    pruned = graphprune.compile(model, plan=plan_removing({EXPERTS: (6, [1, 4])}, experts=True), example_inputs=X)
    assert pruned.up.shape == (4, 7, 8)
    expected, changed = [], 0
    for x in model.stem(X):
        logits = model.router(x)
        changed += bool({1, 4} & set(logits.topk(2)[1].tolist()))
        chances = {e: float(torch.exp(logits[e])) for e in kept}
        best = sorted(kept, key=lambda e: -chances[e])[:2]
        total = sum(chances[e] for e in best)
        parts = [chances[e] / total * (model.down[e] @ (model.up[e] @ x).relu()) for e in best]
        expected.append(model.head(parts[0] + parts[1]))
    torch.testing.assert_close(pruned(X), torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert changed > 2  # or nothing was removed that any token goes to


def dense_weights(m: Any, logits: Tensor) -> Tensor:
    weights, ids = logits.sigmoid().topk(2, -1)
    return torch.zeros_like(logits).scatter(1, ids, weights)


def dense_one_hot(m: Any, logits: Tensor) -> Tensor:
    ids = logits.topk(3, -1)[1]
    return (F.one_hot(ids, m.count).to(logits.dtype) * 0.5).sum(1)


def dense_softmax(m: Any, logits: Tensor) -> Tensor:
    return F.one_hot(logits.argmax(-1), m.count).to(logits.dtype) * logits.softmax(-1)


class Dense(Mixture):
    """Every expert runs on every token; ``route`` gives weights ``(tokens, experts)``, zero where not chosen."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        weights = self.route(self, self.router(x))
        hidden = torch.einsum("td,ehd->teh", x, self.up).relu()
        return self.head(torch.einsum("teh,edh,te->td", hidden, self.down, weights))  # type: ignore[arg-type]


class Gathered(Mixture):
    """Sorted by expert, counted, and run as a grouped product, as MoE kernels want it."""

    def mixed(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tokens, chosen = ids.shape
        flat, order = ids.reshape(-1).sort()
        rows = x[order // chosen]
        counts = torch.histc(flat.float(), bins=self.count, min=0, max=self.count - 1)
        ends = counts.cumsum(0).to(torch.int32)
        hidden = torch.ops.transformers.grouped_mm_fallback(rows, self.up.transpose(1, 2), ends).relu()
        out = torch.ops.transformers.grouped_mm_fallback(hidden, self.down.transpose(1, 2), ends)
        out = out * weights.reshape(-1)[order].unsqueeze(-1)
        return out[order.argsort()].unflatten(0, (tokens, chosen)).sum(1)


def top1(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.argmax(-1, keepdim=True), logits.new_ones(logits.shape[0], 1)


def largest(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).max(-1)
    return ids.unsqueeze(-1), weights.unsqueeze(-1)


def gathered(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    ids = (scores + m.router.bias).topk(2, -1, sorted=False)[1]
    return ids, scores.gather(1, ids)


def softmax_of_chosen(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    best, ids = torch.topk(logits, k=2, dim=-1)
    return ids.to(torch.int32).long(), best.softmax(-1)


def smallest(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    best, ids = logits.t().topk(2, 0, largest=False)
    return ids.t(), best.t()


def bias_by_embedding(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = top2(m, logits)
    return ids, weights + F.embedding(ids, m.up.sum(-1)).sum(-1)


ROUTES: dict[str, tuple[Callable, type[Mixture]]] = {
    **{f.__name__: (f, Mixture) for f in (top1, top2, largest, gathered, softmax_of_chosen, smallest)},
    "bias_by_embedding": (bias_by_embedding, Mixture),
    **{f.__name__: (f, Dense) for f in (dense_weights, dense_one_hot, dense_softmax)},
    "grouped": (top2, Gathered),
}


@pytest.mark.parametrize("name", ROUTES)
def test_route(name: str) -> None:
    model = mixture(*ROUTES[name])
    assert unlocked(model, X) == {EXPERTS}
    assert EXPERTS in check_every_axis(model, X, experts=True)


class InGroups(nn.Module):
    """The best 2 of 4 groups of 3, then the best 3 experts of those."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.count = 4, 12
        self.stem, self.router, self.head = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(8, 3)
        self.table = nn.Parameter(torch.randn(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        scores = self.router(x).sigmoid()
        by_group = scores.view(-1, self.groups, self.count // self.groups).topk(2, -1)[0].sum(-1)
        chosen = torch.zeros_like(by_group).scatter(1, by_group.topk(2, -1)[1], 1)
        mask = chosen.unsqueeze(-1).expand(-1, self.groups, self.count // self.groups).reshape(-1, self.count)
        ids = scores.masked_fill(mask == 0, float("-inf")).topk(3, -1)[1]
        return self.head(((x.unsqueeze(1) + self.table[ids]).tanh() * scores.gather(1, ids).unsqueeze(-1)).sum(1))


def test_experts_in_groups_go_by_groups() -> None:
    torch.manual_seed(0)
    model = randomise(InGroups()).double().eval()
    assert unlocked(model, X, inner_axes=True) == {"table[0].0"}
    found = graphprune.inspect(model, example_inputs=X, experts=True)
    assert "experts of a group" in found.skipped["table[0].1"]
    (group,) = [group for group in found.prunable if group.name == "table[0].0"]
    assert (group.size, group.minimum) == (4, 2)
    check_every_axis(model, X, experts=True)
    pruned = graphprune.compile(model, plan=plan_removing({group.name: (4, [1])}, experts=True), example_inputs=X)
    assert (pruned.groups, pruned.count) == (3, 9)


# --- what stays pinned ---


def values_only(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest features, whichever they are."""
    return by_token(m, logits)[0], logits.topk(2)[0][:, :1]


def by_token(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """A hash of the token, no choice of the router."""
    ids = (logits.sum(-1, keepdim=True) * 1000).long() % 6
    return ids, logits.sum(-1, keepdim=True)


def shifted(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = top2(m, logits)
    return (ids + 1) % 6, weights


def compared(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = top2(m, logits)
    return ids, weights * (ids > 2)


def changed_in_place(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = top2(m, logits)
    ids[:, 0] = 0
    return ids, weights


def other_table(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = top2(m, logits)
    return ids, weights * torch.arange(6).to(weights.dtype)[ids]


def longer_table(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = top2(m, logits)
    return ids, weights * F.one_hot(ids, m.count + 1)[..., :-1].sum(-1)


def sorted_whole(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.sort(-1)
    return ids[:, :2], weights[:, :2]


def of_everything(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = top2(m, logits)
    return ids, weights * logits.argmax() * logits.log_softmax(-1).gather(1, ids)


class Fixed(Gathered):
    """Grouped rows that are no running sum of how many chose an expert."""

    def __init__(self, route: Callable):
        super().__init__(route)
        self.register_buffer("ends", torch.tensor([2, 4, 6, 8, 10, 11], dtype=torch.int32))

    def mixed(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = torch.ops.transformers.grouped_mm_fallback(x, self.up.transpose(1, 2), self.ends)
        out = torch.ops.transformers.grouped_mm_fallback(rows, self.down.transpose(1, 2), self.ends)
        return out * self.up.sum(-1).sum(-1)[ids].sum(-1, keepdim=True) * weights.sum(-1, keepdim=True)


class Returned(Mixture):
    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        ids, weights = self.route(self, self.router(x))
        return self.head(self.mixed(x, ids, weights)), ids


PINNED: dict[str, tuple[Callable, type[Mixture], str]] = {
    "by_token": (by_token, Mixture, "looked up by index"),
    "values_only": (values_only, Mixture, "sorted"),
    "shifted": (shifted, Mixture, "used as numbers by aten.add"),
    "compared": (compared, Mixture, "used as numbers by aten.gt"),
    "changed_in_place": (changed_in_place, Mixture, "used as numbers by aten"),
    "other_table": (other_table, Mixture, "a constant computed inside forward"),
    "longer_table": (longer_table, Mixture, "one-hot classes"),
    "sorted_whole": (sorted_whole, Mixture, "looked up by index"),
    "of_everything": (of_everything, Mixture, "its largest or smallest is taken"),
    "fixed": (top2, Fixed, "experts that rows belong to"),
    "returned": (top2, Returned, "its indices are a model output"),
}


@pytest.mark.parametrize("name", PINNED)
def test_stays_pinned(name: str) -> None:
    route, cls, why = PINNED[name]
    model = mixture(route, cls)
    assert unlocked(model, X, inner_axes=True) == set()
    groups = analyse(model, X, experts=True).groups
    pins = {pin for group in groups if group.name in (EXPERTS, "router.weight[0]") for pin in group.pins}
    assert any(why in pin for pin in pins), pins


def test_a_count_that_cannot_follow_pins() -> None:
    model = mixture(dense_one_hot, Dense)
    model.route = lambda m, logits: F.one_hot(logits.argmax(-1), 6).to(logits.dtype)
    assert unlocked(model, X) == set()
    assert "the number 6" in graphprune.inspect(model, example_inputs=X, experts=True).skipped[EXPERTS]


def test_axes_that_no_router_chooses_from_are_as_before() -> None:
    """Softmax, running sums and lookups of features: nothing becomes free that was not."""

    def body(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        return top1(m, logits)[0], logits.softmax(-1).cumsum(-1).sum(-1, keepdim=True)

    class Features(Mixture):
        def forward(self, x: Tensor) -> Any:
            return self.head(self.stem(x).softmax(-1).cumsum(-1) * self.router(self.stem(x)).softmax(-1).amax())

    assert unlocked(mixture(top2, Features), X) == set()
    # A running sum along the experts only loses the removed terms.
    check_every_axis(mixture(body), X, experts=True)


def test_no_axis_is_ragged_because_of_it() -> None:
    """Softmax over the heads mixes them: their channels cannot be other ones in every head."""

    class Heads(Mixture):
        def forward(self, x: Tensor) -> Any:
            return self.head(self.stem(x).unflatten(-1, (2, -1)).softmax(1).flatten(1))

    found = graphprune.inspect(mixture(top2, Heads), example_inputs=X, inner_axes=True, experts=True)
    assert "stem.weight[0].1" in {group.name for group in found.prunable}
    assert found.ragged == {}


def test_without_experts_nothing_changes() -> None:
    model = mixture(top2)
    inspection = graphprune.inspect(model, example_inputs=X)
    assert "looked up by index" in inspection.skipped[EXPERTS]
    facts = inspection.program.need("axes").facts
    assert facts.statistics == facts.selections.pins == facts.selections.ranked == []
    plan = graphprune.report(graphprune.compile(model, 0.2, method="magnitude", example_inputs=X)).plan
    assert '"experts"' not in plan.to_json()
    with pytest.raises(GraphPruneError, match="which is pinned here"):
        graphprune.compile(model, plan=plan_removing({EXPERTS: (6, [1])}), example_inputs=X)


# --- real architectures ---

MIXTURES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mixtral": (
        hf("MixtralForCausalLM", "MixtralConfig", num_local_experts=6, num_experts_per_tok=2, **TINY),
        "gate.weight[0]",
    ),
    "qwen2_moe": (
        hf(
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=20,
            **TINY,
        ),
        "gate.weight[0]",
    ),
    "qwen3_moe": (
        hf(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            head_dim=8,
            **TINY,
        ),
        "experts.gate_up_proj[0]",
    ),
    "olmoe": (
        hf("OlmoeForCausalLM", "OlmoeConfig", num_experts=6, num_experts_per_tok=2, **TINY),
        "gate.weight[0]",
    ),
    "deepseek_v3": (hf("DeepseekV3ForCausalLM", "DeepseekV3Config", n_group=1, topk_group=1, **LATENT), EXPERTS_OF),
    "deepseek_v3_in_groups": (
        hf("DeepseekV3ForCausalLM", "DeepseekV3Config", n_group=4, topk_group=2, **LATENT),
        EXPERTS_OF + ".0",
    ),
}


def mixture_of(name: str, implementation: str = "grouped_mm") -> nn.Module:
    torch.manual_seed(0)
    model = randomise(MIXTURES[name][0]()).eval()
    model.set_experts_implementation(implementation)
    return model


@pytest.mark.parametrize(
    ("name", "implementation"),
    quick(
        [(name, how) for name in MIXTURES for how in ("grouped_mm", "batched_mm")],
        {
            ("mixtral", "grouped_mm"),
            ("mixtral", "batched_mm"),
            ("qwen3_moe", "grouped_mm"),
            ("deepseek_v3_in_groups", "grouped_mm"),
        },
    ),
)
def test_every_axis(name: str, implementation: str) -> None:
    model = mixture_of(name, implementation)
    found = unlocked(model)
    assert found == {f"model.layers.{i}.mlp.{MIXTURES[name][1]}" for i in range(2)}
    if implementation == "grouped_mm":
        assert found <= set(check_every_axis(model, experts=True))
    else:  # what else there is to prune does not depend on it
        plan = plan_removing({axis: (len_of(model, axis), [1]) for axis in found}, experts=True)
        error = graphprune.report(graphprune.compile(model, plan=plan)).oracle_error
        assert error is not None
        assert error <= 1e-4


def len_of(model: nn.Module, axis: str) -> int:
    return next(g.size for g in graphprune.inspect(model, experts=True).groups if g.name == axis)


@pytest.mark.parametrize("name", quick(MIXTURES, {"mixtral", "deepseek_v3_in_groups"}))
def test_compile_save_load_generate(name: str, tmp_path: Any) -> None:
    model = mixture_of(name)
    unchanged = snapshot(model)
    pruned = graphprune.compile(model, 0.12, method="magnitude", experts=True, include="*.mlp*")
    unchanged()
    report = graphprune.report(pruned)
    experts = pruned.model.layers[0].mlp.experts
    before, after = report.widths[f"model.layers.0.mlp.{MIXTURES[name][1]}"]
    assert after < before
    assert experts.gate_up_proj.shape[0] == experts.num_experts == len(pruned.model.layers[0].mlp.gate.weight)
    assert report.plan.experts

    graphprune.save(pruned, tmp_path / "saved")
    loaded = graphprune.load(tmp_path / "saved")
    ids = torch.randint(3, 200, (2, 7))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, pruned(input_ids=ids).logits)
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    cached = loaded.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, loaded.generate(ids, use_cache=False, **options))


@torch.no_grad()
def test_a_router_that_never_chooses_them_says_the_same() -> None:
    """Mixtral with its own code and all of its weights, but for a router that knows of the removed experts."""
    model = mixture_of("mixtral", "batched_mm").double()
    gone = {f"model.layers.{i}.mlp.gate.weight[0]": (6, [i, 4]) for i in range(2)}
    pruned = graphprune.compile(model, plan=plan_removing(gone, experts=True))
    ids = torch.randint(3, 200, (3, 9))
    dense = model(input_ids=ids).logits
    for i, layer in enumerate(model.model.layers):

        def route(x: Tensor, weight: Tensor = layer.mlp.gate.weight, removed: tuple = (i, 4)) -> tuple:
            logits = x.reshape(-1, x.shape[-1]) @ weight.T
            logits[:, removed] = float("-inf")
            scores, chosen = logits.softmax(-1).topk(2, -1)
            return logits, scores / scores.sum(-1, keepdim=True), chosen

        layer.mlp.gate.forward = route
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(pruned(input_ids=ids).logits, expected, rtol=0, atol=1e-5)  # it routes in float32
    assert float((dense - expected).abs().max()) > 0.01


# --- the pipeline around it ---


def test_the_plan_remembers() -> None:
    model = mixture(top2)
    pruned = graphprune.compile(model, 0.4, method="magnitude", example_inputs=X, experts=True)
    plan = Plan.from_json(graphprune.report(pruned).plan.to_json())
    assert plan.experts
    assert EXPERTS in plan.keep
    assert torch.equal(graphprune.compile(model, plan=plan, example_inputs=X)(X), pruned(X))


def test_as_many_stay_as_the_router_chooses() -> None:
    model = mixture(top2)
    # As far as it goes, which is said when more is asked for.
    with pytest.raises(GraphPruneError, match=r"(\d\.\d+) is as far as it goes") as caught:
        graphprune.compile(model, 0.99, method="magnitude", example_inputs=X, experts=True, include="")
    reach = float(str(caught.value).split("reached: ")[1].split()[0]) - 1e-4
    report = graphprune.report(graphprune.compile(model, reach, example_inputs=X, experts=True, include=""))
    assert report.widths[EXPERTS] == (6, 2)
    with pytest.raises(GraphPruneError, match=r"leaves 1 of 'up\[0\]', of which at least 2 must stay"):
        graphprune.compile(model, plan=plan_removing({EXPERTS: (6, [0, 1, 2, 3, 4])}, experts=True), example_inputs=X)


def test_nothing_to_spare() -> None:
    def all_of_them(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(reversed(logits.softmax(-1).topk(6, -1)))  # type: ignore[return-value]

    found = graphprune.inspect(mixture(all_of_them), example_inputs=X, experts=True)
    assert found.skipped[EXPERTS] == "at least 6 of its indices must stay"


def test_in_place() -> None:
    expected = graphprune.compile(mixture_of("mixtral"), 0.2, method="magnitude", experts=True)
    model = mixture_of("mixtral")
    assert graphprune.compile(model, 0.2, method="magnitude", experts=True, inplace=True) is model
    ids = torch.randint(3, 200, (2, 7))
    assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert "model.layers.0.mlp.gate.weight[0]" in graphprune.report(model).widths


# --- the oracle catches lies ---


def test_a_lookup_that_is_none_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids from elsewhere taken for the choice of the router."""

    def anything(self: Rule, axis: Any, indices: Any, reason: str = "") -> None:
        routed = self._facts.selections.ranked[0][0]
        self.selected(axis, reason)
        self.same(axis, routed)
        self._facts.selections.looked_up.append(routed)

    def route(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids = (logits.sum(-1, keepdim=True) * 1000).long() % 4
        return ids, top2(m, logits)[1].sum(-1, keepdim=True)

    model = mixture(route)
    monkeypatch.setattr(Rule, "looked_up", anything)
    with pytest.raises(GraphPruneError, match="does not compute what"):
        graphprune.compile(model, plan=plan_removing({EXPERTS: (6, [1, 5])}, experts=True), example_inputs=X)


def test_a_softmax_over_everything_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router's softmax at full size: its weights are others, as they are not scaled to a sum of one."""

    def route(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = logits.softmax(-1).topk(2, -1)
        return ids, weights

    model = mixture(route)
    monkeypatch.setattr(Rule, "among_kept", lambda self, axis, reason: self.selected(axis, reason))
    with pytest.raises(GraphPruneError, match="does not compute what"):
        graphprune.compile(model, plan=plan_removing({EXPERTS: (6, [1, 4])}, experts=True), example_inputs=X)


def test_rows_of_nobody_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed rows per expert taken for running sums of how many chose each."""
    model = mixture(top2, Fixed)
    monkeypatch.setattr(Rule, "running_sum_of", lambda self, tensor: self._facts.selections.ranked[0][0])
    monkeypatch.setattr(linear, "find", lambda axis: None)
    plan = plan_removing({EXPERTS: (6, [1, 4])}, experts=True)
    with pytest.raises(GraphPruneError, match="does not compute what"):
        graphprune.compile(model, plan=plan, example_inputs=X)


def test_numbers_taken_for_indices_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison that nobody reports."""
    model = mixture(compared)
    monkeypatch.setattr(INFER, "follow_indices", blind(INFER.follow_indices))
    with pytest.raises(GraphPruneError, match="does not compute what"):
        graphprune.compile(model, plan=plan_removing({EXPERTS: (6, [1, 2])}, experts=True), example_inputs=X)


def blind(follow: Callable) -> Callable:
    """``follow_indices`` that notes what it finds and keeps quiet about the rest."""

    def follow_indices(*given: Any) -> list:
        list(follow(*given))
        return []

    return follow_indices


def test_an_operator_that_the_oracle_cannot_restrict_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(restrict.RESTRICTED, aten.topk)
    plan = plan_removing({EXPERTS: (6, [1])}, experts=True)
    with pytest.raises(GraphPruneError, match="does not know how to take over a part"):
        graphprune.compile(mixture(top2), plan=plan, example_inputs=X)
