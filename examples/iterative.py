"""Prune and train in turns, beside pruning all at once and training as long.

    python examples/iterative.py

A pruned model is an ordinary module: it trains as before, and can be pruned again. ``report(…).history`` has every
step. The task, a random teacher to imitate, is far too small to say which way is better for yours. Takes about ten
seconds.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn.functional import mse_loss

import graphprune

INPUTS = torch.zeros(5, 12)


def mlp(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 3))


def train(model: nn.Module, teacher: nn.Module, steps: int, seed: int = 0) -> float:
    """Train in place; returns the loss on rows that nobody trains on."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(128, 12, generator=generator)
        mse_loss(model(x), teacher(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        x = torch.randn(2048, 12, generator=torch.Generator().manual_seed(10**6))
        return mse_loss(model(x), teacher(x)).item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300, help="of the optimizer, after every pruning")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    teacher, dense = mlp(16).requires_grad_(False), mlp(96)
    print(f"dense: loss {train(dense, teacher, 3 * steps):.1e}")

    small = dense
    for turn in range(3):
        small = graphprune.compile(small, 0.4, method="l1", example_inputs=INPUTS)
        before = train(small, teacher, 0)
        after = train(small, teacher, steps, seed=turn)
        count = sum(p.numel() for p in small.parameters())
        print(f"turn {turn + 1}: {count:,} parameters, loss {before:.1e}, trained {after:.1e}")
    print(f"pruned {len(graphprune.report(small).history) + 1} times")

    once = graphprune.compile(dense, 1 - 0.6**3, method="l1", example_inputs=INPUTS)
    print(
        f"at once: {graphprune.report(once).parameters_after:,} parameters, loss {train(once, teacher, 0):.1e}, ",
        end="",
    )
    print(f"trained as long {train(once, teacher, 3 * steps):.1e}")


if __name__ == "__main__":
    main()
