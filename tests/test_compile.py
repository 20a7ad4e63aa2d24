"""The public behaviour of ``compile``: what it refuses, what it keeps, what it reports."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import X, numel, plan_removing, randomise, snapshot, toy
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune
from graphprune import GraphPruneError
from graphprune.passes.methods import METHODS


class Mlp(nn.Module):
    """7 → 24 → 16 → 5, with a norm that pins nothing but itself and a buffer on the hidden axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 24)
        self.second = nn.Linear(24, 16)
        self.last = nn.Linear(16, 5)
        self.register_buffer("shift", torch.randn(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second((self.first(x) + self.shift).relu()).tanh())


def mlp() -> Mlp:
    torch.manual_seed(0)
    return randomise(Mlp()).eval()  # type: ignore[return-value]


def llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return randomise(LlamaForCausalLM(LlamaConfig(vocab_size=61, **(sizes | settings)))).eval()  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("ratio", [0, 1, -0.2, 1.5, 0.0, 1.0, True, False, None, "0.2", float("nan"), float("inf")])
def test_a_ratio_outside_0_and_1_is_refused(ratio: Any) -> None:
    model = mlp()
    unchanged = snapshot(model)
    with pytest.raises(GraphPruneError, match="between 0 and 1"):
        graphprune.compile(model, ratio, method="magnitude", example_inputs=X)
    unchanged()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_ratio_that_cannot_be_reached_says_how_far_and_why(inplace: bool) -> None:
    model = toy()
    unchanged = snapshot(model)
    with pytest.raises(GraphPruneError) as caught:
        graphprune.compile(model, 0.97, method="magnitude", inplace=inplace, example_inputs=X)
    unchanged()
    text = str(caught.value)
    reached = float(text.split("cannot be reached: ")[1].split(" ")[0])
    assert 0.3 < reached < 0.97
    assert "stem.weight[0] (" in text  # the residual width
    assert "pinned: normalised (" in text
    # It says the truth: as far as that it goes, and no further.
    small = graphprune.compile(model, reached - 1e-3, method="magnitude", example_inputs=X)
    assert graphprune.report(small).ratio > reached - 0.05
    with pytest.raises(GraphPruneError, match="cannot be reached"):
        graphprune.compile(model, reached + 1e-3, method="magnitude", example_inputs=X)


@pytest.mark.parametrize("model", [None, 3, "gpt2", [nn.Linear(2, 2)], torch.zeros(3), nn.Linear])
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(GraphPruneError, match=r"must be a torch\.nn\.Module"):
        graphprune.compile(model, 0.2, method="magnitude")
    with pytest.raises(GraphPruneError, match=r"must be a torch\.nn\.Module"):
        graphprune.inspect(model)


def test_a_module_without_parameters_is_refused() -> None:
    with pytest.raises(GraphPruneError, match="no parameters"):
        graphprune.compile(nn.ReLU(), 0.2, method="magnitude", example_inputs=X)


def test_missing_inputs_are_asked_for() -> None:
    with pytest.raises(GraphPruneError, match="example_inputs"):
        graphprune.compile(mlp(), 0.2, method="magnitude")


@pytest.mark.parametrize("inputs", [(X, X), {"y": X}, ()], ids=["too many", "unknown name", "none"])
def test_inputs_that_forward_does_not_take_are_refused(inputs: Any) -> None:
    model = mlp()
    unchanged = snapshot(model)
    with pytest.raises(GraphPruneError, match="example_inputs"):
        graphprune.compile(model, 0.2, method="magnitude", example_inputs=inputs)
    unchanged()


def test_inputs_of_the_wrong_shape_name_the_line() -> None:
    with pytest.raises(GraphPruneError, match=r"test_compile\.py:\d+ in forward"):
        graphprune.compile(mlp(), 0.2, method="magnitude", example_inputs=torch.randn(3, 8))


class Branching(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        if hidden.sum() > 0:  # the line that the error must name
            hidden = hidden * 2
        return self.last(self.second(hidden))


def test_data_dependent_control_flow_names_the_line() -> None:
    model = Branching()
    unchanged = snapshot(model)
    with pytest.raises(GraphPruneError, match=r"test_compile\.py:\d+ in forward: if hidden\.sum\(\) > 0"):
        graphprune.compile(model, 0.2, method="magnitude", example_inputs=X)
    unchanged()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_weights_that_are_not_finite_are_refused(value: float, method: str) -> None:
    model = mlp()
    with torch.no_grad():
        model.second.weight[3, 4] = value
    unchanged = snapshot(model)
    with pytest.raises(GraphPruneError, match=r"second\.weight holds NaN or infinite"):
        graphprune.compile(model, 0.2, example_inputs=X, method=method)
    unchanged()


def test_weights_that_overflow_when_summed_are_not_infinite() -> None:
    model = mlp()
    with torch.no_grad():
        model.second.bias.fill_(3e38)
    graphprune.compile(model, 0.2, example_inputs=X, method="random", verify=False)


class Quantised(nn.Module):
    """int8 weights with a scale, as quantisation libraries store them."""

    def __init__(self, as_parameter: bool):
        super().__init__()
        packed = torch.randint(-127, 127, (24, 7), dtype=torch.int8)
        if as_parameter:
            self.weight = nn.Parameter(packed, requires_grad=False)
        else:
            self.register_buffer("weight", packed)
        self.scale = nn.Parameter(torch.rand(24, 1))
        self.last = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x @ (self.weight * self.scale).T)


def test_quantised_weights_are_refused() -> None:
    model = Quantised(as_parameter=True)
    unchanged = snapshot(model)
    with pytest.raises(GraphPruneError, match=r"weight is a Tensor of torch\.int8.*quantise"):
        graphprune.compile(model, 0.2, method="magnitude", example_inputs=X)
    unchanged()


def test_int8_buffers_are_sliced_or_refused_but_never_wrong() -> None:
    """One int8 value for each weight can be sliced like any buffer; the oracle has the last word."""
    pruned = graphprune.compile(Quantised(as_parameter=False), 0.3, method="magnitude", example_inputs=X)
    assert pruned.weight.dtype == torch.int8
    assert pruned.weight.shape == (pruned.last.in_features, 7)


@pytest.mark.parametrize("flag", ["is_quantized", "hf_quantizer"])
def test_a_model_that_says_it_is_quantised_is_refused(flag: str) -> None:
    model = mlp()
    object.__setattr__(model, flag, True)
    with pytest.raises(GraphPruneError, match="is quantised"):
        graphprune.compile(model, 0.2, method="magnitude", example_inputs=X)


def test_a_plan_for_another_architecture_is_refused() -> None:
    plan = graphprune.report(graphprune.compile(toy(), 0.2, method="magnitude", example_inputs=X)).plan
    model = mlp()
    unchanged = snapshot(model)
    with pytest.raises(GraphPruneError, match="another architecture"):
        graphprune.compile(model, plan=plan, example_inputs=X)
    unchanged()
    with pytest.raises(GraphPruneError, match=r"another architecture.* has size 40"):
        graphprune.compile(toy(hidden=40), plan=plan, example_inputs=X)


def test_a_plan_that_prunes_what_is_pinned_is_refused() -> None:
    with pytest.raises(GraphPruneError, match="pinned here: model output"):
        graphprune.compile(mlp(), plan=plan_removing({"last.weight[0]": (5, [1])}), example_inputs=X)


@pytest.mark.parametrize("indices", [[0, 24], [-1, 0], [1, 1], [1, 0], [], [0.0], [True, 2]])
def test_a_plan_changed_since_it_was_made_is_checked_again(indices: list[Any]) -> None:
    plan = plan_removing({"first.weight[0]": (24, [1])})
    plan.keep["first.weight[0]"] = indices
    model = mlp()
    unchanged = snapshot(model)
    with pytest.raises(GraphPruneError, match="sorted, non-empty"):
        graphprune.compile(model, plan=plan, example_inputs=X, inplace=True)
    unchanged()


@pytest.mark.parametrize("plan", [{"keep": {}}, "plan.json", 0.2])
def test_what_is_no_plan_is_refused(plan: Any) -> None:
    with pytest.raises(GraphPruneError, match=r"must be a graphprune\.Plan"):
        graphprune.compile(mlp(), plan=plan, example_inputs=X)


def test_a_ratio_and_a_plan_are_too_much() -> None:
    with pytest.raises(GraphPruneError, match="not both"):
        graphprune.compile(mlp(), 0.2, method="magnitude", plan=graphprune.Plan(0.1), example_inputs=X)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"method": "magic"}, "no method 'magic'. Methods: .*wanda-sp"),
        ({"allocation": "best"}, "no allocation 'best'. Allocations: global, .*uniform"),
        ({"include": ["*.attention"]}, "matches no module"),
        ({"exclude": "nowhere"}, "matches no module"),
        ({"round_to": 0}, "round_to must be at least 1"),
        ({"skip_first": -1}, "cannot be negative"),
        ({"skip_last": -1}, "cannot be negative"),
        ({"method": "wanda-sp", "data": []}, "empty"),
        ({"method": "wanda-sp", "data": ["text"]}, "tokenizer"),
        ({"method": "wanda-sp", "data": [3]}, "list of texts"),
        ({"method": "wanda-sp", "data": [{"z": X}]}, "Batch 0 .* z, which Mlp.forward does not take; it takes: "),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_that_make_no_sense_are_refused(option: dict[str, Any], message: str) -> None:
    model = mlp()
    unchanged = snapshot(model)
    with pytest.raises(GraphPruneError, match=message):
        graphprune.compile(model, 0.2, example_inputs=X, **option)
    unchanged()


def test_a_report_of_a_model_that_was_not_pruned_is_refused() -> None:
    with pytest.raises(GraphPruneError, match="was not made by"):
        graphprune.report(mlp())


# ------------------------------------------------------------------------------------------- what is preserved


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    pruned = graphprune.compile(model, 0.3, method="magnitude", example_inputs=X.to(dtype))
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert pruned.shift.dtype == dtype
    assert pruned(X.to(dtype)).dtype == dtype


def test_mixed_dtypes_are_kept() -> None:
    class Mixed(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.second(self.first(x).relu().double()).float())

    model = Mixed()
    model.second.double()
    pruned = graphprune.compile(model, 0.3, method="magnitude", example_inputs=X)
    assert pruned.first.weight.dtype == torch.float32
    assert pruned.second.weight.dtype == torch.float64


@pytest.mark.parametrize("inplace", [False, True])
def test_requires_grad_is_kept(inplace: bool) -> None:
    model = mlp()
    model.first.weight.requires_grad_(False)
    model.last.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    pruned = graphprune.compile(model, 0.3, method="magnitude", example_inputs=X, inplace=inplace)
    assert {name: p.requires_grad for name, p in pruned.named_parameters()} == wanted


@pytest.mark.parametrize("inplace", [False, True])
def test_train_and_eval_state_is_kept_module_by_module(inplace: bool) -> None:
    model = mlp().train()
    model.second.eval()
    unchanged = snapshot(model)
    pruned = graphprune.compile(model, 0.3, method="magnitude", example_inputs=X, inplace=inplace)
    assert pruned.training
    assert pruned.first.training
    assert not pruned.second.training
    if not inplace:
        unchanged()


def test_tied_weights_stay_tied_and_count_once() -> None:
    model = llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    pruned = graphprune.compile(model, 0.2, method="magnitude")
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    report = graphprune.report(pruned)
    assert report.parameters_before == numel(model)
    assert report.parameters_after == numel(pruned)


class TiedBackwards(nn.Module):
    """One matrix goes in and, transposed, out: its two uses tie hidden to nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 24, bias=False)
        self.up_again = nn.Linear(7, 24, bias=False)
        self.up_again.weight = self.up.weight
        self.last = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.up(x).relu() * self.up_again(x.sin()))


@pytest.mark.parametrize("inplace", [False, True])
def test_tied_weights_that_are_sliced_stay_tied(inplace: bool) -> None:
    model = TiedBackwards()
    pruned = graphprune.compile(model, 0.4, method="magnitude", example_inputs=X, inplace=inplace)
    assert pruned.up.weight is pruned.up_again.weight
    assert pruned.up.weight.shape == (pruned.last.in_features, 7)


def test_buffers_are_sliced_with_their_axis() -> None:
    model = mlp()
    pruned = graphprune.compile(model, plan=plan_removing({"first.weight[0]": (24, [0, 5])}), example_inputs=X)
    kept = [i for i in range(24) if i not in (0, 5)]
    assert torch.equal(pruned.shift, model.shift[kept])
    assert "shift" in dict(pruned.named_buffers())


def test_non_persistent_buffers_stay_so() -> None:
    model = mlp()
    model.register_buffer("shift", model.shift, persistent=False)
    pruned = graphprune.compile(model, 0.3, method="magnitude", example_inputs=X)
    assert "shift" not in pruned.state_dict()
    assert pruned.shift.shape == (pruned.first.out_features,)


@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_are_kept_and_not_called(inplace: bool) -> None:
    model = mlp()
    calls: list[str] = []
    model.first.register_forward_hook(lambda *_: calls.append("forward"))
    model.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.second.register_full_backward_hook(lambda *_: calls.append("backward"))
    pruned = graphprune.compile(model, 0.3, method="magnitude", example_inputs=X, inplace=inplace)
    assert calls == []
    pruned(X).sum().backward()
    assert calls == ["pre", "forward", "backward"]
    calls.clear()
    if not inplace:
        model(X)
        assert calls == ["pre", "forward"]


def test_hooks_with_keyword_arguments_are_kept_too() -> None:
    model = mlp()
    seen: list[dict] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    pruned = graphprune.compile(model, 0.3, method="magnitude", example_inputs={"x": X})
    assert seen == []
    pruned(x=X)
    assert list(seen[0]) == ["x"]


def test_attributes_of_torch_modules_follow() -> None:
    pruned = graphprune.compile(mlp(), 0.4, method="magnitude", example_inputs=X)
    for name, module in pruned.named_children():
        assert (module.out_features, module.in_features) == tuple(module.weight.shape), name


def test_the_config_of_the_original_is_not_shared() -> None:
    model = llama()
    before = model.config.to_dict()
    graphprune.compile(model, 0.3, method="magnitude")
    assert model.config.to_dict() == before


def test_inplace_returns_the_same_objects() -> None:
    model = mlp()
    objects = {name: id(p) for name, p in model.named_parameters()}
    pruned = graphprune.compile(model, 0.3, method="magnitude", example_inputs=X, inplace=True)
    assert pruned is model
    assert {name: id(p) for name, p in pruned.named_parameters()} == objects
    assert pruned.first.out_features == pruned.first.weight.shape[0] < 24


@pytest.mark.parametrize("make", [mlp, toy])
def test_inplace_gives_what_a_copy_gives(make: Callable[[], nn.Module]) -> None:
    copied = graphprune.compile(make(), 0.3, method="magnitude", example_inputs=X)
    changed = graphprune.compile(make(), 0.3, method="magnitude", example_inputs=X, inplace=True)
    assert graphprune.report(copied).plan == graphprune.report(changed).plan
    for (name, a), (_, b) in zip(copied.named_parameters(), changed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_optimiser_step_works_after_pruning_in_place() -> None:
    model = mlp()
    model(X).sum().backward()  # stale gradients of the old shape must not stay
    pruned = graphprune.compile(model, 0.3, method="magnitude", example_inputs=X, inplace=True)
    optimiser = torch.optim.SGD(pruned.parameters(), lr=0.1)
    optimiser.step()
    pruned(X).sum().backward()
    optimiser.step()


def test_pruning_twice() -> None:
    model = llama()
    once = graphprune.compile(model, 0.2, method="magnitude")
    twice = graphprune.compile(once, 0.2, method="magnitude")
    first, second = graphprune.report(once), graphprune.report(twice)
    assert second.parameters_before == first.parameters_after == numel(once)
    assert second.parameters_after == numel(twice)
    assert second.history == [first]
    assert second.base_config.to_dict() == model.config.to_dict()
    assert first.attributes.keys() <= second.attributes.keys()
    thrice = graphprune.compile(twice, 0.1, method="magnitude", inplace=True)
    assert graphprune.report(thrice).history == [first, second]


# ---------------------------------------------------------------------------------------------------- on meta


def test_a_meta_model_gives_a_smaller_meta_model() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(llama().config)
    pruned = graphprune.compile(model, 0.3, method="random")
    assert all(p.is_meta for p in pruned.parameters())
    report = graphprune.report(pruned)
    assert report.oracle_error is None
    assert report.ratio == pytest.approx(0.3, abs=0.02)
    # The same plan makes the same shapes of real weights.
    real = graphprune.compile(llama(), plan=report.plan)
    shapes = {name: p.shape for name, p in real.named_parameters()}
    assert {name: p.shape for name, p in pruned.named_parameters()} == shapes


@pytest.mark.parametrize("method", ["magnitude", "l1", "wanda-sp"])
def test_a_meta_model_cannot_be_scored(method: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(llama().config)
    with pytest.raises(GraphPruneError, match="meta device"):
        graphprune.compile(model, 0.3, method=method, data=[{"input_ids": torch.zeros(1, 4, dtype=torch.long)}])


# --------------------------------------------------------------------------------------- plans, report, copies


@pytest.mark.parametrize("method", ["magnitude", "l1", "l2", "random"])
def test_the_same_call_gives_the_same_model(method: str) -> None:
    one, other = (graphprune.compile(toy(), 0.3, method=method, example_inputs=X) for _ in range(2))
    assert graphprune.report(one).plan.to_json() == graphprune.report(other).plan.to_json()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_seed_matters_where_there_is_a_draw() -> None:
    plans = [
        graphprune.report(graphprune.compile(mlp(), 0.3, example_inputs=X, method="random", seed=s)).plan
        for s in (0, 1)
    ]
    assert plans[0].keep != plans[1].keep


def test_the_global_seed_is_left_alone() -> None:
    model = mlp()
    state = torch.get_rng_state()
    graphprune.compile(model, 0.3, method="random", example_inputs=X)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_replayed_plan_gives_identical_weights() -> None:
    pruned = graphprune.compile(toy(), 0.3, method="magnitude", example_inputs=X)
    text = graphprune.report(pruned).plan.to_json()
    again = graphprune.compile(toy(), plan=graphprune.Plan.from_json(text), example_inputs=X)
    for (name, a), (_, b) in zip(pruned.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert graphprune.report(again).ratio == graphprune.report(pruned).ratio
    assert graphprune.report(again).oracle_error <= 1e-4


def test_a_pruned_model_can_be_copied() -> None:
    pruned = graphprune.compile(mlp(), 0.3, method="magnitude", example_inputs=X)
    twin = copy.deepcopy(pruned)
    assert torch.equal(twin(X), pruned(X))
    assert graphprune.report(twin).parameters_after == numel(twin)
    again = graphprune.compile(twin, 0.2, method="magnitude", example_inputs=X)
    assert len(graphprune.report(again).history) == 1


def test_what_the_report_says() -> None:
    model = llama()
    pruned = graphprune.compile(model, 0.3, method="magnitude")
    report = graphprune.report(pruned)
    assert report.parameters_before == numel(model)
    assert report.parameters_after == numel(pruned)
    assert report.bytes_before == 4 * numel(model)
    assert report.bytes_after == 4 * numel(pruned)
    assert report.ratio == 1 - numel(pruned) / numel(model) == pytest.approx(report.plan.ratio)
    assert report.ratio <= 0.3
    assert report.oracle_error is not None
    assert 0 <= report.oracle_error <= 1e-4
    assert report.widths == {n: (report.plan.sizes[n], len(k)) for n, k in report.plan.keep.items()}
    gate = "model.layers.1.mlp.gate_proj.weight[0]"
    assert report.widths[gate] == (48, pruned.model.layers[1].mlp.gate_proj.out_features)
    assert "looked up by index" in report.skipped["model.embed_tokens.weight[0]"]
    assert not set(report.skipped) & set(report.plan.keep)
    for attribute, value in report.attributes.items():
        holder = pruned.get_submodule(attribute.owner.split("@")[0])
        assert isinstance(value, int)
        assert holder is not None
    assert {"trace_model", "infer_axes", "rewrite", "verify"} <= set(report.seconds)
    assert sum(report.seconds.values()) <= report.total_seconds
    assert report.history == []
    assert report.base_config.to_dict() == model.config.to_dict()
    assert f"{numel(pruned):,}" in str(report)
    assert "oracle error" in str(report)


def test_unverified_is_said() -> None:
    pruned = graphprune.compile(mlp(), 0.3, method="magnitude", example_inputs=X, verify=False)
    assert graphprune.report(pruned).oracle_error is None
    assert "not verified" in str(graphprune.report(pruned))


def test_progress_names_every_pass() -> None:
    seen: list[str] = []
    pruned = graphprune.compile(mlp(), 0.3, method="magnitude", example_inputs=X, progress=seen.append)
    assert seen == list(graphprune.report(pruned).seconds)
    assert seen[0] == "check_weights"
    assert seen[-2:] == ["rewrite", "verify"]


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_inputs_come_in_any_form(form: Callable[[torch.Tensor], Any]) -> None:
    pruned = graphprune.compile(mlp(), 0.3, method="magnitude", example_inputs=form(X))
    assert torch.equal(
        pruned.last.weight, graphprune.compile(mlp(), 0.3, method="magnitude", example_inputs=X).last.weight
    )


def test_two_models_do_not_disturb_each_other() -> None:
    first, second = mlp(), toy()
    alone = graphprune.compile(first, 0.3, method="magnitude", example_inputs=X)
    graphprune.compile(second, 0.3, method="magnitude", example_inputs=X)
    again = graphprune.compile(first, 0.3, method="magnitude", example_inputs=X)
    for a, b in itertools.zip_longest(alone.parameters(), again.parameters()):
        assert torch.equal(a, b)


def test_outputs_in_any_container_are_proved() -> None:
    class Rich(Mlp):
        def forward(self, x: torch.Tensor) -> Any:
            hidden = self.first(x).relu()
            out = self.second(hidden)
            return {"out": self.last(out), "more": [out.sum(-1), (hidden.mean(1).sum(-1), 3, None)]}

    pruned = graphprune.compile(Rich(), 0.4, method="magnitude", example_inputs=X)
    found = pruned(X)
    assert set(found) == {"out", "more"}
    assert graphprune.report(pruned).oracle_error <= 1e-4


def test_no_output_tensor_is_refused() -> None:
    class Silent(Mlp):
        def forward(self, x: torch.Tensor) -> None:
            self.first(x)

    with pytest.raises(GraphPruneError, match="returns no tensor"):
        graphprune.compile(Silent(), 0.3, method="magnitude", example_inputs=X)


def test_the_public_names() -> None:
    for name in graphprune.__all__:
        if name not in ("load", "save"):  # they need what tests/io builds
            assert getattr(graphprune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        graphprune.prune  # noqa: B018


def test_the_report_names_the_passes_given() -> None:
    own = tuple(METHODS["magnitude"])
    pruned = graphprune.compile(toy(), 0.2, passes=own, example_inputs=X)
    assert graphprune.report(pruned).plan.method == ", ".join(one.name for one in own)
    pruned = graphprune.compile(toy(), 0.2, passes=own, method="mine", example_inputs=X)
    assert graphprune.report(pruned).plan.method == "mine"


def test_a_model_that_grows_says_so() -> None:
    report = graphprune.report(graphprune.compile(toy(), 0.2, method="magnitude", example_inputs=X))
    assert f"parameters (−{report.ratio:.2%})" in str(report)
    report.parameters_after = report.parameters_before * 11 // 10
    assert "parameters (+" in str(report)
