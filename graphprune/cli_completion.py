"""The command ``graphprune completion bash``: a script with which a shell completes the others."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from graphprune.cli_common import new_command
from graphprune.errors import GraphPruneError

_EXAMPLES = """examples:
  graphprune completion bash > ~/.local/share/bash-completion/completions/graphprune
  graphprune completion zsh > ~/.zsh/completions/_graphprune      # a folder in $fpath
  graphprune completion fish > ~/.config/fish/completions/graphprune.fish
"""
_SHELLS = ("bash", "zsh", "fish")
_FILES = ("FILE", "PATH", "MODEL", "PRUNED")
_FOLDERS = ("DIR", "RUN")


def add_command(commands: Any, whole: argparse.ArgumentParser) -> None:
    """Add it to the subparsers ``commands`` of the parser ``whole``."""
    parser = new_command(
        commands,
        "completion",
        lambda options: print(_script(whole, options.shell)),
        "print a script that completes commands, options and files in a shell",
        _EXAMPLES,
    )
    parser.add_argument("shell", choices=_SHELLS, help="what the script is for")


def _script(parser: argparse.ArgumentParser, shell: str) -> str:
    try:
        import shtab
    except ImportError:
        raise GraphPruneError("Completion needs the package shtab: pip install 'graphprune[completion]'.") from None
    for action in _actions(parser):
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return shtab.complete(parser, shell=shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
