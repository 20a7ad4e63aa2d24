"""Odd but legal modules: each is pruned rightly (the oracle says so) or refused, and stays bitwise as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import X, check_every_axis, prunable, randomise, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphprune
from graphprune import GraphPruneError

Body = Callable[["Odd", Tensor], Any]


class Odd(nn.Module):
    """7 → 24 → 16 → 4; ``body`` does what it likes with the layers ``a``, ``b`` and ``c``."""

    def __init__(self, body: Body, setup: Callable[[Odd], Any] = lambda m: None):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(7, 24), nn.Linear(24, 16), nn.Linear(16, 4)
        self.calls, self.log = 0, []
        self.body = body
        setup(self)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)

    def rest(self, h: Tensor) -> Tensor:
        return self.c(self.b(h))


CASES: dict[str, tuple[Body, Callable[[Odd], Any], list[str]]] = {}
BOTH, ONLY_B = ["a.weight[0]", "b.weight[0]"], ["b.weight[0]"]


def case(*free: str, setup: Callable[[Odd], Any] = lambda m: None) -> Callable[[Body], Body]:
    """Register a forward, with the axes that must be found prunable in it."""

    def register(body: Body) -> Body:
        CASES[body.__name__] = (body, setup, list(free))
        return body

    return register


# ------------------------------------------------------------------------------------------------- written in place


@case("a.weight[0].2", "b.weight[0]", setup=lambda m: m.add_module("side", nn.Linear(7, 10)))
def adds_to_a_slice(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h[..., 4:14] += m.side(x)
    return m.rest(h.relu())


@case("a.weight[0].1", "b.weight[0]", setup=lambda m: m.add_module("side", nn.Linear(7, 10)))
def sets_a_slice(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h[..., :10] = m.side(x)
    return m.rest(h.relu())


@case(*BOTH)
def adds_along_the_sequence(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h[:, 1:] += h[:, :1].clone()
    return m.rest(h.relu())


@case(*BOTH)
def multiplies_a_transposed_view(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h.transpose(0, 2).mul_(torch.arange(5.0)[:, None])
    return m.rest(h.relu())


@case(*ONLY_B)
def numbers_a_transposed_view(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h.mT.mul_(torch.arange(24.0)[:, None])
    return m.rest(h.relu())


@case(*BOTH)
def turns_the_tensor_itself(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h.transpose_(1, 2)
    return m.rest(h.reshape(h.shape[0], h.shape[1], h.shape[2]).transpose(1, 2))


@case(*BOTH)
def adds_a_dimension_to_the_tensor_itself(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h.unsqueeze_(0)
    return m.rest(h.view(h.shape[1], h.shape[2], h.shape[3]))


@case(*ONLY_B)
def swaps_halves_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    kept = h[..., :12].clone()
    h[..., :12] = h[..., 12:]
    h[..., 12:] = kept
    return m.rest(h)


@case("a.weight[0]", "b.weight[0]")
def writes_through_chunks(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    first, second = h.chunk(2, -1)
    first.mul_(2)
    second.add_(first)
    return m.rest(h)


@case(*BOTH)
def fills_an_empty_tensor(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    out = torch.empty_like(h)
    for i in range(5):
        out[:, i] = h[:, 4 - i]
    return m.rest(out)


@case("a.weight[0].1", "b.weight[0]")
def fills_a_zero_tensor_in_parts(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    out = torch.zeros_like(h)
    out[..., :8] = h[..., :8] * 2
    out[..., 8:].copy_(h[..., 8:])
    return m.rest(out)


@case(*ONLY_B)
def writes_one_channel(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h[..., 0] = 1.0
    return m.rest(h)


@case("a.weight[0]", "b.weight[0]")
def multiplies_into_another_tensor(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    out = h.new_empty(h.shape)
    torch.mul(h, 2, out=out)
    total = h.new_empty(h.shape[:2])
    torch.sum(h, -1, out=total)
    return m.rest(out) + total[..., None]


@case(*BOTH)
def writes_into_its_input(m: Any, x: Tensor) -> Tensor:
    x.mul_(2)
    x[:, 1:] += 1
    return m.rest(m.a(x))


# ------------------------------------------------------------------------------------------------- changes its state


@case(*BOTH, setup=lambda m: (m.register_buffer("count", torch.zeros(())), m.register_buffer("run", torch.zeros(24))))
def counts_in_buffers(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    m.count += 1
    m.run.mul_(0.9).add_(h.sum((0, 1)), alpha=0.1)
    return m.rest(h * m.run)


@case(*BOTH, setup=lambda m: m.register_buffer("memory", torch.zeros(9, 5, 24)))
def writes_into_a_cache(m: Any, x: Tensor) -> Tensor:
    m.memory[:3] = m.a(x)
    return m.rest(m.memory[:3] * 2)


@case(*BOTH, setup=lambda m: m.register_buffer("run", torch.zeros(24)))
def replaces_a_buffer(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    m.run = 0.9 * m.run + h.sum((0, 1))
    return m.rest(h * m.run)


@case("a.weight[0].1", "b.weight[0]")
def changes_its_weights(m: Any, x: Tensor) -> Tensor:
    m.a.weight.mul_(0.5)
    m.b.weight[:, :3] *= 0.5
    return m.rest(m.a(x))


@case(*BOTH)
def counts_in_python(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    m.log.append(x.shape)
    h = m.a(x)
    return m.rest(h * 2 if m.calls == 1 else h)


@case(*ONLY_B, setup=lambda m: setattr(m, "cache", None))
def makes_a_constant_when_first_called(m: Any, x: Tensor) -> Tensor:
    if m.cache is None:
        m.cache = torch.ones(24) * 2
    return m.rest(m.a(x) * m.cache)


@case(*ONLY_B)
def makes_a_parameter_when_first_called(m: Any, x: Tensor) -> Tensor:
    if not hasattr(m, "gain"):
        m.gain = nn.Parameter(torch.ones(24))
    return m.rest(m.a(x) * m.gain)


@case(*BOTH)
def draws_random_numbers(m: Any, x: Tensor) -> Tensor:
    return m.rest(m.a(x)) + torch.rand(4)


@case(*ONLY_B)
def drops_out_even_in_eval_mode(m: Any, x: Tensor) -> Tensor:
    return m.rest(F.dropout(m.a(x), 0.5, training=True))


# ------------------------------------------------------------------------------------------------- odd weights


@case(*BOTH)
def uses_a_weight_in_two_layouts(m: Any, x: Tensor) -> Tensor:
    h = F.linear(m.a(x).relu(), m.b.weight)
    return m.rest(F.linear(h.relu(), m.b.weight.t()))


def _alias(m: Any) -> None:
    m.other = nn.Linear(7, 24)
    m.other.weight.data = m.a.weight.data


@case(*BOTH, setup=_alias)
def two_parameters_in_one_memory(m: Any, x: Tensor) -> Tensor:
    return m.rest(m.a(x).relu() * m.other(x).sin())


def _views(m: Any) -> None:
    flat = torch.randn(7 * 24 + 24 * 4)
    m.parts = nn.ParameterList([nn.Parameter(flat[:168].view(24, 7)), nn.Parameter(flat[168:].view(24, 4).T)])


@case("parts.0[0]", setup=_views)
def parameters_are_views(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.parts[0]).relu(), m.parts[1])


@case("p.v[1]", setup=lambda m: setattr(m, "p", nn.ParameterDict({"w": torch.randn(24, 7), "v": torch.randn(3, 24)})))
def parameters_in_a_dict(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.p["w"]).relu(), m.p["v"])


class _Affine(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2 + 0.1


@case(
    "a.weight[0]", "b.bias[0]", setup=lambda m: nn.utils.parametrize.register_parametrization(m.b, "weight", _Affine())
)
def parametrized(m: Any, x: Tensor) -> Tensor:
    return m.rest(m.a(x))


@case("a.weight[0]", setup=lambda m: nn.utils.parametrizations.spectral_norm(m.b))
def spectrally_normalised(m: Any, x: Tensor) -> Tensor:
    return m.rest(m.a(x))


@case("a.weight[0]", "b.bias[0]", setup=lambda m: nn.utils.spectral_norm(m.b))
def spectrally_normalised_by_a_hook(m: Any, x: Tensor) -> Tensor:
    return m.rest(m.a(x))


@case("a.bias[0]", "b.weight[0]", setup=lambda m: nn.utils.weight_norm(m.a))
def weights_normalised_by_a_hook(m: Any, x: Tensor) -> Tensor:
    return m.rest(m.a(x))


@case(*BOTH, setup=lambda m: m.register_buffer("z", torch.randn(24, dtype=torch.complex64)))
def complex_buffer(m: Any, x: Tensor) -> Tensor:
    return m.rest((m.a(x) * m.z).real)


@case(*BOTH, setup=lambda m: (setattr(m, "e", nn.Parameter(torch.zeros(0))), m.register_buffer("f", torch.zeros(0, 4))))
def empty_tensors(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.rest(torch.cat([h, h[..., :0]], -1)) + m.e.sum()


@case(*BOTH, "c.weight[0]", setup=lambda m: setattr(m, "gain", nn.Parameter(torch.tensor(0.5))))
def a_parameter_without_dimensions(m: Any, x: Tensor) -> Tensor:
    return m.rest(m.a(x) * m.gain).sum() * m.gain


# ------------------------------------------------------------------------------------------------- odd calls


@case(*BOTH)
def returns_a_nest(m: Any, x: Tensor) -> Any:
    y = m.rest(m.a(x))
    return {"y": [y, None, {"z": (y * 2, "text", 3)}], "nothing": None, "x": x}


@case(*BOTH)
def returns_one_tensor_thrice(m: Any, x: Tensor) -> Any:
    y = m.rest(m.a(x))
    return y, y, y.view(-1)


@case()
def returns_a_parameter(m: Any, x: Tensor) -> Any:
    return m.b.weight, m.rest(m.a(x))


@case(*BOTH)
def checkpointed(m: Any, x: Tensor) -> Tensor:
    return m.c(checkpoint(lambda h: m.b(m.a(h).relu()), x, use_reentrant=False))


@case(*BOTH)
def called_with_other_weights(m: Any, x: Tensor) -> Tensor:
    doubled = {"weight": m.a.weight * 2, "bias": m.a.bias}
    return m.rest(torch.func.functional_call(m.a, doubled, (x,)).relu())


@case(*BOTH)
def under_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        h = m.a(x)
    return m.rest(h.float())


@case(*BOTH)
def under_grad_modes(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.a(x)
    with torch.enable_grad():
        return m.rest(h)


@case("m.weight[0]", setup=lambda m: (m.add_module("r", nn.LSTM(7, 16, 2)), m.add_module("m", nn.Linear(16, 20))))
def recurrent(m: Any, x: Tensor) -> Tensor:
    return m.m(m.r(x)[0]).relu().sum(-1)


@case(*BOTH, setup=lambda m: object.__setattr__(m.a, "parent", m))
def a_child_knows_its_parent(m: Any, x: Tensor) -> Tensor:
    return m.a.parent.rest(m.a(x))


# ------------------------------------------------------------------------------------------------- decides by a size


@case(*BOTH)
def checks_a_size(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    if h.shape[-1] != m.b.in_features:
        raise ValueError("no")
    return m.rest(h)


@case(*ONLY_B)
def branches_on_a_size(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.rest(h * 2 if h.shape[-1] == 24 else h)


@case(*ONLY_B)
def branches_on_a_bound(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.rest(h * 2 if h.size(-1) >= 20 else h)


@case(*BOTH)
def branches_on_a_bound_that_holds_anyway(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.rest(h if h.size(-1) > 24 else h * 2)


@case(*ONLY_B)
def computes_with_a_remainder(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.rest(h * (h.shape[-1] % 5))


@case(*BOTH)
def checks_a_remainder_that_is_always_0(m: Any, x: Tensor) -> Tensor:
    h = torch.cat([m.a(x), m.a(x).sin()], -1)
    if h.shape[-1] % 2:
        raise ValueError("no")
    return m.rest(h[..., : h.shape[-1] // 2])


@case(*ONLY_B)
def computes_with_the_number_of_elements(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.rest(h / h.numel())


@case(*ONLY_B)
def computes_with_a_length(m: Any, x: Tensor) -> Tensor:
    return m.rest(m.a(x) * len(m.a.weight))


@case(*ONLY_B)
def computes_with_a_converted_size(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.rest(h * {24: 2.0}.get(int(h.shape[-1]), 1.0))


@case(*ONLY_B)
def computes_with_the_bits_of_a_size(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.rest(h + (h.shape[-1] >> 1) + math.log2(abs(h.shape[-1])))


def build(name: str) -> Odd:
    body, setup, _ = CASES[name]
    torch.manual_seed(0)
    return randomise(Odd(body, setup)).eval()  # type: ignore[return-value]


@pytest.mark.parametrize("name", CASES)
def test_odd_modules(name: str) -> None:
    model, x = build(name), X.clone()
    unchanged, keys = snapshot(model), set(vars(model))
    assert list(prunable(model, x)) == CASES[name][2]
    check_every_axis(model, x)
    unchanged()
    assert (model.calls, model.log, set(vars(model))) == (0, [], keys)
    assert torch.equal(x, X)


def writes(name: str) -> bool:
    found = list(CASES)
    return found.index("adds_to_a_slice") <= found.index(name) <= found.index("changes_its_weights")


@pytest.mark.parametrize("name", [name for name in CASES if writes(name)])
def test_writing_in_half_precision(name: str) -> None:
    """The oracle converts to a finer dtype; what is written to may not become a converted copy."""
    model = build(name).bfloat16()
    unchanged = snapshot(model)
    check_every_axis(model, X.bfloat16())
    unchanged()


def test_the_pruned_model_is_as_if_never_run() -> None:
    for name in ("counts_in_python", "counts_in_buffers", "writes_into_a_cache", "replaces_a_buffer"):
        pruned: Any = graphprune.compile(build(name), 0.3, method="magnitude", example_inputs=X)
        assert (pruned.calls, pruned.log) == (0, [])
        assert all(not buffer.any() for buffer in pruned.buffers())


def test_calibration_does_not_change_the_model() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = build("counts_in_buffers")

        def forward(self, x: Tensor) -> Tensor:
            return self.odd(x)

    model = Named().eval()
    unchanged = snapshot(model)
    graphprune.compile(model, 0.3, method="wanda-sp", data=[{"x": X}], example_inputs={"x": X})
    unchanged()


def _write_alias(m: Any, x: Tensor) -> Tensor:
    m.a.weight.mul_(0.5)
    return m.rest(m.other(x))


REFUSED: dict[str, tuple[Body, Callable[[Odd], Any], str]] = {
    "number": (lambda m, x: 3, lambda m: None, "returns no tensor"),
    "None": (lambda m, x: None, lambda m: None, "returns no tensor"),
    "writes to memory that another parameter shares": (_write_alias, _alias, "whose memory other.weight shares"),
    "complex parameter": (
        lambda m, x: m.rest((m.a(x) * m.z).real),
        lambda m: setattr(m, "z", nn.Parameter(torch.randn(24, dtype=torch.complex64))),
        "z is complex",
    ),
    "lazy": (lambda m, x: m.lazy(x), lambda m: m.add_module("lazy", nn.LazyLinear(3)), "lazy.weight has no shape yet"),
    "numpy": (
        lambda m, x: m.rest(m.a(x) * torch.from_numpy(m.a(x).numpy())),
        lambda m: None,
        r"test_adversarial\.py:\d+ in",
    ),
    "text": (
        lambda m, x: m.rest(m.a(x) * (2 if f"{m.a(x).shape[-1]}" == "24" else 1)),
        lambda m: None,
        "uses a size where nothing can follow it",
    ),
    "hook that changes shapes": (
        lambda m, x: m.rest(m.a(x)),
        lambda m: (
            setattr(m, "b", nn.Linear(48, 16)),
            m.a.register_forward_hook(lambda _, args, out: torch.cat([out, out.sin()], -1)),
        ),
        "hooks are not run while tracing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    body, setup, message = REFUSED[name]
    torch.manual_seed(0)
    model = Odd(body, setup).eval()
    state = copy.copy(vars(model))
    unchanged = snapshot(model) if name != "lazy" else lambda: None
    with pytest.raises(GraphPruneError, match=message):
        graphprune.compile(model, 0.3, method="magnitude", example_inputs=X)
    unchanged()
    assert vars(model) == state


# ------------------------------------------------------------------------------------------------- torch's own blocks


class Wrapped(nn.Module):
    """Any module between two linears of its width, 32."""

    def __init__(self, inner: nn.Module, call: Callable[[Any, Tensor], Any]):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(7, 32), inner, nn.Linear(32, 4)
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.last(self.call(self.inner, self.first(x)))


def _layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 48, **options)


def _shared() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 32))


BLOCKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Any], list[int]]] = {
    "attention": (lambda: nn.MultiheadAttention(32, 4, batch_first=True), lambda m, h: m(h, h, h)[0], [32]),
    "attention without weights": (
        lambda: nn.MultiheadAttention(32, 4),
        lambda m, h: m(h, h, h, need_weights=False)[0],
        [32],
    ),
    "attention over another width": (
        lambda: nn.MultiheadAttention(32, 4, kdim=7, vdim=7, bias=False),
        lambda m, h: m(h, h[..., :7], h[..., :7])[0],
        [32],
    ),
    "encoder": (lambda: nn.TransformerEncoder(_layer(batch_first=True), 2), lambda m, h: m(h), [48, 48]),
    "encoder, norm first": (lambda: nn.TransformerEncoder(_layer(norm_first=True), 2), lambda m, h: m(h), [48, 48]),
    "transformer": (lambda: nn.Transformer(32, 4, 1, 1, 48), lambda m, h: m(h, h.sin()), [48, 48]),
    "called twice, with two shapes": (_shared, lambda m, h: m(m(h)) + m(h[:, 0])[:, None], [32, 20]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_torch(name: str) -> None:
    make, call, sizes = BLOCKS[name]
    torch.manual_seed(0)
    model = randomise(Wrapped(make(), call)).eval()
    unchanged = snapshot(model)
    found = prunable(model, X)
    check_every_axis(model, X)
    unchanged()
    assert sorted(found.values()) == sorted(sizes), found
