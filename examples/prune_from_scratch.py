"""A transformer written in this file, with nothing of a library: trained, looked into, and pruned by a quarter.

    python examples/prune_from_scratch.py

The queries, keys and values come out of one fused projection, as in GPT-2; nobody tells graphprune which rows belong
to which head. Shows what hangs together, and the loss before and after, with heads and channels chosen by weights and
by activations. Takes about ten seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import graphprune

TEXT = (Path(__file__).parent / "alice.txt").read_bytes()
TOKENS = torch.tensor(list(TEXT))  # a byte is a token


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.inner = heads, width
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        q, k, v = (
            part.view(rows, tokens, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).split(self.inner, -1)
        )
        seen = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(rows, tokens, -1))
        return x + self.down(nn.functional.gelu(self.up(self.norm_2(x))))


class Transformer(nn.Module):
    def __init__(self, blocks: int = 2, width: int = 64, heads: int = 8, longest: int = 64):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def rows(count: int, seed: int) -> Tensor:
    """Random stretches of the text, int64 of shape (count, 65)."""
    starts = torch.randint(len(TOKENS) - 65, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([TOKENS[start : start + 65] for start in starts.tolist()])


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        loss = loss_of(model, rows(16, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

    inputs = rows(3, 0)[:, :13]  # sizes that no layer has
    print(graphprune.inspect(model, example_inputs=inputs))
    test = rows(64, 10**6)
    with torch.no_grad():
        print(f"\nloss of the trained model: {loss_of(model, test):.3f}")
        for method in ("magnitude", "ppm"):
            data = [(rows(16, seed)[:, :-1],) for seed in range(4)]
            small = graphprune.compile(model, 0.25, method=method, data=data, example_inputs=inputs)
            print(f"{method}: loss {loss_of(small, test):.3f}; {graphprune.report(small)}")
    print(f"heads of the blocks: {[block.heads for block in small.blocks]}, of {model.blocks[0].heads}")


if __name__ == "__main__":
    main()
