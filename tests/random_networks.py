"""Random networks: small programs, written as Python source, over a pool of tensors.

:func:`networks` draws a :class:`Network`. Its forward is a list of lines; every line takes tensors of the pool and
puts a new one into it. While it is drawn each line is run at once on small tensors, so shapes are known and nothing
has to be computed twice. A network prints as the program that rebuilds it.

Sizes are few and small on purpose: heads, batch, widths and factors often coincide. How a size is *written* (a
literal, an attribute, the shape of a tensor, arithmetic) is drawn too, for that decides whether it can follow.
"""

from __future__ import annotations

import linecache
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from helpers import Attention, Block, Mlp, randomise
from torch import Tensor, nn

WIDTHS = (2, 3, 4, 6, 8, 12)
_MODULES = {"torch": torch, "nn": nn, "F": F, "math": math, "Attention": Attention, "Block": Block, "Mlp": Mlp}
_serial = count()


@dataclass(frozen=True)
class Network:
    """The lines of ``__init__`` and ``forward`` of a module, and the shape of its input.

    ``tokens`` is the number of token ids when the input holds those, else 0. ``steps`` says what it is made of.
    """

    init: tuple[str, ...]
    forward: tuple[str, ...]
    shape: tuple[int, ...]
    tokens: int = 0
    seed: int = 0
    steps: tuple[str, ...] = field(default=(), compare=False)

    def __repr__(self) -> str:
        def lines(which: tuple[str, ...]) -> str:
            return "".join(f"        {line!r},\n" for line in which)

        return (
            f"Network(\n    init=(\n{lines(self.init)}    ),\n    forward=(\n{lines(self.forward)}    ),\n"
            f"    shape={self.shape}, tokens={self.tokens}, seed={self.seed},\n)"
        )

    @property
    def source(self) -> str:
        init = "".join(f"        {line}\n" for line in ("super().__init__()", *self.init))
        forward = "".join(f"        {line}\n" for line in self.forward)
        return f"class Net(nn.Module):\n    def __init__(self):\n{init}\n    def forward(self, x):\n{forward}"

    def build(self) -> tuple[nn.Module, Tensor]:
        """The network in float64, with no two indices alike, and an input."""
        torch.manual_seed(self.seed)
        file = f"<network {next(_serial)}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        space: dict[str, Any] = dict(_MODULES)
        exec(compile(self.source, file, "exec"), space)
        model = randomise(space["Net"](), self.seed).double().eval()
        x = torch.randint(self.tokens, self.shape) if self.tokens else torch.randn(self.shape, dtype=torch.float64)
        return model, x


class Builder:
    """A network while it is drawn. Steps speak in texts: names of the pool, and expressions over them."""

    def __init__(self, random: Random):
        self.random = random
        self.init: list[str] = []
        self.forward: list[str] = []
        self.pool: list[str] = []
        self.used: set[str] = set()
        self.held = nn.Module()
        self.values: dict[str, Any] = {**_MODULES, "self": self.held}
        self.numbers: dict[int, list[str]] = {}
        self.made: dict[str, str] = {}
        self._names = count()

    # what is drawn

    def choose(self, options: Sequence[Any]) -> Any:
        return self.random.choice(list(options))

    def between(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def flip(self, one_in: int = 2) -> bool:
        return self.random.randrange(one_in) == 0

    def shuffle(self, items: Iterable[Any]) -> list[Any]:
        return self.random.sample(list(items), k=len(list(items)))

    def width(self) -> int:
        return self.choose(WIDTHS)

    def factors(self, n: int) -> tuple[int, int]:
        a = self.choose([i for i in range(1, n + 1) if n % i == 0])
        return a, n // a

    # what is written

    def name(self, stem: str) -> str:
        return f"{stem}{next(self._names)}"

    def run(self, line: str) -> None:
        with torch.no_grad():
            exec(line, self.values)

    def attribute(self, stem: str, text: str) -> str:
        """``self.<stem>N = text``."""
        name = f"self.{self.name(stem)}"
        self.init.append(f"{name} = {text}")
        self.run(self.init[-1])
        return name

    def module(self, text: str) -> str:
        """A submodule; now and then one that is there already, called once more."""
        if text in self.made and self.flip(3):
            return self.made[text]
        self.made[text] = self.attribute("m", text)
        return self.made[text]

    def parameter(self, *shape: int) -> str:
        return self.module(
            f"nn.Parameter(torch.randn({', '.join(map(str, shape))}))" if shape else "nn.Parameter(torch.randn(()))"
        )

    def buffer(self, text: str) -> str:
        return self.attribute("b", f"nn.Buffer({text})")

    def linear(self, i: int, o: int) -> str:
        return self.module(f"nn.Linear({i}, {o}{'' if self.flip(3) else ', bias=False'})")

    def number(self, n: int) -> str:
        """``n`` as an attribute, perhaps one that means something else and happens to be ``n``."""
        known = self.numbers.setdefault(n, [])
        if known and self.flip():
            return self.choose(known)
        known.append(self.attribute("n", str(n)))
        return known[-1]

    def size(self, n: int, *texts: str) -> str:
        """``n`` somehow: one of ``texts``, an attribute, now and then a literal."""
        kind = self.between(0, 9)
        if kind == 0:
            return str(n)
        if texts and kind <= 5:
            return self.choose(texts)
        return self.number(n)

    def let(self, text: str) -> str:
        """``hN = text``; the tensor stays out of the pool."""
        name = self.name("h")
        self.write(f"{name} = {text}")
        return name

    def write(self, line: str) -> None:
        self.forward.append(line)
        self.run(line)

    def put(self, text: str) -> str:
        """``hN = text``, into the pool, unless it has become too large or is no ordinary tensor."""
        name = self.let(text)
        value = self.values[name]
        if value.numel() <= 3000 and 2 <= value.ndim <= 5 and value.is_floating_point():
            self.pool.append(name)
        return name

    # what is known

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def rank(self, name: str) -> int:
        return len(self.shape(name))

    def pick(self, wanted: Callable[[tuple[int, ...]], bool] = lambda shape: True) -> str | None:
        """A tensor of the pool, rather one of the last."""
        fitting = [name for name in self.pool if wanted(self.shape(name))][-5:]
        if not fitting:
            return None
        name = fitting[-1 - self.between(0, len(fitting) - 1)]
        self.used.add(name)
        return name

    def dim(self, x: str) -> int:
        """A dimension, most often the last."""
        return -1 if self.flip() else self.between(0, self.rank(x) - 1)

    def lead(self, x: str) -> str:
        """All sizes of ``x`` but the last, as arguments."""
        return self.choose(
            [
                f"*{x}.shape[:-1]",
                ", ".join(f"{x}.shape[{i}]" for i in range(self.rank(x) - 1)),
                ", ".join(f"{x}.size({i})" for i in range(self.rank(x) - 1)),
            ]
        )


Step = Callable[[Builder, str], None]
STEPS: dict[str, tuple[int, int | None, Step]] = {}  # name → (weight, rank of its tensor or any, step)


def step(weight: int = 2, rank: int | None = None) -> Callable[[Step], Step]:
    def register(function: Step) -> Step:
        STEPS[function.__name__.strip("_")] = (weight, rank, function)
        return function

    return register


# Linear layers and other contractions with weights


@step(12)
def linear(b: Builder, x: str) -> None:
    n = b.shape(x)[-1]
    if b.flip(3):
        b.put(f"{x} + {b.linear(n, n)}({x})")
    else:
        b.put(f"{b.linear(n, b.width())}({x})")


@step(5)
def weights(b: Builder, x: str) -> None:
    n, o = b.shape(x)[-1], b.width()
    form = b.choose(
        [
            "F.linear({x}, {a})",
            "{x} @ {a}.T",
            "{x} @ {b}",
            "torch.matmul({x}, {b}) + {c}",
            "torch.einsum('...i,oi->...o', {x}, {a})",
            "torch.tensordot({x}, {b}, 1)",
        ]
    )
    names = {"a": lambda: b.parameter(o, n), "b": lambda: b.parameter(n, o), "c": lambda: b.parameter(o)}
    b.put(form.format(x=x, **{key: make() for key, make in names.items() if "{" + key + "}" in form}))


@step(3)
def tied(b: Builder, x: str) -> None:
    """A weight used a second time, as it is or transposed."""
    n = b.shape(x)[-1]
    back = [
        m
        for t, m in b.made.items()
        if t.startswith("nn.Linear(") and b.values["self"].get_submodule(m[5:]).weight.shape[0] == n
    ]
    if back and b.flip():
        m = b.choose(back)
        b.put(
            b.choose(
                [f"{x} @ {m}.weight", f"F.linear({x}, {m}.weight.T)", f"F.linear({x}, {m}.weight.transpose(0, 1))"]
            )
        )
    else:
        w = b.width()
        a, c = b.attribute("m", f"nn.Linear({n}, {w})"), b.attribute("m", f"nn.Linear({n}, {w})")
        b.init.append(f"{c}.weight = {a}.weight")
        b.run(b.init[-1])
        b.put(f"{a}({x}) {b.choose('+*')} {c}({x}.{b.choose(['tanh', 'sin'])}())")


@step(6)
def mlp(b: Builder, x: str) -> None:
    n, w = b.shape(x)[-1], b.width()
    kind = b.between(0, 4)
    if kind == 0:
        hidden = b.let(f"{b.linear(n, w)}({x}).relu()")
    elif kind == 1:
        hidden = b.let(f"F.silu({b.linear(n, w)}({x})) * {b.linear(n, w)}({x})")
    elif kind == 2:
        hidden = b.let(f"F.glu({b.linear(n, 2 * w)}({x}), {b.choose([-1, b.rank(x) - 1])})")
    elif kind == 3:
        both = b.let(f"{b.linear(n, 2 * w)}({x})")
        one, two = b.name("h"), b.name("h")
        half = b.size(w, f"{both}.shape[-1] // 2")
        b.write(f"{one}, {two} = {both}.{b.choose(['chunk(2, -1)', f'split({half}, dim=-1)', 'tensor_split(2, -1)'])}")
        hidden = b.let(f"F.gelu({one}) * {two}")
    else:
        both = b.let(f"{b.linear(n, 2 * w)}({x})")
        half = b.size(w, f"{both}.shape[-1] // 2")
        hidden = b.let(f"{both}[..., :{half}].sigmoid() * {both}[..., {half}:]")
    b.put(f"{x} + {b.linear(w, n)}({hidden})" if b.flip() else f"{b.linear(w, n)}({hidden})")


@step(2)
def low_rank(b: Builder, x: str) -> None:
    n, o, r = b.shape(x)[-1], b.width(), b.choose([2, 3, 4])
    b.put(f"{b.linear(n, o)}({x}) + {b.linear(r, o)}({b.linear(n, r)}({x})) * 0.5")


@step(2)
def bilinear(b: Builder, x: str) -> None:
    y = b.pick(lambda shape: shape[:-1] == b.shape(x)[:-1]) or x
    b.put(f"{b.module(f'nn.Bilinear({b.shape(x)[-1]}, {b.shape(y)[-1]}, {b.width()})')}({x}, {y})")


@step(2, 3)
def addmm(b: Builder, x: str) -> None:
    n, o = b.shape(x)[-1], b.width()
    flat = b.let(f"{x}.view(-1, {b.size(n, f'{x}.shape[-1]', f'{x}.size(-1)')})")
    out = b.let(f"torch.addmm({b.parameter(o)}, {flat}, {b.parameter(n, o)})")
    b.put(f"{out}.view({b.lead(x)}, {b.size(o, '-1')})")


@step(2, 3)
def products_of_pairs(b: Builder, x: str) -> None:
    y = b.pick(lambda s: len(s) == 3 and s[0] == b.shape(x)[0] and s[2] == b.shape(x)[2]) or x
    b.put(
        b.choose(
            [
                f"{x} @ {y}.mT",
                f"torch.bmm({x}, {y}.transpose(1, 2))",
                f"torch.einsum('bsc,btc->bst', {x}, {y})",
                f"({x} @ {y}.mT).softmax(-1) @ {y}",
                f"torch.einsum('bsc,btc->bcst', {x}, {y}).flatten(1, 2)",
                f"torch.baddbmm({b.parameter(1, 1, 1)}, {x}, {y}.mT)",
            ]
        )
    )


@step(2, 3)
def batch_of_matrices(b: Builder, x: str) -> None:
    """A product over another dimension than the last: tokens are mixed."""
    s, w = b.shape(x)[1], b.width()
    b.put(
        b.choose(
            [
                f"{b.parameter(w, s)} @ {x}",
                f"torch.einsum('bsc,ts->btc', {x}, {b.parameter(w, s)})",
                f"{b.linear(s, w)}({x}.mT).mT",
                f"{b.linear(s, s)}({x}.transpose(1, 2)).transpose(1, 2) + {x}",
            ]
        )
    )


@step(2)
def einsum_features(b: Builder, x: str) -> None:
    n, h, d = b.shape(x)[-1], b.choose([1, 2, 3]), b.choose([2, 3, 4])
    if b.rank(x) != 3:
        return
    y = b.let(f"torch.einsum('bsc,chd->bshd', {x}, {b.parameter(n, h, d)})")
    b.put(y if b.flip() else f"torch.einsum('bshd,hdo->bso', {y}, {b.parameter(h, d, b.width())})")


# Attention


@step(9, 3)
def attention(b: Builder, x: str) -> None:
    n = b.shape(x)[-1]
    kv, group, d = b.choose([1, 2, 3]), b.choose([1, 1, 2, 3]), b.choose([2, 3, 4])
    heads = kv * group
    manual = b.flip()
    dv = d if b.flip() else b.choose([2, 3, 4])
    H, K, D, V = b.number(heads), b.number(kv), b.number(d), b.number(dv)

    def split(t: str, n_text: str, d_text: str) -> str:
        form = b.between(0, 3)
        if form == 0:
            n_text, d_text = b.choose([(n_text, d_text), ("-1", d_text), (n_text, "-1")])
            return f"{t}.view({x}.shape[0], {x}.shape[1], {n_text}, {d_text}).transpose(1, 2)"
        if form == 1:
            return f"{t}.unflatten(-1, ({n_text}, -1)).transpose(1, 2)"
        if form == 2:
            return f"{t}.reshape({b.lead(x)}, {n_text}, {t}.shape[-1] // {n_text}).permute(0, 2, 1, 3)"
        return f"{t}.unflatten(-1, (-1, {d_text})).permute(0, 2, 1, 3)"

    if group == 1 and b.flip():
        dv, V = d, D
        q, k, v = fused_projection(b, x, n, heads, d, H, D, split)
    else:
        q = b.let(split(b.let(f"{b.linear(n, heads * d)}({x})"), H, D))
        k = b.let(split(b.let(f"{b.linear(n, kv * d)}({x})"), K, D))
        v = b.let(split(b.let(f"{b.linear(n, kv * dv)}({x})"), K, V))
    if d % 2 == 0 and b.flip():
        q, k = rotary(b, q, k, b.shape(x)[1], d)
    gqa = not manual and group > 1 and b.flip()
    if group > 1 and not gqa:
        G, form = b.number(group), b.between(0, 3)
        k, v = (b.let(repeat_kv(b, t, K, G, form)) for t in (k, v))
    if manual:
        scale = b.choose(["0.4", f"{D} ** -0.5", f"{q}.shape[-1] ** -0.5", "1.0"])
        weights = b.let(f"{q} @ {k}.{b.choose(['mT', 'transpose(-1, -2)', 'transpose(2, 3)'])} * {scale}")
        if b.flip(3):
            mask = b.buffer(f"torch.ones({b.shape(x)[1]}, {b.shape(x)[1]}).tril() == 0")
            weights = b.let(f"{weights}.masked_fill({mask}, -1e9)")
        out = b.let(f"{weights}.softmax(-1) @ {v}")
    else:
        options = [", scale=0.4", ", scale=0.7, is_causal=True", ", scale=0.4", "", f", scale={D} ** -0.5"]
        out = b.let(
            f"F.scaled_dot_product_attention({q}, {k}, {v}{b.choose(options)}{', enable_gqa=True' if gqa else ''})"
        )
    joined = b.choose(
        [
            "flatten(2)",
            f"reshape({b.lead(x)}, -1)",
            f"reshape({b.lead(x)}, {H} * {V})",
            f"contiguous().view({x}.shape[0], {x}.shape[1], {H} * {V})",
        ]
    )
    out = b.let(f"{out}.transpose(1, 2).{joined}")
    b.put(f"{x} + {b.linear(heads * dv, n)}({out})" if b.flip() else out)


def fused_projection(b: Builder, x: str, n: int, heads: int, d: int, H: str, D: str, split: Any) -> list[str]:
    both = b.let(f"{b.linear(n, 3 * heads * d)}({x})")
    names = [b.name("h") for _ in range(3)]
    q, k, v = names
    form = b.between(0, 4)
    if form == 0:
        b.write(f"{q}, {k}, {v} = {both}.chunk(3, -1)")
        return [b.let(split(t, H, D)) for t in names]
    if form == 1:
        b.write(f"{q}, {k}, {v} = {both}.split({b.size(heads * d, f'{H} * {D}', f'{both}.shape[-1] // 3')}, dim=2)")
        return [b.let(split(t, H, D)) for t in names]
    if form == 2:
        b.write(
            f"{q}, {k}, {v} = {both}.view({b.lead(x)}, 3, {H}, {b.choose([D, '-1'])}).permute(2, 0, 3, 1, 4).unbind(0)"
        )
    elif form == 3:
        b.write(f"{q}, {k}, {v} = {both}.view({b.lead(x)}, {H}, 3, {D}).transpose(1, 2).unbind(-2)")
    else:
        b.write(f"{q}, {k}, {v} = {both}.unflatten(-1, ({H}, -1)).transpose(1, 2).chunk(3, dim=-1)")
    return names


def repeat_kv(b: Builder, t: str, K: str, G: str, form: int) -> str:
    if form == 0:
        return f"{t}.repeat_interleave({G}, dim=1)"
    if form == 1:
        return f"{t}[:, :, None].expand(-1, -1, {G}, -1, -1).flatten(1, 2)"
    if form == 2:
        return (
            f"{t}[:, :, None, :, :].expand({t}.shape[0], {t}.shape[1], {G}, {t}.shape[2], {t}.shape[3])"
            f".reshape({t}.shape[0], {t}.shape[1] * {G}, {t}.shape[2], {t}.shape[3])"
        )
    return f"{t}.repeat(1, {G}, 1, 1)"  # in another order, which is a network as well


def rotary(b: Builder, q: str, k: str, length: int, d: int) -> tuple[str, str]:
    form = b.between(0, 2)
    if form == 0:
        cos, sin = b.buffer(f"torch.randn({length}, {d})"), b.buffer(f"torch.randn({length}, {d})")
    else:
        freq = b.buffer(f"torch.randn({d // 2})")
        angle = b.let(f"torch.outer(torch.arange({length}).to({freq}), {freq})")
        angle = b.let(f"torch.cat([{angle}, {angle}], dim=-1)" if form == 1 else f"{angle}.repeat(1, 2)")
        cos, sin = b.let(f"{angle}.cos()"), b.let(f"{angle}.sin()")
    how = b.between(0, 2)

    def turn(t: str) -> str:
        if how == 0:
            half = b.choose([f"{t}.shape[-1] // 2", b.number(d // 2)])
            turned = b.let(f"torch.cat([-{t}[..., {half}:], {t}[..., :{half}]], dim=-1)")
        elif how == 1:
            one, two = b.name("h"), b.name("h")
            b.write(f"{one}, {two} = {t}.chunk(2, dim=-1)")
            turned = b.let(f"torch.cat((-{two}, {one}), -1)")
        else:
            turned = b.let(f"torch.stack([-{t}[..., 1::2], {t}[..., ::2]], -1).flatten(-2)")
        return b.let(f"{t} * {cos} + {turned} * {sin}")

    return turn(q), turn(k)


@step(1, 3)
def attention_of_torch(b: Builder, x: str) -> None:
    h, d = b.choose([1, 2]), b.choose([2, 3])
    m = b.module(f"nn.MultiheadAttention({h * d}, {h}, batch_first=True)")
    y = b.let(f"{b.linear(b.shape(x)[-1], h * d)}({x})")
    b.put(f"{m}({y}, {y}, {y}, need_weights={b.flip()})[0]")


# Experts


@step(4, 3)
def experts(b: Builder, x: str) -> None:
    n, e, w = b.shape(x)[-1], b.choose([2, 3, 4]), b.choose([2, 3, 4, 6])
    gate = b.let(f"{b.linear(n, e)}({x}).softmax(-1)")
    form = b.between(0, 3)
    if form == 0:
        h = b.let(f"torch.einsum('bsc,ehc->bseh', {x}, {b.parameter(e, w, n)}).relu()")
        b.put(f"torch.einsum('bseh,ech,bse->bsc', {h}, {b.parameter(e, n, w)}, {gate})")
    elif form == 1:
        E = b.number(e)
        flat = b.let(f"{x}.reshape(-1, {x}.shape[-1])")
        many = b.choose(
            [
                f"{flat}.repeat({E}, 1).view({E}, -1, {x}.shape[-1])",
                f"{flat}.expand({E}, -1, -1)",
                f"{flat}[None].expand({E}, *{flat}.shape)",
            ]
        )
        h = b.let(f"torch.bmm({many}, {b.parameter(e, n, w)}).tanh()")
        h = b.let(f"torch.bmm({h}, {b.parameter(e, w, n)}) + {b.parameter(e, 1, n)}")
        shape = b.choose([f"{x}.shape", f"*{x}.shape", f"{x}.size()"])
        b.put(f"({h} * {gate}.flatten(0, 1).t()[..., None]).sum(0).view({shape})")
    elif form == 2:
        h = b.let(f"({x}[:, None] @ {b.parameter(e, w, n)}.mT).relu()")
        h = b.let(f"{h} @ {b.parameter(e, n, w)}.transpose(1, 2)")
        b.put(f"({h} * {gate}.permute(0, 2, 1).unsqueeze(-1)).sum(dim=1) + {x}")
    else:
        both = b.let(f"torch.matmul({x}.unsqueeze(1), {b.parameter(e, n, 2 * w)})")
        one, two = b.name("h"), b.name("h")
        b.write(f"{one}, {two} = {both}.chunk(2, dim=-1)")
        h = b.let(f"({one}.sigmoid() * {two}) @ {b.parameter(e, w, n)}")
        b.put(f"torch.einsum('besc,bse->bsc', {h}, {gate})")


@step(1, 3)
def routed_experts(b: Builder, x: str) -> None:
    n, e, w = b.shape(x)[-1], b.choose([2, 3]), b.choose([2, 3, 4])
    gate = b.let(f"{b.linear(n, e)}({x}).softmax(-1)")
    value, index = b.name("h"), b.name("h")
    b.write(f"{value}, {index} = {gate}.topk(1, dim=-1)")
    if b.flip():
        mask = b.let(f"torch.zeros_like({gate}).scatter({b.choose([-1, 2])}, {index}, {value})")
    else:
        mask = b.let(f"F.one_hot({index}.squeeze(-1), {b.number(e)}).to({gate}) * {value}")
    out = [f"{b.linear(w, n)}({b.linear(n, w)}({x}).relu()) * {mask}[..., {i}:{i + 1}]" for i in range(e)]
    b.put(" + ".join(out))


# Convolutions and images


@step(3, 3)
def conv1d(b: Builder, x: str) -> None:
    turn = b.choose([".transpose(1, 2)", ".mT", ""])
    n = b.shape(x)[1] if not turn else b.shape(x)[2]
    b.put(f"{conv(b, 1, n)}({x}{turn}){turn}")


@step(8, 4)
def conv2d(b: Builder, x: str) -> None:
    b.put(f"{conv(b, 2, b.shape(x)[1])}({x})")


def conv(b: Builder, rank: int, n: int) -> str:
    groups = b.choose([1, 1, 1, *(g for g in range(1, n + 1) if n % g == 0)])
    o = groups * b.choose([1, 2, 3, 4])
    bias = "" if b.flip(3) else ", bias=False"
    kind = b.between(0, 4)
    if kind == 0:
        return b.module(f"nn.ConvTranspose{rank}d({n}, {o}, 3, padding=1, groups={groups}{bias})")
    k = b.choose([1, 3])
    return b.module(f"nn.Conv{rank}d({n}, {o}, {k}, padding={k // 2}, groups={groups}{bias})")


@step(3, 4)
def channel_norm(b: Builder, x: str) -> None:
    n = b.shape(x)[1]
    groups = b.choose([g for g in range(1, n + 1) if n % g == 0])
    if b.shape(x)[2] * b.shape(x)[3] * (n // groups) < 2:
        return
    b.put(b.choose([f"{b.module(f'nn.BatchNorm2d({n})')}({x})", f"{b.module(f'nn.GroupNorm({groups}, {n})')}({x})"]))


@step(2, 4)
def pooled(b: Builder, x: str) -> None:
    b.put(
        b.choose(
            [
                f"F.adaptive_avg_pool2d({x}, 1).flatten(1)",
                f"{x}.mean((2, 3))",
                f"{x}.flatten(2).amax(-1)",
                f"F.avg_pool2d({x}, 3, 1, 1)",
                f"F.max_pool2d({x}, 3, 1, 1)",
                f"F.interpolate({x}, scale_factor=2)",
                f"{x}.sum(dim=(-1, -2))",
                f"F.adaptive_max_pool2d({x}, 1).squeeze(-1).squeeze(-1)",
            ]
        )
    )


@step(2, 4)
def shuffled(b: Builder, x: str) -> None:
    """Channel shuffle, squeeze-and-excitation, pixel shuffle."""
    n = b.shape(x)[1]
    g, w = b.factors(n)
    form = b.between(0, 2)
    if form == 0:
        b.put(f"{x}.unflatten(1, ({b.size(g)}, {b.size(w, '-1')})).transpose(1, 2).flatten(1, 2)")
    elif form == 1:
        b.put(f"{x} * {b.linear(n, n)}({x}.mean((-1, -2))).sigmoid()[:, :, None, None]")
    elif n % 4 == 0:
        b.put(f"F.pixel_shuffle({x}, 2)")


# Norms


@step(5)
def norm(b: Builder, x: str) -> None:
    n = b.shape(x)[-1]
    b.put(
        b.choose(
            [
                f"{b.module(f'nn.LayerNorm({n})')}({x})",
                f"F.layer_norm({x}, ({b.size(n, f'{x}.shape[-1]')},))",
                f"{x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + 0.1) * {b.parameter(n)}",
                f"{b.module(f'nn.RMSNorm({n}, eps=0.1)')}({x})",
                f"{x} / ({x}.norm(dim=-1, keepdim=True) + 1)",
                f"({x} - {x}.mean({b.dim(x)}, keepdim=True))",
            ]
        )
    )


@step(2, 3)
def norm_of_channels(b: Builder, x: str) -> None:
    n = b.shape(x)[-1]
    groups = b.choose([g for g in range(1, n + 1) if n % g == 0])
    b.put(
        b.choose(
            [
                f"{b.module(f'nn.BatchNorm1d({n})')}({x}.transpose(1, 2)).transpose(1, 2)",
                f"{b.module(f'nn.GroupNorm({groups}, {n}, eps=0.1)')}({x}.mT).mT",
                f"F.layer_norm({x}, {x}.shape[1:], eps=0.1)",
                f"F.instance_norm({x}.mT, eps=0.1).mT",
            ]
        )
    )


@step(2)
def norm_of_heads(b: Builder, x: str) -> None:
    h, d = b.factors(b.shape(x)[-1])
    y = b.let(f"{x}.unflatten(-1, ({b.size(h)}, {b.size(d, '-1')}))")
    y = b.let(
        b.choose(
            [
                f"{b.module(f'nn.LayerNorm({d}, eps=0.1)')}({y})",
                f"{y} * {b.parameter(d)}",
                f"{y}.softmax(-2)",
                f"{y}.cumsum(-1)",
            ]
        )
    )
    b.put(f"{y}.{b.choose(['flatten(-2)', 'flatten(-2, -1)'])}")


# Views


@step(4)
def split_and_join(b: Builder, x: str) -> None:
    h, d = b.factors(b.shape(x)[-1])
    H = b.size(h)
    D = b.size(d, "-1", f"{x}.shape[-1] // {H}")
    y = b.let(
        b.choose(
            [
                f"{x}.view({b.lead(x)}, {H}, {D})",
                f"{x}.reshape({b.lead(x)}, {H}, {D})",
                f"{x}.unflatten(-1, ({H}, {D}))",
            ]
        )
    )
    if b.flip():
        y = b.let(f"{y}.{b.choose(['transpose(-1, -2)', 'mT', 'swapaxes(-1, -2)'])}")
    if b.flip():
        b.put(f"{y}.tanh()")
    else:
        total = b.size(
            h * d, f"{H} * {d if D == '-1' else D}", "-1", f"{x}.shape[-1]", f"{y}.shape[-2] * {y}.shape[-1]"
        )
        b.put(
            b.choose(
                [
                    f"{y}.flatten(-2)",
                    f"{y}.reshape({b.lead(x)}, {total})",
                    f"{y}.reshape({x}.shape)",
                    f"{y}.reshape_as({x})",
                ]
            )
        )


@step(2)
def rejoin(b: Builder, x: str) -> None:
    """Two neighbouring dimensions become one."""
    if b.rank(x) < 3:
        return
    i = b.between(0, b.rank(x) - 2)
    shape = [f"{x}.shape[{j}]" for j in range(b.rank(x))]
    shape[i : i + 2] = [b.choose(["-1", f"{x}.shape[{i}] * {x}.shape[{i + 1}]"])]
    b.put(b.choose([f"{x}.flatten({i}, {i + 1})", f"{x}.reshape({', '.join(shape)})"]))


@step(3)
def permute(b: Builder, x: str) -> None:
    order = b.shuffle(range(b.rank(x)))
    i, j = b.between(0, b.rank(x) - 1), b.between(-b.rank(x), -1)
    b.put(
        b.choose([f"{x}.permute({', '.join(map(str, order))})", f"{x}.transpose({i}, {j})", f"{x}.movedim({i}, {j})"])
    )


@step(5)
def pieces(b: Builder, x: str) -> None:
    """Cut in pieces, do something to each, and join them in some order, perhaps not all."""
    dim = b.dim(x)
    n = b.shape(x)[dim]
    if n < 2:
        return
    cut = b.between(1, n - 1)
    sizes = [cut, n - cut]
    if sizes[1] > 1 and b.flip():
        cut = b.between(1, sizes[1] - 1)
        sizes[1:] = [cut, sizes[1] - cut]
    form = b.between(0, 4)
    if form == 0:
        names = [b.name("h") for _ in sizes]
        b.write(f"{', '.join(names)} = {x}.split([{', '.join(b.size(s) for s in sizes)}], dim={dim})")
    elif form == 1:
        k = b.choose([2, 3])
        names = [b.name("h") for _ in range(len(torch.empty(b.shape(x)).chunk(k, dim)))]
        b.write(f"{', '.join(names)}, = {x}.chunk({k}, {dim})")
    elif form == 2:
        k = b.between(1, n)
        names = [b.name("h") for _ in range(len(torch.empty(b.shape(x)).split(k, dim)))]
        b.write(f"{', '.join(names)}, = {x}.split({b.size(k)}, {dim})")
    else:
        names, at = [], 0
        colons = "..., " if dim == -1 else ":, " * dim
        for size in sizes:
            low, high = (
                b.size(at) if at else "",
                b.size(at + size) if at + size < n else b.choose(["", f"{x}.shape[{dim}]"]),
            )
            if form == 3:
                names.append(b.let(f"{x}[{colons}{low}:{high}]"))
            else:
                names.append(b.let(f"{x}.narrow({dim}, {low or 0}, {b.size(size)})"))
            at += size
    names = [b.let(f"{name}.{b.choose(['sin', 'cos', 'tanh', 'relu'])}()") if b.flip() else name for name in names]
    if len({b.shape(name) for name in names}) == 1 and b.flip():
        b.put(
            b.choose([" + ", " * "]).join(names)
            if b.flip()
            else f"torch.stack([{', '.join(names)}], {b.choose([0, 1, -1])})"
        )
        return
    names = b.shuffle(names)
    if len(names) > 1 and b.flip(4):
        names = names[1:]
    b.put(f"torch.cat([{', '.join(names)}], dim={dim})")


@step(3)
def join_two(b: Builder, x: str) -> None:
    dim = b.dim(x) % b.rank(x)
    rest = lambda s: (*s[:dim], *s[dim + 1 :])  # noqa: E731
    y = b.pick(lambda s: len(s) == b.rank(x) and rest(s) == rest(b.shape(x))) or x
    same = b.shape(x) == b.shape(y)
    after = b.choose([".sum(0)", ".flatten(-2)", "", ".mean(1)", ".select(1, 0)"])
    if same and b.flip():
        b.put(f"torch.stack(({x}, {y}), {b.choose([0, 1, -1])}){after}")
    else:
        b.put(f"torch.{b.choose(['cat', 'concat'])}(({x}, {y}), {dim})")


@step(2)
def ranges(b: Builder, x: str) -> None:
    dim = b.dim(x)
    n = b.shape(x)[dim]
    colons = "..., " if dim == -1 else ":, " * dim
    low = b.between(0, n - 1)
    high = b.between(low + 1, n)
    b.put(
        b.choose(
            [
                f"{x}[{colons}{b.size(low)}:{b.size(high)}]",
                f"{x}[{colons}:{b.size(high)}]",
                f"{x}[{colons}{b.size(low)}:]",
                f"{x}[{colons}-{b.size(n - low)}:]",
                f"{x}.narrow({dim}, {b.size(low)}, {b.size(high - low)})",
                f"{x}[{colons}{low}]",
                f"{x}.select({dim}, {low})",
                f"{x}[{colons}::2]",
                f"{x}[{colons}{low}::2]",
                f"{x}[{colons}:{high}:3]",
                f"{x}.narrow({dim}, -{b.size(n - low)}, {b.size(high - low)})",
                f"{x}[{colons}-{b.size(n - low)}:{f'-{b.size(n - high)}' if high < n else ''}]",
                f"{x}.select({dim}, -1)",
                f"{x}[{colons}{b.number(low)}]",
                f"torch.cat([{x}[{colons}:0], {x}], {dim})",
                f"{x}.tensor_split([{low}], {dim})[1]",
                f"{x}.split_with_sizes([{b.size(high)}, {n - high}], {dim})[0]",
                f"{x}[{colons}{b.size(low)}:{x}.shape[{dim}]]",
                f"{x}[{colons}{x}.shape[{dim}] // 2:]",
                f"{x}[{colons}:{x}.shape[{dim}] - 1]",
                f"{x}[{colons}1:-1]",
                f"{x}[{colons}{b.size(low)}:{b.size(low)} + {b.size(high - low)}]",
            ]
        )
    )


@step(3)
def copies(b: Builder, x: str) -> None:
    dim, times = b.dim(x) % b.rank(x), b.choose([2, 3])
    n = b.size(times)

    def at(place: int, count: int, other: str) -> str:
        return ", ".join(n if i == place else other for i in range(count))

    same, more = at(dim, b.rank(x), "1"), b.rank(x) + 1
    joined = f".flatten({dim}, {dim + 1})"
    b.put(
        b.choose(
            [
                f"{x}.repeat({same})",
                f"{x}.tile(({same},))",
                f"{x}.repeat_interleave({n}, {dim})",
                f"{x}.unsqueeze({dim}).expand({at(dim, more, '-1')})",
                f"{x}.unsqueeze({dim}).expand({at(dim, more, '-1')}){joined}",
                f"{x}.unsqueeze({dim + 1}).repeat({at(dim + 1, more, '1')}){joined}",
            ]
        )
    )


@step(2)
def moved(b: Builder, x: str) -> None:
    dim, n = b.dim(x), b.between(1, 3)
    before, behind = b.between(0, 2), b.between(-1, 2)
    b.put(
        b.choose(
            [
                f"{x}.roll({n}, {dim})",
                f"{x}.flip({dim})",
                f"{x}.roll(shifts=({n},), dims=({dim},))",
                f"F.pad({x}, ({before}, {behind + 1}))",
                f"F.pad({x}, (0, 0, {before}, 1))",
                f"F.pad({x}, (0, -{x}.shape[-1] % 4))",
                f"F.pad({x}, ({before}, 0), value=0.5)",
                f"torch.roll({x}, {n}, dims={dim})",
                f"torch.flip({x}, [{dim}])",
            ]
        )
    )


@step(1)
def ones(b: Builder, x: str) -> None:
    b.put(
        b.choose(
            [
                f"{x}.unsqueeze({b.between(0, b.rank(x))})",
                f"{x}.squeeze()",
                f"{x}[:, None]",
                f"{x}[..., None].squeeze(-1)",
                f"{x}.unsqueeze(1).squeeze(1)",
            ]
        )
    )


# Pointwise and broadcasting


@step(5)
def unary(b: Builder, x: str) -> None:
    b.put(
        b.choose(
            [
                f"{x}.relu()",
                f"F.gelu({x})",
                f"{x}.tanh()",
                f"{x}.sigmoid() * {x}",
                f"F.leaky_relu({x}, 0.1)",
                f"F.dropout({x}, 0.5, self.training)",
                f"{x}.clamp(-1, 1)",
                f"F.softplus({x})",
                f"{x}.to({x}.dtype)",
                f"{x}.exp().clamp(max=3)",
                f"{b.module('nn.PReLU()')}({x})",
                f"{b.module(f'nn.PReLU({b.shape(x)[1]})')}({x})",
                f"{x}.float().to({x}.dtype)" if b.flip(4) else f"{x}.cos()",
            ]
        )
    )


@step(6)
def binary(b: Builder, x: str) -> None:
    def fits(s: tuple[int, ...]) -> bool:
        return all(p == q or 1 in (p, q) for p, q in zip(reversed(s), reversed(b.shape(x)), strict=False))

    y = b.pick(fits) or x
    b.put(
        b.choose(
            [
                f"{x} + {y}",
                f"{x} * {y}",
                f"{x} - {y}",
                f"torch.maximum({x}, {y})",
                f"torch.where({x} > 0, {x}, {y})",
                f"torch.addcmul({x}, {x}, {y}.tanh())",
                f"{x} / (1 + {y} ** 2)",
                f"torch.lerp({x}, {y}, 0.3)",
            ]
        )
    )


@step(4)
def with_parameter(b: Builder, x: str) -> None:
    s = b.shape(x)
    shape = b.choose([s[-1:], (1,), (), (s[-2], 1), (1, s[-1]), s[-2:], (1,) * len(s), (s[1], *([1] * (len(s) - 2)))])
    b.put(
        f"{x} {b.choose('+*')} {b.parameter(*shape)}"
        if b.flip()
        else f"{x} * {b.buffer('torch.randn(' + ', '.join(map(str, shape or (1,))) + ')')}"
    )


@step(2)
def gate(b: Builder, x: str) -> None:
    n = b.shape(x)[-1]
    b.put(
        b.choose(
            [
                f"{x} * {b.linear(n, 1)}({x}).sigmoid()",
                f"{x} * {b.linear(n, n)}({x}).sigmoid()",
                f"{x} * {b.linear(n, n)}({x}.mean(1, keepdim=True)).sigmoid()",
                f"{x} * {b.linear(n, 1)}({x}).softmax(1)",
            ]
        )
    )


@step(3)
def factors_by_tuple(b: Builder, x: str) -> None:
    """Sizes kept in a tuple or a list; heads by chunks; a weight per head."""
    h, d = b.factors(b.shape(x)[-1])
    sizes = b.attribute("n", b.choose([f"({h}, {d})", f"[{h}, {d}]", f"torch.Size([{h}, {d}])"]))
    y = b.let(f"{x}.{b.choose(['reshape', 'view'])}(*{x}.shape[:-1], *{sizes})")
    form = b.between(0, 4)
    if form == 0:
        b.put(f"torch.einsum('...hd,hde->...he', {y}, {b.parameter(h, d, b.choose([1, 2, 3]))}).flatten(-2)")
    elif form == 1:
        b.put(f"({y} * {b.parameter(h, 1)}).sum(-2)")
    elif form == 2:
        b.put(
            f"({y}.unsqueeze(-2) @ {b.parameter(h, d, d)}).squeeze(-2)"
            f".reshape(*{x}.shape[:-1], {sizes}[0] * {sizes}[1])"
        )
    elif form == 3:
        b.put(f"torch.cat([{y}.select(-2, i) for i in range({h})][::-1], -1)")
    else:
        b.put(f"{y}.mean(-2)")


@step(2)
def outer_product(b: Builder, x: str) -> None:
    y = b.pick(lambda s: len(s) == b.rank(x) and s[:-1] == b.shape(x)[:-1]) or x
    if b.shape(x)[-1] * b.shape(y)[-1] <= 36:
        b.put(f"({x}.unsqueeze(-1) * {y}.unsqueeze(-2)){b.choose(['.flatten(-2)', '', '.sum(-1)', '.mT.flatten(-2)'])}")


@step(2)
def masked(b: Builder, x: str) -> None:
    shape = ", ".join(map(str, b.choose([b.shape(x)[-1:], b.shape(x)[-2:], b.shape(x)])))
    mask = b.buffer(f"torch.randn({shape}) > 0")
    b.put(
        b.choose(
            [
                f"{x}.masked_fill({mask}, 0.5)",
                f"torch.where({mask}, {x}, {x}.sin())",
                f"{x} * {mask}",
                f"{x}.masked_fill({x} > 1, 0.0)",
            ]
        )
    )


@step(3)
def in_place(b: Builder, x: str) -> None:
    n = b.shape(x)[-1]
    cut = b.between(0, n - 1)
    y = b.let(b.choose([f"{x}.clone()", f"{x} * 1.5", f"torch.empty_like({x}).copy_({x})"]))
    b.write(
        b.choose(
            [
                f"{y}.add_(0.5)",
                f"{y} += {x}.sin()",
                f"{y}[..., {b.size(cut)}:] = 0.25",
                f"{y}[:, 0] = 0.5",
                f"{y}[..., :{b.size(cut + 1)}] *= 2.0",
                f"{y}.relu_()",
                f"{y}[:, :1] += 1.0",
                f"{y}[..., {cut}] = 1.0",
                f"{y}.mul_({b.parameter(n)})",
                f"{y}.masked_fill_({y} > 0.5, 0.1)",
                f"{y}.zero_()",
                f"{y}.clamp_(-1, 1)",
                f"{y}[{y} > 0.5] = 0.1",
                f"{y}[:, [0]] = 1.0",
                f"{y}[..., [0]] = 1.0",
                f"{y}.copy_({x}[..., :1])",
                f"{y}[...] = {x}.sin()",
                f"{y}.index_fill_(-1, torch.tensor([0]), 0.5)",
                f"{y}.index_add_(-1, torch.tensor([{n - 1}]), {x}[..., :1])",
                f"{y}.softmax(-1)",
                f"{y}.transpose_(0, -1).unsqueeze_(0)",
                f"{y}.cumsum_(-1)",
                f"{y}.tril_()",
                f"{y}.narrow(-1, 0, {b.size(cut + 1)}).add_(1.0)",
                f"{y}.unflatten(-1, (1, -1)).mul_(2.0)",
                f"{y}.select(-1, {cut}).fill_(0.5)",
                f"{y}.fill_(0.5)",
                f"{y}.sub_({x}.mean(-1, keepdim=True))",
                f"{y}.transpose(-1, -2)[..., 0].add_(1.0)",
                f"{y}[..., {b.size(cut)}:] = {x}[..., {b.size(cut)}:].cos()",
            ]
        )
    )
    b.put(f"{y} + {x}" if b.flip() else f"{y} * 1.0")


@step(3)
def constants(b: Builder, x: str) -> None:
    n = b.shape(x)[-1]
    N = b.size(n, f"{x}.shape[-1]", f"{x}.size(-1)")
    b.put(
        b.choose(
            [
                f"{x} + torch.ones({N}).to({x})",
                f"{x} + torch.zeros_like({x})",
                f"{x} * torch.full(({N},), 0.5).to({x})",
                f"{x} + {x}.new_ones({N})",
                f"{x} + torch.arange({N}).to({x})",
                f"{x} * {n} ** -0.5",
                f"{x} * {N} ** -0.5",
                f"{x} / {N}",
                f"{x} * {N}",
                f"{x} + torch.linspace(0, 1, {N}).to({x})",
                f"{x} + torch.ones({b.lead(x)}, 1).to({x})",
                f"{x} @ torch.eye({N}).to({x})",
                f"torch.cat([{x}, {x}.new_zeros({b.lead(x)}, 1)], -1)",
                f"{x} * (2.0 if {x}.shape[-1] > {n - 1} else 0.5)",
                f"{x}[..., :max({N}, 1)]",
                f"{x} + float({N} % 2)",
                f"{x} * ({N} & 3)",
            ]
        )
    )


@step(4)
def numbers(b: Builder, x: str) -> None:
    """What Python does with sizes beside handing them to an operator.

    Left out is what reads an int without asking it, where tracing cannot look: ``range(n)``, ``items[n]``,
    ``math.log(n)``, ``math.gcd``, ``math.isqrt``, ``x.shape.numel()``. The oracle refuses those networks.
    """
    n = b.shape(x)[-1]
    size = b.choose([f"{x}.shape[-1]", b.number(n)])
    other = b.number(b.choose([2, 3]))
    b.put(
        b.choose(
            [
                f"{x} * int({size})",
                f"{x} * math.sqrt({size})",
                f"{x} / {x}.numel()",
                f"{x} / {x}.nelement()",
                f"{x} * round({size} / 2)",
                f"{x} * abs({size})",
                f"{x} * (+{size})",
                f"{x} * torch.tensor({size}).to({x})",
                f"{x} * torch.tensor([float({size})]).to({x})",
                f"{x} * {x}.new_tensor({size})",
                f"{x} * {x}.new_full((1,), {size})",
                f"{x} * sum({x}.shape[1:])",
                f"{x} * math.prod({x}.shape)",
                f"{x} * len({x}.mT)",
                f"{x} * len({x}.transpose(0, -1))",
                f"{x} * (1.5 if {size} % 2 else 0.5)",
                f"{x} * (1.5 if {size} & 1 else 0.5)",
                f"{x} * (1.5 if {size} in (2, 4, 8) else 0.5)",
                f"{x} * {{{n}: 2.0}}.get({size}, 1.0)",
                f"{x} * max({size}, {other})",
                f"{x}[..., : min({size}, {other})]",
                f"{x} * divmod({size}, 2)[0]",
                f"{x} * (~{size})",
                f"{x} * pow({size}, 2)",
                f"{x} * ({size} << 1)",
                f"{x} * float({size} // 2)",
                f"{x} * -(-{size} // 3)",
                f"{x} ** {other}",
                f"torch.pow({x}.abs() + 0.5, 1 / {size})",
                f"torch.full_like({x}, {size}) * {x}",
                f"{x}.clamp(max={size})",
                f"{x} * (2.0 if {size} == {other} else 1.0)",
                f"{x}.reshape(*{x}.shape[:-1], int({size}))",
                f"{x}.view({x}.shape[:-1] + ({size},))",
                f"{x}.reshape([*{x}.shape[:-1], {size}])",
                f"{x}.reshape(list({x}.shape))",
                f"{x}.reshape(len({x}), -1)",
                f"{x}.reshape({x}.numel() // {x}.shape[-1], {x}.shape[-1])",
                f"{x}.reshape(math.prod({x}.shape[:-1]), -1)",
                f"sum({x}[..., i : i + 1] for i in range({size}))",
                f"torch.cat([{x}[..., i, None] for i in reversed(range({size}))], -1)",
                f"torch.stack([t for t in {x}], -1)",
                f"torch.cat({x}.chunk({size}, -1), 0)",
                f"{x} + torch.ones(()).to({x}) * {size}",
            ]
        )
    )


@step(2, 3)
def blocks(b: Builder, x: str) -> None:
    """Three equal blocks, which are traced once."""
    n = b.shape(x)[-1]
    heads = b.choose([h for h in (1, 2, 3) if n % h == 0])
    block = b.choose([f"Mlp({n}, {b.width()})", f"Block({n}, {heads}, {b.width()})", f"Attention({n}, {heads})"])
    many = b.attribute("m", f"nn.ModuleList({block} for _ in range({b.choose([2, 3, 4])}))")
    out = b.name("h")
    b.write(f"{out} = {x}")
    b.write(f"for block in {many}: {out} = {b.choose([f'{out} + block({out})', f'block({out})'])}")
    b.put(f"{out}.tanh()")


@step(3)
def made_weights(b: Builder, x: str) -> None:
    """Weights that are computed: cut, joined, scaled, factorised, made by another layer."""
    n, o = b.shape(x)[-1], b.width()
    k = b.between(1, n)
    m = b.linear(n, o)
    b.put(
        b.choose(
            [
                f"F.linear({x}, {m}.weight * {b.parameter(o, 1)})",
                f"F.linear({x}, {m}.weight * {b.parameter(n)}.softmax(0))",
                f"F.linear({x}[..., :{b.size(k)}], {m}.weight[:, :{b.size(k)}])",
                f"F.linear({x}, torch.cat([{m}.weight, {b.parameter(2, n)}], 0))",
                f"F.linear({x}, {b.parameter(o, 2)} @ {b.parameter(2, n)})",
                f"{x} @ torch.outer({b.parameter(n)}, {b.parameter(o)})",
                f"F.linear({x}, {b.parameter(o * n)}.view({b.size(o)}, {b.size(n, '-1', f'{x}.shape[-1]')}))",
                f"F.linear({x}, {m}.weight / {m}.weight.norm(dim=1, keepdim=True))",
                f"F.linear({x}, {m}.weight / {m}.weight.norm(dim=0, keepdim=True))",
                f"F.linear({x}, {m}.weight - {m}.weight.mean())",
                f"F.linear({x}, {m}.weight, {b.parameter(o)}.exp())",
                f"F.linear({x}, {b.linear(3, o * n)}({b.parameter(3)}).view({o}, -1))",
                f"({x}.unsqueeze(-1) * {b.parameter(n, o)}).sum(-2)",
                f"({x}.unsqueeze(-2) * {b.parameter(o, n)}).sum(dim=-1)",
                f"{b.module(f'nn.utils.parametrizations.weight_norm(nn.Linear({n}, {o}))')}({x})",
                f"{x} * {b.parameter(1, n)}.expand_as({x}[0, ..., :]).tanh()" if b.rank(x) == 3 else f"{x} * 0.5",
                f"torch.cat([F.linear({x}, w) for w in {m}.weight.chunk(2)], -1)",
                f"{x} @ {b.parameter(2, o // 2 or 1, n)}.flatten(0, 1).T",
            ]
        )
    )


@step(2)
def by_keyword(b: Builder, x: str) -> None:
    n = b.shape(x)[-1]
    b.put(
        b.choose(
            [
                f"F.linear(input={x}, weight={b.parameter(b.width(), n)})",
                f"F.linear({x}, bias={b.parameter(4)}, weight={b.parameter(4, n)})",
                f"torch.matmul(input={x}, other={b.parameter(n, b.width())})",
                f"torch.softmax(input={x}, dim=-1)",
                f"torch.sum(input={x}, dim=-1, keepdim=True) * {x}",
                f"torch.cat(tensors=({x}, {x}), dim=-1)",
                f"torch.flatten(input={x}, start_dim=1)",
                f"torch.transpose(input={x}, dim0=0, dim1=-1)",
                f"torch.mean(input={x}, dim=-1, keepdim=True) - {x}",
                f"F.layer_norm(input={x}, normalized_shape=[{n}])",
                f"torch.narrow(input={x}, dim=-1, start=0, length={b.size(n)})",
                f"torch.split({x}, split_size_or_sections={b.size(b.between(1, n))}, dim=-1)[0]",
                f"torch.reshape(input={x}, shape=({b.lead(x)}, {b.size(n, '-1')}))",
                f"torch.repeat_interleave(input={x}, repeats={b.size(2)}, dim=-1)",
                f"torch.roll(input={x}, shifts=1, dims=-1)",
                f"torch.cumsum(input={x}, dim=-1)",
                f"torch.topk(input={x}, k={b.between(1, n)}, dim=-1).values",
                f"torch.amax(input={x}, dim=-1, keepdim=True) - {x}",
                f"F.pad(input={x}, pad=(1, 0), mode='constant', value=0.3)",
                f"torch.index_select(input={x}, dim=-1, index={b.buffer('torch.tensor([0, 0])')})",
                f"torch.gather(input={x}, dim=-1, index={b.buffer(f'torch.zeros({b.shape(x)}).long()')})",
            ]
        )
    )


# Reductions


@step(4)
def reduced(b: Builder, x: str) -> None:
    dim, keep = b.dim(x), b.choose(["", ", keepdim=True"])
    out = b.choose(
        [
            f"{x}.mean({dim}{keep})",
            f"{x}.sum({dim}{keep})",
            f"{x}.sum({dim}{keep})",
            f"{x}.amax({dim}{keep})",
            f"{x}.max({dim}{keep}).values",
            f"{x}.std({dim}{keep}, correction=0)",
            f"{x}.norm(dim={dim}{keep})",
            f"{x}.logsumexp({dim}{keep})",
            f"{x}.prod({dim}{keep})",
            f"{x}.var({dim}, correction=0{keep})",
            f"torch.linalg.vector_norm({x}, dim={dim}{keep})",
            f"{x}.sum()",
            f"{x}.mean()",
            f"{x}.abs().max()",
            f"{x}.sum((0, {b.rank(x) - 1}){keep})",
            f"{x}.square().sum({dim}{keep})",
        ]
    )
    if b.flip() and (keep or "()" in out.removesuffix(".values")):
        out = f"{x} - {out}"
    b.put(out)


@step(4)
def along(b: Builder, x: str) -> None:
    dim = b.dim(x)
    n = b.shape(x)[dim]
    k = b.between(1, n)
    b.put(
        b.choose(
            [
                f"{x}.softmax({dim})",
                f"{x}.softmax({dim})",
                f"{x}.log_softmax({dim})",
                f"{x}.cumsum({dim})",
                f"{x}.topk({k}, {dim}).values",
                f"{x}.sort({dim}).values",
                f"F.normalize({x}, dim={dim}, eps=0.1)",
                f"{x}.cumprod({dim})",
                f"{x}.diff(dim={dim})" if n > 1 else f"{x}.cummax({dim}).values",
                f"{x}.logcumsumexp({dim})",
                f"torch.softmax({x}, dim={dim}) * {x}",
                f"{x}.sort(dim={dim}, descending=True)[0]",
                f"F.cosine_similarity({x}, {x}.sin(), dim={dim})",
                f"{x} * F.mse_loss({x}, {x}.sin())",
                f"{x} - {x}.median(dim={dim}, keepdim=True).values",
                f"{x} - {x}.quantile(0.3, dim={dim}, keepdim=True)",
                f"{x} + ({x} > 0.2).any({dim}, keepdim=True) + ({x} > -0.2).all(dim={dim}, keepdim=True)",
                f"{x} + ({x} > 0).sum({dim}, keepdim=True)",
                f"{x} + torch.count_nonzero({x} > 0, dim={dim}).unsqueeze({dim})",
                f"{x} * {x}.argsort({dim})",
                f"{x} * torch.std_mean({x}, dim={dim}, correction=0, keepdim=True)[1]",
                f"{x} - {x}.aminmax(dim={dim}, keepdim=True).max",
                f"{x} + torch.trapezoid({x}, dim={dim}).unsqueeze({dim})",
                f"{x} * torch.linalg.norm({x}, dim={dim}, keepdim=True)",
                f"{x} - {x}.nansum({dim}, keepdim=True)",
                f"torch.renorm({x}, 2, 0, 1.0)",
                f"F.local_response_norm({x}, 2)",
                f"{x} + ({x} * {x}.sin()).sum({dim}, keepdim=True)",
                f"F.softmin({x}, dim={dim})",
            ]
        )
    )


# Indexing


@step(3)
def indexed(b: Builder, x: str) -> None:
    dim = b.dim(x) % b.rank(x)
    n = b.shape(x)[dim]
    index = [b.between(0, n - 1) for _ in range(b.choose([1, 2, 3]))]
    places = b.buffer(f"torch.tensor({index})")
    many = f"torch.randint({n}, {b.shape(x)})"
    one = f"torch.randint({b.shape(x)[-1]}, ({b.shape(x)[0]},))"
    b.put(
        b.choose(
            [
                f"{x}.index_select({dim}, {places})",
                f"{x}[{':, ' * dim}{index}]",
                f"{x}[{':, ' * dim}{places}]",
                f"{x}.gather({dim}, {b.buffer(many)})",
                f"torch.take_along_dim({x}, {x}.argsort({dim}), {dim})",
                f"{x}.gather({dim}, {x}.argmax({dim}, keepdim=True))",
                f"torch.zeros_like({x}).scatter({dim}, {b.buffer(many)}, 0.5) + {x}",
                f"torch.zeros_like({x}).index_add({dim}, {b.buffer(f'torch.randint({n}, ({n},))')}, {x})",
                f"{x}.scatter_add({dim}, {b.buffer(many)}, {x}.sin())",
                f"{x}.index_copy({dim}, {b.buffer(f'torch.tensor([{index[0]}])')}, {x}.narrow({dim}, 0, 1))",
                f"{x}.index_fill({dim}, {b.buffer(f'torch.tensor([{index[0]}])')}, 0.5)",
                f"{x}.tril()",
                f"{x}.triu(1)",
                f"{x}[torch.arange({x}.shape[0]), ..., {b.buffer(one)}]",
                f"{x}[:, {b.buffer(f'torch.randint({b.shape(x)[1]}, (2, 2))')}]",
                f"{x}[..., None, :]",
                f"{x}.index_put((torch.tensor([0]),), torch.ones({b.size(b.shape(x)[-1])}).to({x}))",
                f"torch.diagonal({x}, 0, -1, -2)" if b.rank(x) > 2 else f"{x}.tril()",
            ]
        )
    )


@step(2, 3)
def looked_up(b: Builder, x: str) -> None:
    rows, w = b.choose([2, 3, 4]), b.width()
    index = b.choose([f"({x}.sum(-1) > 0).long()", f"{b.linear(b.shape(x)[-1], rows)}({x}).argmax(-1)"])
    b.put(
        b.choose(
            [
                f"{b.module(f'nn.Embedding({rows}, {w})')}({index})",
                f"F.embedding({index}, {b.parameter(rows, w)})",
                f"{b.parameter(rows, w)}[{index}]",
                f"F.one_hot({index}, {b.size(rows)}).to({x}) @ {b.parameter(rows, w)}",
            ]
        )
    )


@step(1, 3)
def positions(b: Builder, x: str) -> None:
    s, n = b.shape(x)[1:]
    b.put(
        b.choose(
            [
                f"{x} + {b.module(f'nn.Embedding({s}, {n})')}(torch.arange({x}.shape[1]))",
                f"{x} + {b.parameter(s + 2, n)}[:{x}.shape[1]]",
                f"{x} + {b.parameter(1, s, n)}",
                f"torch.cat([{b.parameter(1, 1, n)}.expand({x}.shape[0], -1, -1), {x}], 1)",
            ]
        )
    )


# Others


@step(1, 3)
def recurrent(b: Builder, x: str) -> None:
    kind, w = b.choose(["LSTM", "GRU", "RNN"]), b.choose([2, 3, 4])
    b.put(f"{b.module(f'nn.{kind}({b.shape(x)[-1]}, {w}, batch_first=True)')}({x})[0]")


@step(1)
def complex_numbers(b: Builder, x: str) -> None:
    if b.shape(x)[-1] % 2:
        return
    half = b.shape(x)[-1] // 2
    y = b.let(f"torch.view_as_complex({x}.unflatten(-1, ({b.size(half, '-1')}, 2)).contiguous())")
    b.put(
        b.choose(
            [
                f"torch.view_as_real({y} * {y}).flatten(-2)",
                f"{y}.real",
                f"{y}.abs()",
                f"torch.fft.ifft(torch.fft.fft({y})).imag",
            ]
        )
    )


@step(1, 3)
def windows(b: Builder, x: str) -> None:
    dim = b.dim(x)
    if b.shape(x)[dim] >= 2:
        b.put(
            b.choose(
                [
                    f"{x}.unfold({dim}, 2, 1)",
                    f"F.unfold({x}[:, None], 1).mT",
                    f"{x}.as_strided(({b.shape(x)[-1]}, 2), (1, {b.shape(x)[-1]}))",
                    f"torch.kron({x}[0], torch.ones(1, 2).to({x}))",
                    f"torch.cdist({x}, {x})",
                    f"torch.cross({x}, {x}.sin(), dim={dim})" if b.shape(x)[dim] == 3 else f"torch.cdist({x}, {x})",
                ]
            )
        )


_BY_WEIGHT = [name for name, (weight, _, _) in STEPS.items() for _ in range(weight)]


def random_network(seed: int, most_steps: int = 8) -> Network:
    """A stem, up to ``most_steps`` steps, and heads over the tensors that nothing has used."""
    b = Builder(Random(seed))
    torch.manual_seed(seed)
    shape, tokens = _stem(b)
    steps = []
    for _ in range(b.between(2, most_steps)):
        name = b.choose(_BY_WEIGHT)
        _, rank, make = STEPS[name]
        x = b.pick(lambda s, rank=rank: rank is None or len(s) == rank)  # type: ignore[misc]
        if x is not None:
            before = len(b.forward), len(b.pool)
            try:
                make(b, x)
                steps.append(name)
            except (RuntimeError, ValueError):  # shapes or strides that do not fit: the step is left out
                del b.forward[before[0] :], b.pool[before[1] :]
    _heads(b)
    return Network(_needed(b.init, b.forward), tuple(b.forward), shape, tokens, seed, tuple(steps))


def _needed(init: Sequence[str], forward: Sequence[str]) -> tuple[str, ...]:
    """The lines of ``init`` that make something forward uses."""
    words = set(re.findall(r"self\.\w+", " ".join(forward)))
    for line in reversed(init):  # a tied weight: both its modules are there
        target, _, text = line.partition(" = ")
        if target.endswith(".weight") and target.removesuffix(".weight") in words:
            words |= set(re.findall(r"self\.\w+", text))
    return tuple(line for line in init if line.partition(" = ")[0].removesuffix(".weight") in words)


def smallest(network: Network, fails: Callable[[Network], bool]) -> Network:
    """``network`` with as many lines taken away as possible while ``fails`` still holds."""
    while True:
        for candidate in _smaller(network):
            try:
                model, x = candidate.build()
                model(x)
                still = fails(candidate)
            except (
                RuntimeError,
                ValueError,
                TypeError,
                IndexError,
                NameError,
                AttributeError,
                SyntaxError,
                AssertionError,
            ):
                continue
            if still:
                network = candidate
                break
        else:
            return network


def _smaller(network: Network) -> Iterator[Network]:
    *body, last = network.forward
    outputs = last.removeprefix("return ").split(", ")
    for i in range(len(outputs) if len(outputs) > 1 else 0):
        yield _with(network, [*body, f"return {', '.join(outputs[:i] + outputs[i + 1 :])}"])
    for i in reversed(range(len(body))):
        made = [name.strip() for name in body[i].partition(" = ")[0].split(",") if name.strip()]
        used = dict.fromkeys(re.findall(r"\b(?:h\d+|x)\b", body[i].partition(" = ")[2]))
        for source in used or ["x"]:
            rest = "\n".join([*body[:i], *body[i + 1 :], last])
            for name in made:
                if re.fullmatch(r"h\d+", name):
                    rest = re.sub(rf"\b{name}\b", source, rest) if name not in body[i].partition(" = ")[2] else rest
            yield _with(network, rest.split("\n"))


def _with(network: Network, forward: list[str]) -> Network:
    return replace(network, init=_needed(network.init, forward), forward=tuple(forward))


def _stem(b: Builder) -> tuple[tuple[int, ...], int]:
    batch, length, w = b.choose([2, 3]), b.choose([2, 3, 4]), b.width()
    kind = b.between(0, 5)
    if kind == 0:
        tokens = b.choose([3, 5])
        b.values["x"] = torch.randint(tokens, (batch, length))
        b.put(f"{b.module(f'nn.Embedding({tokens}, {w})')}(x)")
        return (batch, length), tokens
    n = b.choose([2, 3, 4, 5])
    shape = (batch, n, length, 3) if kind == 1 else (batch, length, n)
    b.values["x"] = torch.randn(shape)
    b.pool.append("x")
    b.used.add("x")
    b.put(f"{b.module(f'nn.Conv2d({n}, {w}, 3, padding=1)')}(x)" if kind == 1 else f"{b.linear(n, w)}(x)")
    return shape, 0


def _heads(b: Builder) -> None:
    """Most unused tensors are read by a linear layer; a few are outputs as they are."""
    left = [name for name in b.pool if name not in b.used] or b.pool[-1:]
    out = []
    for name in left[-3:]:
        if b.flip(8):
            out.append(name)
        elif b.rank(name) == 4 and b.flip():
            out.append(b.let(f"nn.functional.conv2d({name}, {b.parameter(2, b.shape(name)[1], 1, 1)})"))
        else:
            out.append(b.let(f"{b.linear(b.shape(name)[-1], b.choose([1, 2, 3]))}({name})"))
    b.forward.append(f"return {', '.join(out)}")
