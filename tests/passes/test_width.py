"""``width=True``: norms and means over what is kept, so that the residual width can be pruned."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import X, analyse, check_every_axis, numel, plan_removing, quick, randomise, snapshot, toy
from test_architectures import CAUSAL, OTHERS, build, example
from test_architectures import _hf as hf
from torch import nn

import graphprune
from graphprune import GraphPruneError
from graphprune.ir.plan import Plan
from graphprune.passes import restrict
from graphprune.passes.budget import ParameterCounter
from graphprune.rules import registry

aten = torch.ops.aten
MORE: dict[str, Callable[[], nn.Module]] = {
    "bert_sequence_classification": hf(
        "BertForSequenceClassification",
        "BertConfig",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=211,
    ),
    "convnext": hf(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 1, 1, 1],
        image_size=64,
    ),
    "gemma2": hf(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=211,
    ),
}
NAMES = [name for name in (*CAUSAL, *OTHERS, *MORE) if name not in ("t5", "convnet")]


def made(name: str) -> nn.Module:
    if name not in MORE:
        return build(name)
    torch.manual_seed(0)
    return randomise(MORE[name]()).eval()


def unlocked(model: nn.Module, inputs: Any = None, **options: Any) -> set[str]:
    """The axes that are prunable with ``width`` only."""
    with_it = graphprune.inspect(model, example_inputs=inputs, width=True, **options)
    without = graphprune.inspect(model, example_inputs=inputs, **options)
    return {group.name for group in with_it.prunable} - {group.name for group in without.prunable}


@cache
def unlocked_in(name: str) -> frozenset[str]:
    return frozenset(unlocked(made(name), example(name)))


class Layer(nn.Module):
    """``stem → body → head``, with ``body`` a function of the module and a tensor of 16 channels at the end."""

    def __init__(self, body: Callable[[Any, torch.Tensor], torch.Tensor], **parts: nn.Module):
        super().__init__()
        self.stem, self.head = nn.Linear(7, 16), nn.Linear(16, 9)
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self, self.stem(x)))


def layer(body: Callable[[Any, torch.Tensor], torch.Tensor], **parts: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Layer(body, **parts)).double().eval()


X64 = X.double()
WIDTH = "stem.weight[0]"


# --- real architectures ---


FEW = {"gpt2", "falcon_multi_query", "gemma3", "llama_tied", "bert", "convnext"}


@pytest.mark.parametrize("name", quick(NAMES, FEW), ids=str)
def test_every_axis(name: str) -> None:
    model, inputs = made(name), example(name)
    found = unlocked_in(name)
    # The residual stream of a transformer is one axis; a pyramid of convolutions has one per stage.
    assert len(found) == (4 if name == "convnext" else 1)
    pruned = check_every_axis(model, inputs, width=True)
    assert found <= set(pruned)


@pytest.mark.parametrize("name", quick(CAUSAL, {"gpt2", "gemma3", "llama_tied"}), ids=str)
def test_compile_save_load_generate(name: str, tmp_path: Any) -> None:
    model = build(name)
    unchanged = snapshot(model)
    pruned = graphprune.compile(model, 0.25, method="magnitude", width=True)
    unchanged()
    report = graphprune.report(pruned)
    (width,) = unlocked_in(name)
    assert report.widths[width][1] < report.widths[width][0] == 64
    assert report.oracle_error is not None
    assert report.oracle_error <= 1e-4
    assert report.ratio == pytest.approx(0.25, abs=0.003)
    assert pruned.get_input_embeddings().embedding_dim == report.widths[width][1]

    graphprune.save(pruned, tmp_path / "saved")
    loaded = graphprune.load(tmp_path / "saved")
    ids = torch.randint(3, 200, (2, 7))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, pruned(input_ids=ids).logits)
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    cached = loaded.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, loaded.generate(ids, use_cache=False, **options))


class HeadNorm(nn.Module):
    """Attention with a norm over the width of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.stem, self.head = nn.Linear(7, 24), nn.Linear(24, 5)
        self.q, self.k, self.v = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.q_norm, self.k_norm = nn.RMSNorm(6), nn.RMSNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.head(((self.q_norm(q) @ self.k_norm(k).mT) * 0.3).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


def test_normalised_heads_are_inner_axes() -> None:
    """A norm over the width of a head is lifted as well, but only ``inner_axes`` asks for that axis."""
    torch.manual_seed(0)
    model = randomise(HeadNorm()).double().eval()
    assert unlocked(model, X64) == set()
    assert unlocked(model, X64, inner_axes=True) == {"q.weight[0].1"}
    assert "q.weight[0].1" in check_every_axis(model, X64, width=True)


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**inputs).logits


def test_a_width_that_is_returned_stays() -> None:
    """An encoder-decoder returns the last state of its encoder; without that output the width is free."""
    model = build("t5")
    assert unlocked(model) == set()
    assert graphprune.inspect(model, width=True).skipped["shared.weight[1]"] == "pinned: model output"
    ids = torch.randint(3, 200, (3, 7))
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    assert "model.shared.weight[1]" in check_every_axis(Logits(model), inputs, width=True)


@pytest.mark.parametrize("model", ["BertModel", "LlamaModel"])
def test_a_model_without_a_head_keeps_its_width(model: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = getattr(transformers, model.replace("Model", "Config"))(vocab_size=99, **sizes)
    assert unlocked(getattr(transformers, model)(config)) == set()


# --- what is computed ---


@torch.no_grad()
def test_against_a_reference_written_by_hand() -> None:
    """LayerNorm over what is kept, then the kept columns of the head: nothing of the compiler is used to say so."""
    model = layer(lambda m, x: m.norm(x), norm=nn.LayerNorm(16))
    kept = [i for i in range(16) if i not in (2, 3, 11)]
    plan = Plan(0.0, {WIDTH: kept}, {WIDTH: 16}, width=True)
    pruned = graphprune.compile(model, plan=plan, example_inputs=X64)
    x = (X64 @ model.stem.weight.T + model.stem.bias)[..., kept]
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = x * model.norm.weight[kept] + model.norm.bias[kept]
    expected = x @ model.head.weight[:, kept].T + model.head.bias
    torch.testing.assert_close(pruned(X64), expected, rtol=1e-12, atol=1e-12)
    assert pruned.norm.normalized_shape == (13,)
    assert float((model(X64) - expected).abs().max()) > 0.01  # the statistics of all 16 are others


def _rms(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


STATISTICS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "decomposed rms": _rms,
    "var of a dim": lambda m, x: x / (x.var(-1, False, True) + 1e-6).sqrt(),
    "var with correction": lambda m, x: x / (x.var(-1, correction=2, keepdim=True) + 1e-6).sqrt(),
    "std of everything in a row": lambda m, x: x / (1 + x.std((-1,), keepdim=True)),
    "var_mean": lambda m, x: (x - torch.var_mean(x, -1, keepdim=True)[1]) / torch.var_mean(x, -1, keepdim=True)[0],
    "std_mean": lambda m, x: (x - torch.std_mean(x, -1, keepdim=True)[1]) / torch.std_mean(x, -1, keepdim=True)[0],
    "mean without keepdim": lambda m, x: x - x.mean(2).unsqueeze(-1),
    "nanmean": lambda m, x: x - x.nanmean(-1, keepdim=True),
    "vector norm": lambda m, x: x / torch.linalg.vector_norm(x, 3, -1, keepdim=True),
    "norm": lambda m, x: x / x.norm(2, -1, True),
    "normalize": lambda m, x: F.normalize(x, dim=-1),
    "normalize in the middle": lambda m, x: F.normalize(x.transpose(1, 2).unsqueeze(-1), dim=1)[..., 0].transpose(1, 2),
    "layer_norm without weights": lambda m, x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm without weights": lambda m, x: F.rms_norm(x, x.shape[-1:]),
    "group_norm of one group": lambda m, x: F.group_norm(x.transpose(1, 2), 1).transpose(1, 2),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistic(name: str) -> None:
    model = layer(STATISTICS[name])
    assert unlocked(model, X64) == {WIDTH}
    assert check_every_axis(model, X64, width=True) == [WIDTH]


@pytest.mark.parametrize(
    "part", [nn.LayerNorm(16), nn.RMSNorm(16), nn.LayerNorm(16, bias=False), nn.LayerNorm(16, elementwise_affine=False)]
)
def test_norm_module(part: nn.Module) -> None:
    model = layer(lambda m, x: m.norm(x), norm=part)
    assert unlocked(model, X64) == {WIDTH}
    assert check_every_axis(model, X64, width=True) == [WIDTH]


class Images(nn.Module):
    """Convolutions with norms over channels: over all dimensions, channels last, and in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.whole = nn.LayerNorm((12, 6, 6))
        self.last = nn.LayerNorm(12)
        self.groups = nn.GroupNorm(4, 12)
        self.body = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.whole(self.stem(x))
        x = x + self.body(self.groups(x))
        return self.head(self.last(x.permute(0, 2, 3, 1)).mean((1, 2)))


def test_images() -> None:
    """Groups of a group norm go whole as they did; the channels of every group are an inner axis of the width."""
    torch.manual_seed(0)
    model = randomise(Images()).double().eval()
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    assert unlocked(model, x) == {"stem.weight[0].0"}
    assert check_every_axis(model, x, width=True) == ["stem.weight[0].0", "stem.weight[0].1"]


def test_mean_over_a_product_keeps_what_is_kept() -> None:
    """Heads joined to a width and normalised: removing a head removes its share of the statistic."""
    model = layer(lambda m, x: _rms(m, x.unflatten(-1, (m.heads, -1)).flatten(2)))
    model.heads = 4
    assert check_every_axis(model, X64, width=True) == ["stem.weight[0].0", "stem.weight[0].1"]


def test_all_of_it_lines_up_with_other_axes() -> None:
    model = toy()
    assert unlocked(model, X) == {WIDTH}
    found = check_every_axis(model, X, width=True)
    assert WIDTH in found
    assert len(found) > 5


# --- what stays pinned ---


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda m, x: x.softmax(-1), "softmax"),
        (lambda m, x: x - x.amax(-1, keepdim=True), "largest"),
        (lambda m, x: x - x.logsumexp(-1, keepdim=True), "largest"),
        (lambda m, x: x.cumsum(-1), "accumulated"),
        (lambda m, x: x.sort(-1)[0], "sorted"),
        (lambda m, x: _rms(m, x) * x.shape[-1] ** -0.5, "enters the computation"),
        (lambda m, x: _rms(m, x.expand(3, 5, m.size)) / m.size, "cannot follow"),
        (lambda m, x: _rms(m, x.expand(3, 5, m.size)) / math.sqrt(m.size), "enters the computation"),
    ],
)
def test_stays_pinned(body: Callable[[Any, torch.Tensor], torch.Tensor], why: str) -> None:
    model = layer(body)
    model.size = 16
    assert unlocked(model, X64) == set()
    assert why in graphprune.inspect(model, example_inputs=X64, width=True).skipped[WIDTH]


def test_without_width_nothing_changes() -> None:
    model = toy()
    inspection = graphprune.inspect(model, example_inputs=X)
    assert "normalised" in inspection.skipped[WIDTH]
    assert inspection.program.need("axes").facts.statistics == []
    plan = graphprune.report(graphprune.compile(model, 0.3, method="magnitude", example_inputs=X)).plan
    assert WIDTH not in plan.keep
    assert "width" not in plan.to_json()
    with pytest.raises(GraphPruneError, match="pinned here: normalised"):
        graphprune.compile(model, plan=plan_removing({WIDTH: (32, [1])}), example_inputs=X)


# --- the pipeline around it ---


def test_the_plan_remembers() -> None:
    model = toy()
    pruned = graphprune.compile(model, 0.3, method="magnitude", example_inputs=X, width=True)
    plan = Plan.from_json(graphprune.report(pruned).plan.to_json())
    assert plan.width
    again = graphprune.compile(model, plan=plan, example_inputs=X)
    assert torch.equal(again(X), pruned(X))


def test_ratio_is_reached_to_within_one_structure() -> None:
    """Nothing more fits: every next structure costs more than what is missing."""
    model = toy()
    for ratio in (0.1, 0.35, 0.6):
        report = graphprune.report(graphprune.compile(model, ratio, method="magnitude", example_inputs=X, width=True))
        counter = ParameterCounter(analyse(model, X, inner_axes=False, width=True))
        removed = {name: before - after for name, (before, after) in report.widths.items()}
        missing = ratio * counter.total - (counter.total - counter.count(removed))
        assert missing >= 0
        left = {group for group in counter.names.values() if group not in report.widths or report.widths[group][1] > 1}
        assert missing < min(counter.cost({name: 1}, removed) for name in left)
        assert report.ratio <= ratio


def test_round_to_holds_for_the_width() -> None:
    report = graphprune.report(
        graphprune.compile(toy(), 0.5, method="magnitude", example_inputs=X, width=True, round_to=8)
    )
    before, after = report.widths[WIDTH]
    assert before == 32
    assert after % 8 == 0


def test_exclude_and_spared_blocks_hold_the_width() -> None:
    """The width crosses every block, so sparing one spares the width."""
    for options in ({"exclude": "head"}, {"skip_first": 1}):
        report = graphprune.report(
            graphprune.compile(toy(), 0.1, method="magnitude", example_inputs=X, width=True, **options)
        )
        assert WIDTH in report.skipped


def test_in_place() -> None:
    model, twin = build("llama_tied"), build("llama_tied")
    expected = graphprune.compile(twin, 0.3, method="magnitude", width=True)
    assert graphprune.compile(model, 0.3, method="magnitude", width=True, inplace=True) is model
    ids = torch.randint(3, 200, (2, 7))
    assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert numel(model) == numel(expected)
    assert graphprune.report(model).oracle_error <= 1e-4


def test_pruned_twice() -> None:
    once = graphprune.compile(toy(), 0.2, method="magnitude", example_inputs=X, width=True)
    twice = graphprune.compile(once, 0.2, method="magnitude", example_inputs=X, width=True)
    assert twice.stem.out_features < once.stem.out_features < 32


# --- the oracle can fail ---


def _at_full_size(operator: Any, kept: Any, *args: Any, **kwargs: Any) -> Any:
    return operator(*args, **kwargs)


def _one_too_many(operator: Any, kept: Any, *args: Any, **kwargs: Any) -> Any:
    """The statistic over the kept indices and the first that was removed."""
    (dim, indices), *_ = kept.items()
    gone = next(i for i in range(args[0].shape[dim]) if i not in indices.tolist())
    wrong = {dim: torch.tensor(sorted([*indices.tolist(), gone]))}
    return restrict._reduce(operator, wrong, *args, **kwargs)


@pytest.mark.parametrize("lie", [_at_full_size, _one_too_many])
def test_a_statistic_over_the_wrong_indices_is_caught(lie: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama_grouped_query")
    unchanged = snapshot(model)
    monkeypatch.setitem(restrict.RESTRICTED, aten.mean, lie)
    for inplace in (False, True):
        with pytest.raises(GraphPruneError, match="does not compute what the masked original computes"):
            graphprune.compile(model, 0.2, method="magnitude", width=True, inplace=inplace)
        unchanged()
    graphprune.compile(model, 0.2, method="magnitude")  # the width is not pruned here: nothing is restricted


def test_a_norm_whose_weight_nobody_slices_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(r: Any, x: Any, shape: Any, weight: Any, bias: Any, *options: Any) -> Any:
        r.statistic(x[-1], "normalised")
        r.same(x[-1], weight[0])
        r.size(shape[0], x[-1])
        return x

    monkeypatch.setitem(registry._RULES, aten.layer_norm, broken)
    with pytest.raises(GraphPruneError, match="does not run"):
        check_every_axis(layer(lambda m, x: m.norm(x), norm=nn.LayerNorm(16)), X64, width=True)


def test_a_norm_that_its_rule_does_not_declare_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(r: Any, x: Any, shape: Any, weight: Any, bias: Any, *options: Any) -> Any:
        for tensor in (weight, bias):
            r.same(x[-1], tensor[0])
        r.size(shape[0], x[-1])
        return x

    monkeypatch.setitem(registry._RULES, aten.layer_norm, broken)
    with pytest.raises(GraphPruneError, match="does not compute what the masked original computes"):
        check_every_axis(layer(lambda m, x: m.norm(x), norm=nn.LayerNorm(16)), X64, width=True)


def test_only_what_the_oracle_can_restrict_is_a_statistic(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(r: Any, x: Any, *options: Any, **more: Any) -> Any:
        r.statistic(x[-1], "accumulated along it")
        return x

    monkeypatch.setitem(registry._RULES, aten.cumsum, broken)
    with pytest.raises(GraphPruneError, match="does not know how to take"):
        check_every_axis(layer(lambda m, x: x.cumsum(-1)), X64, width=True)


def test_what_still_reads_a_removed_index_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed places of a norm are not made zero in the masked original: a forgotten pin behind it shows."""

    def forgets(r: Any, x: Any, *options: Any, **more: Any) -> Any:
        return (*x[:-1], r.fresh(1))

    monkeypatch.setitem(registry._RULES, aten.amax, forgets)
    model = layer(lambda m, x: (lambda y: y - y.amax(-1, keepdim=True))(F.layer_norm(x, x.shape[-1:])))
    with pytest.raises((GraphPruneError, AssertionError)):
        check_every_axis(model, X64, width=True)
