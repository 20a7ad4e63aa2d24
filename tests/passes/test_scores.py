"""Scores against brute force: one structure at a time, from the full weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import analyse, randomise, toy
from torch import nn

import graphprune
from graphprune import GraphPruneError
from graphprune.ir.axes import expand_mask, find
from graphprune.ir.program import NodeGroup, Program
from graphprune.passes import run_passes
from graphprune.passes.methods import method_names
from graphprune.passes.score import score_by

X = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(3))


class Attention(nn.Module):
    """Heads with an inner width, an MLP, and a batch norm: products, inner axes, several slices a structure."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 4, 3
        self.q, self.k, self.v = (nn.Linear(7, 12) for _ in range(3))
        self.o = nn.Linear(12, 7)
        self.up = nn.Linear(7, 10)
        self.down = nn.Linear(10, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def split(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        y = (q @ k.mT).softmax(-1) @ v
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


def model() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Attention()).eval()


def scored(net: nn.Module, **options: Any) -> Program:
    program = analyse(net, {"x": X}, **options)
    run_passes(program, (score_by(program.options.method),))
    return program


def owned(program: Program, group: NodeGroup, index: int) -> dict[str, list[tuple[int, torch.Tensor]]]:
    """Every slice of a structure: parameter → (dimension, positions)."""
    mask = torch.ones(group.size, dtype=torch.bool)
    mask[index] = False
    slices: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, dims in program.need("axes").tensors.items():
        for dim, axis in enumerate(dims):
            gone = ~expand_mask(axis, {find(group.axis): mask}.get)
            if gone.any():
                slices.setdefault(name, []).append((dim, gone.nonzero().flatten()))
    return slices


@pytest.mark.parametrize(
    ("method", "combine"),
    [
        ("l1", lambda pieces: sum(p.abs().sum() for p in pieces)),
        ("l2", lambda pieces: sum(p.square().sum() for p in pieces).sqrt()),
    ],
)
def test_magnitude_sums_over_all_slices_of_a_structure(method: str, combine: Any) -> None:
    net = model()
    parameters = dict(net.named_parameters())
    program = scored(net, method=method)
    assert {g.size for g in program.need("prunable")} == {4, 3, 10}
    for group in program.need("prunable"):
        for index in range(group.size):
            slices = owned(program, group, index)
            pieces = [parameters[n].index_select(d, where) for n, dims in slices.items() for d, where in dims]
            found = program.need("scores")[group.name][..., index]
            if found.ndim == 0:
                assert found.item() == pytest.approx(combine(pieces).item(), rel=1e-5)
                continue
            # Channels of a head: a slice has one position per head.
            for head in range(4):
                of_head = [
                    parameters[n].index_select(d, where[head : head + 1])
                    for n, dims in slices.items()
                    for d, where in dims
                ]
                assert found[head].item() == pytest.approx(combine(of_head).item(), rel=1e-5)


def test_peak_to_peak_sums_the_reach_of_the_slices_of_matrices() -> None:
    net = model()
    matrices = {name: p.detach() for name, p in net.named_parameters() if p.ndim > 1}
    program = scored(net, method="peak-to-peak", inner_axes=False)
    assert {g.size for g in program.need("prunable")} == {4, 10}
    for group in program.need("prunable"):
        for index in range(group.size):
            wanted = 0.0
            for name, dims in owned(program, group, index).items():
                for dim, where in dims if name in matrices else ():
                    other = matrices[name].movedim(dim, 0)
                    reach = other.amax(1) - other.amin(1)
                    wanted += float(reach[where].sum() / reach.max())
            assert float(program.need("scores")[group.name][index]) == pytest.approx(wanted, rel=1e-5)


def test_a_head_owns_rows_biases_and_columns() -> None:
    program = scored(model(), method="l1")
    heads = next(g for g in program.need("prunable") if g.size == 4)
    slices = owned(program, heads, 1)
    assert {name: [d for d, _ in dims] for name, dims in slices.items()} == {
        "q.weight": [0], "q.bias": [0], "k.weight": [0], "k.bias": [0], "v.weight": [0], "v.bias": [0], "o.weight": [1]
    }  # fmt: skip
    assert all(where.tolist() == [3, 4, 5] for dims in slices.values() for _, where in dims)


def test_low_precision_is_scored_in_float32() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5000, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    net = Wide().to(torch.bfloat16)
    nn.init.ones_(net.a.weight)
    program = analyse(net, {"x": torch.zeros(2, 5000, dtype=torch.bfloat16)}, method="l1")
    run_passes(program, (score_by(program.options.method),))
    assert program.need("scores")["a.weight[0]"].min() > 4999  # a sum in bfloat16 stops at 256


def _wanda_by_hooks(net: nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Per consumer linear: mean |W_ij| over rows times the root mean square of input j, shape (in_features,)."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            net(**batch)
    for handle in handles:
        handle.remove()
    rows = {name: torch.cat(pieces) for name, pieces in seen.items()}
    return {name: net.get_submodule(name).weight.abs().mean(0) * x.square().mean(0).sqrt() for name, x in rows.items()}


def test_wanda_sp_is_weight_times_activation() -> None:
    net = model()
    batches = [{"x": torch.randn(2, 6, 7)}, {"x": torch.randn(5, 4, 7) * 3}]
    by_feature = _wanda_by_hooks(net, batches)
    program = scored(net, method="wanda-sp", data=batches)
    scores = {g.size: program.need("scores")[g.name] for g in program.need("prunable") if g.name in program.scores}
    assert set(scores) == {4, 3, 10}
    assert torch.allclose(scores[10], by_feature["down"], rtol=1e-4)
    assert torch.allclose(scores[4], by_feature["o"].view(4, 3).sum(1), rtol=1e-4)
    widths = [g for g in program.need("prunable") if g.size == 3]
    of_values = next(g for g in widths if any(str(m) == "o.weight[1]" for m in g.members))
    assert torch.allclose(program.scores[of_values.name], by_feature["o"].view(4, 3), rtol=1e-4)


class Batched(nn.Module):
    """Matrices in batches: one input for all of them, one of each, one matrix for all inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 7, 10))
        self.down = nn.Parameter(torch.randn(3, 10, 6))
        self.last = nn.Parameter(torch.randn(1, 6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = (x.flatten(0, 1) @ self.up).relu() @ self.down
        return (hidden @ self.last).sum(0)


def test_wanda_sp_of_a_batch_of_matrices() -> None:
    """The statistics are those of each matrix: of all its rows, whatever they were broadcast to."""
    torch.manual_seed(0)
    net = Batched()
    batches = [{"x": torch.randn(2, 6, 7)}, {"x": torch.randn(5, 4, 7) * 3}]
    program = scored(net, method="wanda-sp", data=batches)
    x = torch.cat([batch["x"].flatten(0, 1) for batch in batches])
    hidden = (x @ net.up).relu()
    out = hidden @ net.down
    expected = net.down.abs().mean(2) * hidden.square().mean(1).sqrt()
    assert torch.allclose(program.need("scores")["up[2]"], expected, rtol=1e-4)
    expected = net.last[0].abs().mean(1) * out.square().mean((0, 1)).sqrt()
    assert torch.allclose(program.need("scores")["down[2]"], expected, rtol=1e-4)


def test_an_axis_without_a_consumer_weight_has_no_wanda_score_and_says_so() -> None:
    program = scored(model(), method="wanda-sp", data=[{"x": X}])
    assert "the criterion wanda-sp has no score for it" in program.need("skipped").values()


def test_scoring_leaves_the_mode_and_the_hooks_alone() -> None:
    net = model().train()
    calls: list[int] = []
    net.up.register_forward_hook(lambda *_: calls.append(1))
    scored(net, method="wanda-sp", data=[{"x": X}])
    assert calls == []
    assert all(module.training for module in net.modules())
    net(X)
    assert calls == [1]


def test_random_scores_are_seeded() -> None:
    first, again, other = (scored(model(), method="random", seed=seed).need("scores") for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_activations_that_are_not_finite_are_refused() -> None:
    with pytest.raises(GraphPruneError, match="not finite"):
        scored(model(), method="wanda-sp", data=[{"x": X * float("inf")}])


def test_methods_are_listed() -> None:
    assert {"l1", "l2", "magnitude", "random", "wanda-sp"} <= set(method_names())


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 7)
        self.rest = model()

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.rest(self.table(input_ids))


def _tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) % 50 for letter in text]}


def _texts(net: nn.Module, **options: Any) -> Program:
    options = {"method": "wanda-sp", "tokenizer": _tokenizer, "samples": 6, "length": 8} | options
    program = analyse(net, {"input_ids": torch.zeros(2, 5, dtype=torch.long)}, **options)
    run_passes(program, (score_by(program.options.method),))
    return program


def test_texts_are_cut_into_rows_of_tokens() -> None:
    net = Tokens().eval()
    rows: list[tuple[int, ...]] = []
    plain = net.forward

    def forward(input_ids: torch.Tensor) -> torch.Tensor:
        rows.append(tuple(input_ids.shape))
        return plain(input_ids)

    program = analyse(
        net,
        {"input_ids": torch.zeros(2, 5, dtype=torch.long)},
        method="wanda-sp",
        tokenizer=_tokenizer,
        samples=6,
        length=8,
        data=["The quick brown fox jumps over the dog."],
    )
    net.forward = forward  # type: ignore[method-assign]
    run_passes(program, (score_by(program.options.method),))
    assert sum(n for n, _ in rows) == 6
    assert {length for _, length in rows} == {8}


def test_too_little_text_is_refused() -> None:
    with pytest.raises(GraphPruneError, match="has 5 tokens; at least 16 are needed"):
        _texts(Tokens(), data=["short"])


def test_a_foreign_tokenizer_is_refused() -> None:
    with pytest.raises(GraphPruneError, match="not this model's tokenizer"):
        _texts(Tokens(), data=["x" * 40], tokenizer=lambda text, **_: {"input_ids": [99] * len(text)})


def test_activations_of_a_float64_model() -> None:
    model = toy().double()
    batches = [{"x": X.double()}]
    pruned = graphprune.compile(model, 0.2, method="wanda-sp", data=batches, example_inputs=X.double())
    assert graphprune.report(pruned).oracle_error < 1e-9
