"""A criterion of one's own in a few lines, beside one that is there. Takes about five seconds.

python examples/custom_criterion.py
"""

import torch
from torch import nn

import graphprune
from graphprune.passes.score import add_to, criterion


@criterion("largest-reader")
def largest_reader(program):
    """The largest weight that reads a structure: what nobody reads loudly goes first."""
    scores, axes = {}, program.need("axes")
    for group in program.need("prunable"):
        for member in group.members:
            if member.consumes:
                columns = program.weight(member.tensor).abs().movedim(member.dim, 0).flatten(1)
                add_to(scores, axes.tensors[member.tensor][member.dim], columns.amax(1))
    return scores


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    inputs = torch.randn(200, 16)
    for method in ("random", "l1", "largest-reader"):
        small = graphprune.compile(model, 0.3, method=method, example_inputs=inputs[:5])
        error = (small(inputs) - model(inputs)).norm() / model(inputs).norm()
        print(f"{method}: the outputs move by {error:.0%}; {graphprune.report(small)}")
