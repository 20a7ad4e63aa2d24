"""Knowledge distribution: against models that are really pruned, bit-exact, interrupted, kept, and made use of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import X, analyse, plan_removing, quick, randomise, snapshot, toy
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

import graphprune
from graphprune import GraphPruneError, Knowledge
from graphprune.compiler import _program
from graphprune.ir.program import Options, Program
from graphprune.passes import analyze_knowledge as module
from graphprune.passes import pipelines, run_passes
from graphprune.passes.allocate_budget import allocate_budget
from graphprune.passes.analyze_knowledge import analyze_knowledge
from graphprune.passes.follow_sizes import follow_sizes
from graphprune.passes.masking import consuming_weights
from graphprune.passes.methods import METHODS
from graphprune.passes.prefix import Prefix
from graphprune.passes.replay_plan import replay_plan
from graphprune.passes.score import scores_of
from graphprune.passes.score.loss import calibration_loss
from graphprune.passes.select_structures import in_order
from graphprune.trace.skeleton import names

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 61,
}
TOKENS = torch.randint(0, 61, (5, 16), generator=torch.Generator().manual_seed(1))


class Pictures(nn.Module):
    """Channels that a grouped convolution passes on, and no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, 1, groups=2)
        self.norm = nn.BatchNorm2d(12)
        self.c, self.d = nn.Conv2d(12, 10, 1), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.b(self.a(x).relu())).relu()
        return self.d(self.c(x).relu().flatten(2).sum(-1))


class Twice(nn.Module):
    """Channels that two weights consume, one of them the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(7, 16), nn.Linear(16, 5), nn.Parameter(torch.randn(16, 5))
        self.d, self.e = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).sigmoid()
        return self.e(self.d(self.b(x) + (self.c.t() @ x.mT).mT).sigmoid())


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SMALL, "num_key_value_heads": 2, **options})
    return randomise(LlamaForCausalLM(config)).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    return randomise(BertForMaskedLM(BertConfig(**SMALL))).eval()


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(**{**SMALL, "num_hidden_layers": 2}, num_key_value_heads=2, num_local_experts=4)
    return randomise(MixtralForCausalLM(config)).eval()


def pictures() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Pictures()).eval()


IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
MODELS: dict[str, tuple[Any, Any, Any]] = {
    "llama": (llama, TOKENS, None),
    "tied": (lambda: llama(tie_word_embeddings=True), TOKENS, None),
    "bert": (bert, TOKENS, None),
    "mixtral": (mixtral, TOKENS, None),
    "pictures": (pictures, IMAGES, IMAGES[:2]),
    "twice": (lambda: randomise(Twice()).eval(), [{"x": X}], X),
    "toy": (lambda: toy(2), [{"x": X}], X),
}


def run(model: nn.Module, data: Any, inputs: Any = None, **options: Any) -> Knowledge:
    return graphprune.knowledge(model, data=data, example_inputs=inputs, **{"cache": None, **options})


def really_pruned(program: Program, group: str, count: int) -> nn.Module:
    """The model without the ``count`` structures of smallest magnitude of one group."""
    found = next(g for g in program.need("prunable") if g.name == group)
    gone = in_order(scores_of(program, "l2", [found])[group])[1][..., :count].tolist()
    if isinstance(gone[0], list):
        keep = [[i for i in range(found.size) if i not in row] for row in gone]
        under = {group: program.need("ragged")[group]}
        plan = graphprune.Plan(0.0, {group: keep}, {group: found.size}, under=under)
    else:
        plan = plan_removing({group: (found.size, gone)})
    run_passes(program, (replay_plan(plan), follow_sizes, *pipelines.EMIT))
    return program.need("pruned")


def loss_of(model: nn.Module, dense: nn.Module, knowledge: Knowledge, data: Any) -> float:
    """What the definition says, of all rows at once."""
    batch = {"input_ids": data} if data is TOKENS else data[0] if isinstance(data, list) else {"x": data}
    with torch.no_grad():
        if knowledge.measure == "perplexity":
            return float(calibration_loss(model, batch, 0)) / len(data)
        found, expected = model(**batch), dense(**batch)
        if data is IMAGES:  # relative to each batch, of 4 rows and 2
            parts = [
                (f - e).square().sum() / e.square().sum() * len(f)
                for f, e in zip(found.split(4), expected.split(4), strict=True)
            ]
            return float(sum(parts)) / len(data)
        return float((found - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize(
    ("name", "inner_axes"),
    quick(
        [(name, inner) for name in MODELS for inner in (False, True)],
        {
            *(("llama", False), ("bert", False), ("twice", False)),
            *(("tied", True), ("mixtral", True), ("pictures", True), ("toy", True)),
        },
    ),
)
def test_it_is_the_loss_of_the_model_that_is_really_pruned(name: str, inner_axes: bool) -> None:
    make, data, inputs = MODELS[name]
    model = make()
    check = snapshot(model)
    knowledge = run(model, data, inputs, ratios=(0.25, 0.5), inner_axes=inner_axes)
    check()
    program = analyse(model, inputs, inner_axes=inner_axes)
    assert knowledge.measure == ("outputs" if data is not TOKENS else "perplexity")
    assert knowledge.loss == pytest.approx(loss_of(model, model, knowledge, data), rel=1e-5)
    assert len(knowledge.groups) + len(knowledge.left_out) == len(program.need("prunable"))
    assert len(knowledge.groups) >= 2
    assert all(abs(d) > 1e-6 for g in knowledge.groups for d in knowledge.deviations(g))
    for group in knowledge.groups:
        for count, loss in zip(group.removed, group.losses, strict=True):
            assert 0 < count < group.size
            pruned = really_pruned(program, group.name, count)
            assert loss == pytest.approx(loss_of(pruned, model, knowledge, data), rel=1e-4, abs=1e-7), group.name


def test_a_forward_may_write_to_what_it_gets() -> None:
    class Writing(Pictures):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mul_(2))

    model, images = Writing().eval(), IMAGES.clone()
    plain = pictures()
    model.load_state_dict(plain.state_dict())
    found = run(model, images, IMAGES[:2].clone())
    assert torch.equal(images, IMAGES)
    assert found.groups == run(plain, IMAGES * 2, IMAGES[:2]).groups


def test_batches_with_labels_are_measured_by_the_loss_of_the_model() -> None:
    model = llama()
    batch = {"input_ids": TOKENS, "labels": TOKENS.roll(1, 1)}
    knowledge = run(model, [batch], ratios=(0.5,))
    with torch.no_grad():
        assert knowledge.loss == pytest.approx(float(model(**batch).loss), rel=1e-5)
    assert knowledge.measure == "loss"


def test_groups_that_no_weight_consumes_are_left_out_with_the_reason() -> None:
    knowledge = run(llama(), TOKENS, inner_axes=True, ratios=(0.5,))
    assert any("without a weight" in why for why in knowledge.left_out.values()) or not knowledge.left_out
    program = analyse(mixtral(), width=True, experts=True)
    reasons = {g.name: consuming_weights(program, g) for g in program.need("prunable")}
    statistic = [why for why in reasons.values() if isinstance(why, str) and "statistic" in why]
    assert len(statistic) == 3  # the residual width, and the experts of two layers


# ---------------------------------------------------------------------------------------------------------- prefixes


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls of blocks every run replayed."""
    found: list[int] = []
    replay = Prefix.replay

    def note(self: Prefix, model: nn.Module, calls: int) -> Any:
        found.append(calls)
        return replay(self, model, calls)

    monkeypatch.setattr(Prefix, "replay", note)
    return found


def without_prefix(model: nn.Module, data: Any, inputs: Any = None, **options: Any) -> Knowledge:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefix, "calls_before", lambda *_: 0)
        return run(model, data, inputs, **options)


def test_blocks_before_the_masked_one_are_not_run_again(calls: list[int]) -> None:
    found = run(llama(), TOKENS[:4], ratios=(0.5,), samples=4)
    assert sorted(calls) == [0, 0, 1, 1, 1, 2, 2, 2]  # attention and FFN of each block; 1 and 2 are tried out once
    assert found == without_prefix(llama(), TOKENS[:4], ratios=(0.5,), samples=4)


class Telling(GradientCheckpointingLayer):
    """A block whose result depends on how many ran before it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor, said: list[int]) -> torch.Tensor:
        said.append(1)
        return x + self.down(self.up(x).relu()) * len(said)


class Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Telling() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        said: list[int] = []
        for layer in self.layers:
            x = layer(x, said)
        return x


def test_blocks_with_side_effects_do_run(calls: list[int]) -> None:
    x = torch.randn(4, 8)
    model = randomise(Told()).eval()
    found = run(model, [{"x": x}], x, ratios=(0.5,))
    assert sorted(calls) == [0, 0, 0, 1, 2]  # 1 and 2 were tried out
    assert found == without_prefix(model, [{"x": x}], x, ratios=(0.5,))


# ------------------------------------------------------------------------------------- cache, interruption, devices


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch of every run of a model; the list may be told to interrupt one of them."""
    found: list[int] = []
    plain = module._Worker._run

    def run(self: Any, model: nn.Module, n: int) -> float:
        found.append(n)
        return plain(self, model, n)

    monkeypatch.setattr(module._Worker, "_run", run)
    return found


def test_a_second_run_comes_from_the_cache(forwards: list[int], tmp_path: Path) -> None:
    first = run(llama(), TOKENS, cache=tmp_path)
    assert forwards
    forwards.clear()
    assert run(llama(), TOKENS, cache=str(tmp_path)) == first
    assert not forwards
    more = run(llama(), TOKENS, cache=tmp_path, ratios=(0.1, 0.3, 0.5, 0.9))  # only the new ratio is measured
    assert 0 < len(forwards) < 2 + 8 * 2
    assert [g.losses[:3] for g in more.groups] == [g.losses for g in first.groups]
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_whatever_decides_a_loss_is_measured_again(forwards: list[int], tmp_path: Path) -> None:
    run(llama(), TOKENS, cache=tmp_path)
    changed = llama()
    with torch.no_grad():
        changed.model.layers[2].mlp.down_proj.weight[3, 4] += 1e-6
    other_value = llama()
    other_value.model.layers[1].mlp.act_fn = nn.ReLU()
    eps = llama()
    eps.model.norm.variance_epsilon = 1e-3
    for model, data, options in (
        (changed, TOKENS, {}),
        (other_value, TOKENS, {}),
        (eps, TOKENS, {}),
        (llama(), (TOKENS + 1) % 61, {}),
        (llama(), TOKENS, {"inner_axes": True}),
    ):
        forwards.clear()
        run(model, data, cache=tmp_path, **options)
        assert forwards


@pytest.mark.parametrize(
    "damage",
    quick(["", "[]", "{", '{"format": 1}', '{"format": 0}', "losses", "dense"], {"[]", "{", '{"format": 0}', "losses"}),
)
def test_a_damaged_entry_is_measured_again(damage: str, forwards: list[int], tmp_path: Path) -> None:
    first = run(llama(), TOKENS, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    data = json.loads(path.read_text())
    if damage in data:
        data[damage] = {"model": 3}
    path.write_text(json.dumps(data) if damage in data else damage)
    forwards.clear()
    assert run(llama(), TOKENS, cache=tmp_path) == first
    assert forwards
    forwards.clear()
    assert run(llama(), TOKENS, cache=tmp_path) == first
    assert not forwards


def test_the_default_folder_and_one_that_cannot_be_written(
    forwards: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    graphprune.knowledge(toy(2), data=[{"x": X}], example_inputs=X)
    assert len(list((tmp_path / "xdg" / "graphprune" / "knowledge").iterdir())) == 1
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not kept"):
        found = run(toy(2), [{"x": X}], X, cache=tmp_path / "file")
    assert found == run(toy(2), [{"x": X}], X)


@pytest.mark.parametrize(
    "error",
    quick([KeyboardInterrupt, RuntimeError, torch.OutOfMemoryError], {KeyboardInterrupt, torch.OutOfMemoryError}),
)
def test_interrupted_half_way_the_model_is_as_before_and_the_rest_is_done_later(
    error: type[BaseException], forwards: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(llama(), TOKENS)
    in_all, model = len(forwards), llama()
    check, state = snapshot(model), torch.get_rng_state()
    forwards.clear()
    plain = module._Worker._run

    def stop(self: Any, masked: nn.Module, n: int) -> float:
        if len(forwards) == in_all // 2:
            raise error("half way")
        return plain(self, masked, n)

    with monkeypatch.context() as patch:
        patch.setattr(module._Worker, "_run", stop)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else GraphPruneError, match="half way"):
            run(model, TOKENS, cache=tmp_path)
    check()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
    forwards.clear()
    assert run(model, TOKENS, cache=tmp_path) == whole
    assert 0 < len(forwards) < in_all * 0.75
    check()


def test_several_devices_find_the_same(forwards: list[int]) -> None:
    progress: list[str] = []
    found = run(llama(), TOKENS, devices=["cpu", "cpu"], progress=progress.append)
    assert found == run(llama(), TOKENS)
    said = [text for text in progress if text.startswith("knowledge")]
    assert said[0].startswith("knowledge: 1 of 6 groups, ")
    assert said[-1] == "knowledge: 6 of 6 groups, 0 s left"
    moved = module._moved(llama(), torch.device("meta"))
    assert {tensor.device.type for tensor in names(moved).values()} == {"meta"}


def test_a_model_that_draws_random_numbers_runs_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    plain = module._each
    monkeypatch.setattr(module, "_each", lambda workers, jobs: used.append(len(workers)) or plain(workers, jobs))

    class Noisy(Pictures):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + torch.rand_like(x))

    noisy, state = randomise(Noisy()).eval(), torch.get_rng_state()
    found = run(noisy, IMAGES, IMAGES[:2], devices=["cpu", "cpu"])
    assert torch.equal(torch.get_rng_state(), state)
    assert found == run(noisy, IMAGES, IMAGES[:2])
    run(pictures(), IMAGES, IMAGES[:2], devices=["cpu", "cpu"])
    assert used == [1, 1, 2]


# --------------------------------------------------------------------------------------------------------------- use


@pytest.mark.parametrize("method", quick(["magnitude", "llm-pruner", "ppm", "slimgpt"], {"magnitude", "ppm"}))
def test_the_worst_groups_stay_whole_with_every_method(method: str) -> None:
    model = llama()
    knowledge = run(model, TOKENS)
    worst = {group.name for group in knowledge.worst(0.3)}
    assert len(worst) == 2
    means = {g.name: sum(g.losses) for g in knowledge.groups}
    assert min(means[name] for name in worst) >= max(loss for name, loss in means.items() if name not in worst)
    passes = (analyze_knowledge(0.3, cache=None), *METHODS[method])
    small = graphprune.compile(model, 0.1, passes=passes, allocation="uniform", data=TOKENS)
    report = graphprune.report(small)
    assert report.widths
    assert report.widths.keys() <= means.keys() - worst
    for name in worst:
        assert "unprunable: masked alone at 0.1, 0.3, 0.5 it raises the perplexity by " in report.skipped[name]
    plain = graphprune.report(graphprune.compile(model, 0.1, method=method, allocation="uniform", data=TOKENS))
    assert report.ratio == pytest.approx(plain.ratio, abs=0.01)


def test_a_keyword_of_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, options = llama(), {"method": "llm-pruner", "data": TOKENS}
    by_keyword = graphprune.compile(model, 0.1, unprunable_ratio=0.3, **options)
    passes = (analyze_knowledge(0.3), *METHODS["llm-pruner"])
    assert (
        graphprune.report(by_keyword).plan
        == graphprune.report(graphprune.compile(model, 0.1, passes=passes, **options)).plan
    )
    replayed = graphprune.compile(model, plan=graphprune.report(by_keyword).plan, unprunable_ratio=0.3)
    assert graphprune.report(replayed).widths == graphprune.report(by_keyword).widths
    assert "analyze_knowledge" in graphprune.report(by_keyword).seconds
    assert "analyze_knowledge" not in graphprune.report(replayed).seconds  # a plan says all there is to say


def test_an_evaluation_set_of_its_own() -> None:
    program = _program(llama(), Options(ratio=0.1, data=TOKENS), None)
    run_passes(program, (*pipelines.ANALYSE, analyze_knowledge(data=TOKENS[:2], cache=None)))
    assert program.need("knowledge") == run(llama(), TOKENS[:2])
    assert program.batches is None
    rows = iter([TOKENS[:3], TOKENS[3:]])  # can be read only once
    small = graphprune.compile(
        llama(), 0.1, passes=(analyze_knowledge(cache=None, samples=2), *METHODS["wanda-sp"]), data=rows, samples=5
    )
    assert graphprune.report(small).ratio == pytest.approx(0.1, abs=0.01)


def test_the_mean_over_the_ratios_decides_and_infinite_is_worst() -> None:
    def group(name: str, *losses: float) -> Any:
        return module.GroupKnowledge(name, [name], 8, [1, 4], list(losses))

    groups = [group("a", 3.0, 3.1), group("b", 2.1, 9.0), group("c", 2.0, math.inf), group("d", 1.9, 2.0)]
    found = Knowledge((0.1, 0.5), "perplexity", 2.0, 4, groups, {"e": "why"})
    assert [one.name for one in found.worst(0.5)] == ["c", "b"]
    assert [one.name for one in found.worst(0.01)] == ["c"]
    assert found.worst(0) == []
    assert found.shown(groups[0])[0] == pytest.approx(math.exp(3) - math.exp(2))
    assert Knowledge.from_json(found.to_json()) == found
    assert "left out: e: why" in str(found)
    assert "7.389" in str(found)
    for text in ("", "[]", "{}", found.to_json().replace('"losses"', '"x"'), found.to_json().replace("2.1,", "")):
        with pytest.raises(GraphPruneError):
            Knowledge.from_json(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": ()}, "ratios are shares"),
        ({"ratios": (0.0, 0.5)}, "ratios are shares"),
        ({"ratios": (1.0,)}, "ratios are shares"),
        ({"samples": 0}, "samples must be"),
        ({"devices": []}, "names no device"),
        ({"devices": ["nowhere"]}, "nowhere"),
        ({"data": TOKENS + 60}, "outside the vocabulary"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    model = llama()
    check = snapshot(model)
    with pytest.raises(GraphPruneError, match=message):
        run(model, **{"data": TOKENS, **options})
    check()


def test_errors_of_gamma_and_of_a_budget_that_is_too_small(forwards: list[int]) -> None:
    model = llama()
    check = snapshot(model)
    for gamma in (-0.1, 1.0, math.nan):
        with pytest.raises(GraphPruneError, match="is a share of the node groups"):
            analyze_knowledge(gamma)
    passes = (analyze_knowledge(0.8, cache=None), allocate_budget("uniform"))
    with pytest.raises(GraphPruneError, match=r"cannot be reached(.|\n)*makes 5 of 6 node groups unprunable"):
        graphprune.compile(model, 0.5, passes=passes, data=TOKENS)
    forwards.clear()
    with pytest.raises(GraphPruneError, match="cannot be reached"):
        graphprune.compile(model, 0.95, passes=(analyze_knowledge(0.1, cache=None),), data=TOKENS)
    assert not forwards  # said before anything is measured
    with pytest.raises(GraphPruneError, match="meta device"):
        graphprune.compile(llama().to("meta"), 0.1, unprunable_ratio=0.1)
    check()


def test_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knowledge = run(llama(), TOKENS)
    path = tmp_path / "plot.svg"
    knowledge.plot(path)
    text = path.read_text()
    assert "<svg" in text
    assert len(text) > 5000
    with pytest.raises(GraphPruneError, match="cannot be written"):
        knowledge.plot(tmp_path / "plot.nothing")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(GraphPruneError, match="needs matplotlib"):
        knowledge.plot(path)
