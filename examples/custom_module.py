"""Any module: convolutions with a skip connection and a gate, two inputs, an output that is a dict.

    python examples/custom_module.py

Shows what is tied (the skip ties the channels of all that is added), what is pinned and why, and how to leave parts
alone. Takes about five seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graphprune


class Net(nn.Module):
    def __init__(self, channels: int = 24, classes: int = 5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.grow, self.back = nn.Conv2d(channels, 2 * channels, 1), nn.Conv2d(2 * channels, channels, 1)
        self.gate = nn.Linear(4, channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, image: Tensor, facts: Tensor) -> dict[str, Tensor]:
        x = self.stem(image)
        x = x + self.back(self.grow(x).relu())
        x = x * self.gate(facts).sigmoid()[:, :, None, None]
        return {"classes": self.head(x.mean((2, 3)))}


def main() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    inputs = (torch.randn(3, 3, 7, 9), torch.randn(3, 4))
    print(graphprune.inspect(model, example_inputs=inputs))
    small = graphprune.compile(model, 0.4, method="l1", example_inputs=inputs)
    print(f"\nall of it: {graphprune.report(small)}")
    small = graphprune.compile(model, 0.2, method="l1", example_inputs=inputs, include=["grow", "back"])
    print(f"only grow and back: {graphprune.report(small)}")
    print(small(*inputs)["classes"].shape, small.grow, small.stem[0])


if __name__ == "__main__":
    main()
