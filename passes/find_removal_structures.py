"""Node groups → removal structures: which axes may lose indices, and why the others may not."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from graphprune.errors import GraphPruneError
from graphprune.ir.program import NodeGroup, Program
from graphprune.passes.base import compiler_pass
from graphprune.trace.adapters import plain_name


@compiler_pass(requires=("groups", "composed"), ensures=("prunable", "skipped"), analysis=True)
def find_removal_structures(program: Program) -> None:
    """A removal structure is one index of one prunable group, with every slice it owns in every parameter.

    Left alone, each with its reason: ranks of composed groups, pinned groups, groups of no more indices than must stay,
    inner factors (unless ``inner_axes``), and what ``include``, ``exclude``, ``skip_first`` and ``skip_last`` say.
    """
    options = program.options
    groups: list[NodeGroup] = program.need("groups")
    _check_patterns(program, (*options.include, *options.exclude))
    parameters = {name for name, _ in program.model.named_parameters()}
    spared = _spared_blocks(groups, options.skip_first, options.skip_last)
    ranks = {rank: composed.module for composed in program.need("composed") for rank in composed.ranks}
    program.prunable, program.skipped = [], {}
    for group in groups:
        reason = _reason_to_skip(group, program, parameters, spared)
        if group.name in ranks:
            reason = f"the rank of what is added to {plain_name(program.model, ranks[group.name])}"
        if reason is None:
            program.prunable.append(group)
        else:
            program.skipped[group.name] = reason


def _reason_to_skip(group: NodeGroup, program: Program, parameters: set[str], spared: set[str]) -> str | None:
    options = program.options
    if group.pins:
        return "pinned: " + group.pins[0]
    if group.size <= 1:
        return "has one index only" if group.size else "is empty"
    if group.size <= max(group.minimum, group.careful):
        return f"at least {group.size} of its indices must stay"
    if not any(member.tensor in parameters for member in group.members):
        return "no parameter lies on it"
    if not group.outer and not options.inner_axes:
        return "an inner factor, such as a channel of every head (inner_axes=True prunes it)"
    if options.include and not any(_matches(module, options.include) for module in group.modules):
        return "not included"
    if any(_matches(module, options.exclude) for module in group.modules):
        return "excluded"
    if any(block in spared for module in group.modules for block in _blocks(module)):
        return "in a spared block (skip_first, skip_last)"
    return None


def _matches(module: str, patterns: object) -> bool:
    return any(fnmatchcase(module, p) or fnmatchcase(module, f"{p}.*") for p in patterns)  # type: ignore[attr-defined]


def _check_patterns(program: Program, patterns: tuple[str, ...]) -> None:
    paths = [plain_name(program.model, path) for path, _ in program.model.named_modules()]
    for pattern in patterns:
        if not any(_matches(path, [pattern]) for path in paths):
            raise GraphPruneError(
                f"The pattern {pattern!r} matches no module of {type(program.model).__name__}. Patterns are shell-like "
                "and match module paths, such as 'model.layers.3.mlp' or '*.self_attn'."
            )


def _blocks(module: str) -> list[str]:
    """The repeated blocks a module is in: every prefix of its path that ends in a number."""
    return [module[: m.end()] for m in re.finditer(r"(?:^|\.)\d+(?=\.|$)", module)]


def _spared_blocks(groups: list[NodeGroup], first: int, last: int) -> set[str]:
    """The first and last blocks of every sequence of numbered blocks."""
    if not first and not last:
        return set()
    numbers: dict[str, set[int]] = {}
    for group in groups:
        for module in group.modules:
            for block in _blocks(module)[:1]:
                parent, _, number = block.rpartition(".")
                numbers.setdefault(parent, set()).add(int(number))
    spared = set()
    for parent, found in numbers.items():
        ordered = sorted(found)
        for number in {*ordered[:first], *(ordered[-last:] if last else ())}:
            spared.add(f"{parent}.{number}".lstrip("."))
    return spared
