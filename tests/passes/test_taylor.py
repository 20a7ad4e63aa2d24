"""Taylor scores against brute force: full gradients of every sample by plain autograd, one structure at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from helpers import analyse, quick, randomise, snapshot, toy
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import graphprune
from graphprune import GraphPruneError
from graphprune.ir.axes import expand_mask, find, leaves
from graphprune.ir.program import NodeGroup, Program
from graphprune.passes import run_passes
from graphprune.passes.methods import method_names
from graphprune.passes.score import gradients, score_by
from graphprune.passes.score.gradients import each_gradient

VOCABULARY = 61
IDS = torch.randint(1, VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(1))
IN_BATCHES = [{"input_ids": rows} for rows in IDS.split(2)]
X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))
ORDERS = ("vector", "first", "second", "mixed")
COMBINED: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "max": max,
    "prod": lambda scores: math.prod(scores) ** (1 / len(scores)),
}
Loss = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]  # → the losses of every sample


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 18, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 61}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4, "attention_bias": True}
    return randomise(LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes}))).eval()


def gpt2() -> nn.Module:
    config = GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=VOCABULARY, n_positions=32)
    return randomise(GPT2LMHeadModel(config)).eval()


class ConvNet(nn.Module):
    """Convolutions, one of them in groups, with a norm and a sum of two branches between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.wide = nn.Conv2d(8, 6, 3, bias=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.stem(x)).relu()
        y = y + self.grouped(y)
        return self.head(self.wide(y).relu().sum((2, 3)))


def conv_net() -> nn.Module:
    return randomise(ConvNet()).eval()


def next_token(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = batch["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.stack([cross_entropy(row[:-1], tokens[1:]) for row, tokens in zip(logits, ids, strict=True)])


def along(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**batch)
    output = getattr(output, "logits", output)
    direction = torch.randn(output.shape[1:], generator=torch.Generator().manual_seed(0)).to(output.dtype)
    return (output * direction).flatten(1).sum(1) / math.sqrt(direction.numel())


def by_sample(model: nn.Module, batches: list[dict[str, torch.Tensor]], loss: Loss) -> dict[str, torch.Tensor]:
    """Gradients of every sample's loss, stacked, for every parameter under its first name."""
    parameters = dict(model.named_parameters())
    found: dict[str, list[torch.Tensor]] = {name: [] for name in parameters}
    for batch in batches:
        for one in loss(model, batch):
            given = torch.autograd.grad(one, list(parameters.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(parameters, given, strict=True):
                if gradient is not None:
                    found[name].append(gradient)
    return {name: torch.stack(rows) for name, rows in found.items() if rows}


def importance(order: str, w: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    g, h = samples.mean(0), samples.square().mean(0)
    return {
        "vector": w * g,
        "first": (w * g).abs(),
        "second": (w * w * h).abs(),
        "mixed": (w * g - 0.5 * w * w * h).abs(),
    }[order]


def owned(program: Program, name: str, dim: int, group: NodeGroup, index: int) -> torch.Tensor:
    """Which entries of a parameter index ``index`` of a group owns in one dimension: bool, broadcastable to it."""
    axis = program.need("axes").tensors[name][dim]
    mask = torch.ones(group.size, dtype=torch.bool)
    mask[index] = False
    shape = [-1 if d == dim else 1 for d in range(len(program.need("axes").tensors[name]))]
    return ~expand_mask(axis, {find(group.axis): mask}.get).view(shape)


def slices_of(
    program: Program, order: str, samples: dict[str, torch.Tensor], group: NodeGroup, index: int, outer: int | None
) -> dict[tuple[str, int], float]:
    """Score of every slice of a structure, summed over its entries one structure at a time."""
    parameters = dict(program.model.named_parameters())
    above = None if outer is None else next(g for g in program.need("groups") if g.name == program.ragged[group.name])
    found: dict[tuple[str, int], float] = {}
    for name, dims in program.need("axes").tensors.items():
        for dim, axis in enumerate(dims):
            if name not in samples or find(group.axis) not in leaves(axis):
                continue
            here = owned(program, name, dim, group, index)
            if above is not None:
                beside = next(d for d in (dim, *range(len(dims))) if find(above.axis) in leaves(dims[d]))
                here = here & owned(program, name, beside, above, outer)
            values = importance(order, parameters[name].detach().float(), samples[name])
            found[name, dim] = abs(float(values[here.expand_as(values)].sum(dtype=torch.float64)))
    return found


def scored(model: nn.Module, data: Any, order: str, example: Any = None, **options: Any) -> Program:
    program = analyse(model, example, method=f"taylor-{order}", data=data, **options)
    run_passes(program, (score_by(program.options.method),))
    return program


def check(
    model: nn.Module, data: list[dict[str, torch.Tensor]], loss: Loss, order: str, example: Any = None, **options: Any
) -> list[str]:
    """Every score of every axis against the sum, product or largest of its slices; returns the names of the axes."""
    options = {"aggregation": "sum", **options}
    samples = by_sample(model, data, loss)
    program = scored(model, data, order, example, **options)
    combine = COMBINED[options["aggregation"]]
    assert set(program.need("scores")) == {group.name for group in program.need("prunable")}
    for group in program.need("prunable"):
        scores = program.scores[group.name]
        assert scores.device.type == "cpu"
        assert scores.dtype == torch.float32
        expected = torch.empty(scores.shape)
        for index in range(group.size):
            if scores.ndim == 1:
                expected[index] = combine(list(slices_of(program, order, samples, group, index, None).values()))
            for outer in range(len(scores) if scores.ndim == 2 else 0):
                parts = slices_of(program, order, samples, group, index, outer)
                expected[outer, index] = combine(list(parts.values()))
        assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-5 * float(expected.max())), group.name
        assert expected.max() > 0
    return list(program.scores)


ONE = [{"input_ids": IDS}]


@pytest.mark.parametrize(
    ("order", "data"), [*((order, IN_BATCHES) for order in ORDERS), ("vector", ONE), ("first", ONE)]
)
def test_grouped_query_attention(order: str, data: list[dict[str, torch.Tensor]]) -> None:
    """Key heads, query heads and channels of every head that are ragged, and FFN channels."""
    names = check(llama(), data, next_token, order)
    assert len(names) >= 6


@pytest.mark.parametrize("order", ["vector", "mixed"])
def test_a_fused_projection(order: str) -> None:
    check(gpt2(), IN_BATCHES, next_token, order)


@pytest.mark.parametrize("order", ORDERS)
def test_convolutions(order: str) -> None:
    names = check(conv_net(), [{"x": x} for x in X.split(2)], along, order, {"x": X})
    assert {"stem.weight[0].0", "wide.weight[0]"} <= set(names)


@pytest.mark.parametrize(
    ("make", "order", "aggregation"),
    quick(
        [(*one, how) for one in ((llama, "vector"), (llama, "mixed"), (gpt2, "first")) for how in ("prod", "max")],
        {(llama, "vector", "prod"), (llama, "mixed", "max"), (gpt2, "first", "prod")},
    ),
)
def test_slices_are_aggregated(make: Any, order: str, aggregation: str) -> None:
    check(make(), IN_BATCHES, next_token, order, aggregation=aggregation)


@pytest.mark.parametrize(
    ("make", "data", "example", "last"),
    [
        (llama, IN_BATCHES, None, {"mlp": "down_proj.weight[1]", "self_attn": "o_proj.weight[1]"}),
        (gpt2, IN_BATCHES, None, {"mlp": "c_proj.weight[0]", "attn": "c_proj.weight[0]"}),
        (conv_net, [{"x": X}], {"x": X}, {"": "head.weight[1]"}),
    ],
)
def test_only_the_operator_that_runs_last(make: Any, data: Any, example: Any, last: dict[str, str]) -> None:
    model = make()
    loss = along if make is conv_net else next_token
    samples = by_sample(model, data, loss)
    program = scored(model, data, "first", example, aggregation="last")
    checked = 0
    for group in program.need("prunable"):
        parent = group.modules[0].rpartition(".")[0]
        wanted = f"{parent}.{last.get(parent.rpartition('.')[2], '')}".lstrip(".")
        if wanted not in map(str, group.members) or program.scores[group.name].ndim == 2:
            continue
        checked += 1
        for index in range(group.size):
            parts = slices_of(program, "first", samples, group, index, None)
            name, dim = wanted.removesuffix("]").split("[")
            assert float(program.scores[group.name][index]) == pytest.approx(parts[name, int(dim)], rel=1e-4)
    assert checked


def test_query_heads_belong_to_their_own_key_head() -> None:
    """Key head j serves the query heads 3j to 3j + 2, which stand side by side."""
    model = llama()
    program = scored(model, IN_BATCHES, "first", inner_axes=False, aggregation="sum")
    samples = by_sample(model, IN_BATCHES, next_token)
    values = {n: importance("first", p.detach(), samples[n]) for n, p in model.named_parameters() if n in samples}
    path = "model.layers.1.self_attn"
    scores = next(s for n, s in program.need("scores").items() if n.startswith(f"{path}.q_proj"))
    assert scores.shape == (3,)
    for head in range(3):
        rows, queries = slice(4 * head, 4 * head + 4), slice(12 * head, 12 * head + 12)
        expected = values[f"{path}.o_proj.weight"][:, queries].sum()
        for kind in ("weight", "bias"):
            expected = expected + values[f"{path}.q_proj.{kind}"][queries].sum()
            expected = expected + values[f"{path}.k_proj.{kind}"][rows].sum()
            expected = expected + values[f"{path}.v_proj.{kind}"][rows].sum()
        assert float(scores[head]) == pytest.approx(float(expected), rel=1e-4)


def small(kind: type, config: type, **sizes: Any) -> nn.Module:
    return randomise(kind(config(**sizes))).eval()


def _t5() -> nn.Module:
    return small(
        T5ForConditionalGeneration, T5Config, vocab_size=61, d_model=16, d_kv=4, d_ff=12, num_layers=2, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip


def _albert() -> nn.Module:
    return small(
        AlbertForMaskedLM, AlbertConfig, vocab_size=61, embedding_size=8, hidden_size=16, num_hidden_layers=3,
        num_attention_heads=2, intermediate_size=12, max_position_embeddings=32,
    )  # fmt: skip


def _mixtral() -> nn.Module:
    return small(
        MixtralForCausalLM, MixtralConfig, vocab_size=61, hidden_size=16, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
        experts_implementation="eager",
    )  # fmt: skip


def _vit() -> nn.Module:
    return small(
        ViTForImageClassification, ViTConfig, hidden_size=16, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, image_size=8, patch_size=4, num_labels=5,
    )  # fmt: skip


def in_place(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(**batch).logits
    return torch.stack([cross_entropy(row, ids) for row, ids in zip(logits, batch["input_ids"], strict=True)])


def decoded(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    ids, logits = batch["decoder_input_ids"], model(**batch, use_cache=False).logits
    return torch.stack([cross_entropy(row[:-1], tokens[1:]) for row, tokens in zip(logits, ids, strict=True)])


def labelled(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"], reduction="none")


IMAGES = [{"pixel_values": x} for x in X.split(2)]


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize(
    ("make", "data", "loss"),
    [
        pytest.param(lambda: llama(tie_word_embeddings=True), IN_BATCHES, next_token, id="tied"),
        pytest.param(gpt2, IN_BATCHES, next_token, id="tied, fused"),
        pytest.param(_albert, IN_BATCHES, in_place, id="masked, one block run three times"),
        pytest.param(
            _t5, [{**b, "decoder_input_ids": b["input_ids"][:, 2:]} for b in IN_BATCHES], decoded, id="encoder, decoder"
        ),
        pytest.param(_mixtral, IN_BATCHES, next_token, id="mixture of experts"),
        pytest.param(_vit, IMAGES, along, id="images"),
        pytest.param(_vit, [{**b, "labels": torch.arange(len(b["pixel_values"]))} for b in IMAGES], labelled, id="own"),
        pytest.param(toy, [{"x": X[..., 0, :7]}, {"x": X[..., 1, :7]}], along, id="plain"),
    ],
)
def test_gradients_are_those_of_plain_autograd(make: Any, data: Any, loss: Loss, squares: bool) -> None:
    """Of every parameter, each once, whatever several batches, blocks, tied weights and shared parts come to."""
    model = make().double()
    data = [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in data]
    program = analyse(model, data[0] if loss is along or loss is labelled else None, data=data)
    canonical = program.need("axes").canonical
    samples = {canonical[name]: rows for name, rows in by_sample(model, data, loss).items()}
    found: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def use(name: str, first: torch.Tensor, second: torch.Tensor | None) -> None:
        assert name not in found
        found[name] = (first.clone(), second)

    each_gradient(program, sorted(set(canonical.values()) & set(dict(model.named_parameters()))), use, squares)
    assert set(found) == set(samples)
    total = sum(len(next(iter(batch.values()))) for batch in data)
    for name, (first, second) in found.items():
        wanted = samples[name].sum(0) / total
        assert first.dtype == torch.float64
        assert torch.allclose(first, wanted, rtol=1e-5, atol=1e-8), name
        assert (second is not None) == squares
        if second is not None:
            wanted = samples[name].square().sum(0) / total
            assert torch.allclose(second, wanted, rtol=1e-5, atol=1e-8), name


def test_hidden_tokens_do_not_count() -> None:
    model, length = llama(), 6
    mask = torch.ones_like(IDS)
    mask[:, length:] = 0
    program = scored(model, [{"input_ids": IDS, "attention_mask": mask}], "first")
    short = scored(model, [{"input_ids": IDS[:, :length]}], "first")
    for name, scores in program.need("scores").items():
        assert torch.allclose(scores, short.need("scores")[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("squares", [False, True])
def test_gradients_live_one_layer_at_a_time(squares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one batch one gradient at a time; with several those of one block, or of what is outside of blocks."""
    held: list[set[str]] = []
    plain = gradients._Sums._take

    def take(self: Any, parameter: torch.Tensor) -> None:
        plain(self, parameter)
        assert all(other.grad is None for other in self._names)
        held.append({self._names[other] for other in self._held})

    monkeypatch.setattr(gradients._Sums, "_take", take)
    scored(llama(num_hidden_layers=4), [{"input_ids": IDS[:1]}], "second" if squares else "first")
    assert held
    assert not any(held)
    held.clear()
    scored(llama(num_hidden_layers=4), IN_BATCHES, "second" if squares else "first")
    assert {len({name.split(".")[2] for name in names}) for names in held} == {1}
    assert len({name for names in held for name in names}) == 4 * 10


def test_blocks_run_again_for_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the activations of all blocks would be kept for all batches."""
    model = llama()
    calls: list[int] = []
    plain = type(model.model.layers[0].mlp).forward

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return plain(self, x)

    program = analyse(model, None, method="taylor-first", data=IN_BATCHES)
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", forward)
    run_passes(program, (score_by("taylor-first"),))
    assert calls == [2, 2, 2, 2, 1, 1, 2, 2, 1, 2, 2, 1]


def test_a_block_that_writes_to_its_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    program = analyse(model, None, method="taylor-first", data=IN_BATCHES)
    kind = type(model.model.layers[0])
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, *args, **kwargs: plain(self, x.mul_(0.5), *args, **kwargs))
    with pytest.raises(GraphPruneError, match="writes to its inputs in place"):
        run_passes(program, (score_by("taylor-first"),))


def test_low_precision_is_summed_in_float32() -> None:
    model = llama().to(torch.bfloat16)
    data = [{"input_ids": IDS}] * 40
    found: dict[str, torch.Tensor] = {}
    program = analyse(model, None, data=data)
    names = [name for name, _ in model.named_parameters()]
    each_gradient(program, names, lambda name, first, second: found.update({name: first.clone()}))
    once: dict[str, torch.Tensor] = {}
    each_gradient(
        analyse(model, None, data=data[:1]), names, lambda name, first, second: once.update({name: first.clone()})
    )
    for name, gradient in found.items():  # forty times the same: a sum in bfloat16 would lose a part each time
        assert gradient.dtype == torch.float32
        assert torch.allclose(gradient, once[name], rtol=1e-4, atol=1e-7), name
    scores = scored(model, data, "mixed").need("scores")
    assert all(values.dtype == torch.float32 for values in scores.values())


def _state(model: nn.Module) -> Callable[[], None]:
    """The model, its gradients and the random generator: as they are now, bitwise."""
    for parameter in list(model.parameters())[:3]:
        parameter.grad = torch.ones_like(parameter)
    next(model.parameters()).requires_grad_(False)
    same, generator = snapshot(model), torch.get_rng_state()
    given = {name: parameter.grad for name, parameter in model.named_parameters()}

    def check() -> None:
        same()
        assert torch.equal(torch.get_rng_state(), generator)
        for name, parameter in model.named_parameters():
            assert parameter.grad is given[name]
            assert parameter.grad is None or bool((parameter.grad == 1).all())
            assert not parameter._post_accumulate_grad_hooks

    return check


@pytest.mark.parametrize(
    ("order", "data"),
    [
        pytest.param("first", ONE, marks=pytest.mark.slow),
        ("first", IN_BATCHES),
        ("mixed", ONE),
        pytest.param("mixed", IN_BATCHES, marks=pytest.mark.slow),
    ],
    ids=["first-one batch", "first-batches", "mixed-one batch", "mixed-batches"],
)
def test_the_model_is_not_changed(order: str, data: Any) -> None:
    model = llama().train()
    program = analyse(model, None, method=f"taylor-{order}", data=data)
    unchanged = _state(model)
    with torch.no_grad():
        run_passes(program, (score_by(program.options.method),))
    unchanged()


@pytest.mark.parametrize("order", ["first", "mixed"])
def test_an_error_half_way_leaves_the_model_alone(order: str) -> None:
    model = llama()
    bad = [*IN_BATCHES, {"input_ids": IDS, "inputs_embeds": torch.ones(*IDS.shape, 3)}]  # one or the other
    program = analyse(model, None, method=f"taylor-{order}", data=bad)
    unchanged = _state(model)
    with pytest.raises(GraphPruneError, match="could not be computed"):
        run_passes(program, (score_by(program.options.method),))
    unchanged()


def test_data_that_are_not_finite_are_refused() -> None:
    model = conv_net()
    unchanged = _state(model)
    with pytest.raises(GraphPruneError, match="loss of a calibration batch is nan"):
        scored(model, [{"x": X}, {"x": X * float("nan")}], "first", {"x": X})
    unchanged()


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).abs().sqrt())

    for data in ([{"x": torch.zeros(2, 4)}], [{"x": torch.zeros(1, 4)}] * 2):
        with pytest.raises(GraphPruneError, match=r"gradient of up.weight is not finite"):
            scored(Root(), data, "first", {"x": torch.ones(2, 4)})


def test_samples_that_cannot_be_told_apart_are_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x) + self.up(y).sum(0))

    data = {"x": torch.ones(3, 4), "y": torch.ones(5, 4)}
    with pytest.raises(GraphPruneError, match="y does not have 3 rows"):
        scored(Two(), [data], "second", data)
    assert scored(Two(), [data], "first", data).need("scores")


def test_outputs_without_a_gradient_are_refused() -> None:
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x)).argmax(-1)

    with pytest.raises(GraphPruneError, match="no floating-point tensor"):
        scored(Choice(), [{"x": torch.ones(3, 4)}], "first", {"x": torch.ones(3, 4)})


def test_a_model_with_a_device_map() -> None:
    plain = scored(llama(), IN_BATCHES, "first").need("scores")
    model = dispatch_model(llama(), {"model": "cpu", "lm_head": "cpu"}, force_hooks=True)
    found = scored(model, IN_BATCHES, "first").need("scores")
    assert all(torch.allclose(found[name], scores, rtol=1e-4) for name, scores in plain.items())


@pytest.mark.parametrize(
    ("method", "aggregation"),
    quick(
        itertools.product(("llm-pruner", "taylor-mixed"), ("sum", "last")),
        {("llm-pruner", "sum"), ("taylor-mixed", "last")},
    ),
)
def test_the_smallest_scores_go(method: str, aggregation: str) -> None:
    model = llama()
    options: dict[str, Any] = {"include": ["*.mlp"], "aggregation": aggregation}
    pruned = graphprune.compile(model, 0.1, method=method, data=IN_BATCHES, **options)
    report = graphprune.report(pruned)
    assert report.oracle_error < 1e-5
    order = "first" if method == "llm-pruner" else "mixed"
    scores = scored(model, IN_BATCHES, order, inner_axes=False, **options).need("scores")
    assert set(report.plan.keep) == set(scores)
    for name, kept in report.plan.keep.items():
        best = scores[name].argsort(descending=True)[: len(kept)]
        assert sorted(best.tolist()) == kept


def test_texts_are_calibration_data() -> None:
    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}

    text = "The quick brown fox jumps over the lazy dog and runs away into the dark wood. " * 3
    pruned = graphprune.compile(
        llama(), 0.1, method="llm-pruner", data=text, tokenizer=tokenizer, samples=6, length=12, skip_last=1
    )
    assert graphprune.report(pruned).oracle_error < 1e-5


def test_names_are_checked() -> None:
    assert {"llm-pruner", *(f"taylor-{order}" for order in ORDERS)} <= set(method_names())
    with pytest.raises(GraphPruneError, match="aggregation is one of sum, prod, max, last, not 'mean'"):
        graphprune.compile(llama(), 0.1, aggregation="mean")
