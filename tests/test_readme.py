"""What README shows works as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

import graphprune

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")


def test_the_criterion_of_readme():
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "@criterion" in block)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.zeros_(model[0].bias)
    with torch.no_grad():
        model[0].weight[:6] *= 1e-3
    definition = code.partition("\n\nsmall = ")[0]
    exec(definition, {})  # registers the method
    small = graphprune.compile(model, 0.3, method="largest-row", example_inputs=torch.zeros(5, 4))
    assert torch.equal(small[0].weight[-2:], model[0].weight[-2:])
    assert len(small[0].weight) < 8


def test_every_option_of_the_command_line_that_readme_names_exists():
    from graphprune.cli import _parser

    known = _parser().format_help() + "".join(
        sub.format_help() for a in _parser()._subparsers._group_actions for sub in a.choices.values()
    )
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)):
        assert option in known, option
