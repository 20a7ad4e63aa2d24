"""``--config FILE.yaml`` for every command, and the run.yaml that a run leaves in its folder.

The keys are the long options of the command, with ``-`` or ``_``, and the names of its positional arguments. They are
read off its parser, so that an option is written down once.
"""

from __future__ import annotations

import argparse
import copy
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from graphprune.cli_common import NAMES, write_text
from graphprune.errors import GraphPruneError

RUN = "run.yaml"
_COMMAND = "command"
_KINDS = {int: "a whole number", float: "a number", None: "text"}


def parse(
    parser: argparse.ArgumentParser, commands: dict[str, argparse.ArgumentParser], argv: Sequence[str]
) -> argparse.Namespace:
    """What ``parser`` makes of ``argv``, with what a ``--config`` in it says as the defaults.

    ``parser`` is changed by that, and good for this once. Its ``commands`` that take no ``--config`` are left alone.

    Raises :class:`GraphPruneError` for a file that is not there, that is no YAML, or that says what the command does
    not take. Exits with 2 for wrong usage, as argparse does.
    """
    argv = list(argv)
    command = commands.get(argv[0]) if argv else None
    if command is None or "config" not in {action.dest for action in command._actions}:
        return parser.parse_args(argv)
    given, others = _options_alone(command).parse_known_args(argv[1:])
    if given.config is not None:
        positional = [text for text in others if not text.startswith("-")]
        values = read_config(Path(given.config), command, argv[0])
        argv[1:1] = _as_defaults(command, values, bool(positional))
    options = parser.parse_args(argv)
    options.parser, options.command = command, argv[0]
    return options


def _options_alone(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """A parser of the options of a command, where nothing is required: it leaves over the positional arguments."""
    usage = command.format_usage().removeprefix("usage: ")
    alone = argparse.ArgumentParser(prog=command.prog, usage=usage, add_help=False)
    for action in command._actions:
        if action.option_strings and action.dest != "help":
            action = copy.copy(action)
            action.required = False
            alone._add_action(action)
    return alone


def _as_defaults(command: argparse.ArgumentParser, values: dict[str, Any], positional: bool) -> list[str]:
    """Make ``values`` the defaults of the options of ``command``; returns the arguments to put in front of others.

    Those are what the file says for positional arguments, unless some are given.
    """
    front: list[str] = []
    for action in settable(command).values():
        if action.dest not in values:
            continue
        value = values[action.dest]
        if not action.option_strings:
            front += [] if positional else value if isinstance(value, list) else [value]
            continue
        action.required = False
        command.set_defaults(**{action.dest: value})
        if value is True:
            _add_opposite(command, action)
    return front


def _add_opposite(command: argparse.ArgumentParser, flag: argparse.Action) -> None:
    """``--no-width`` takes back the ``width: true`` of a file, ``--verify`` a ``no-verify: true``."""
    name = _key(flag)
    opposite = "--" + (name.removeprefix("no-") if name.startswith("no-") else f"no-{name}")
    if opposite not in command._option_string_actions:
        command.add_argument(
            opposite, dest=flag.dest, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def settable(command: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What a file may set of a command, by key."""
    found: dict[str, argparse.Action] = {}
    for action in command._actions:
        long = any(option.startswith("--") for option in action.option_strings)
        hidden = action.dest in ("help", "config") or action.help == argparse.SUPPRESS
        if not hidden and (long or not action.option_strings):
            found[_key(action)] = action
    return found


def _key(action: argparse.Action) -> str:
    return next((option[2:] for option in action.option_strings if option.startswith("--")), action.dest)


def read_config(path: Path, command: argparse.ArgumentParser, name: str) -> dict[str, Any]:
    """What a file says for the command called ``name``: destination → value, checked against its parser.

    Raises :class:`GraphPruneError` naming the file and the key.
    """
    known, values = settable(command), {}
    for key, value in _mapping(path).items():
        key = str(key).replace("_", "-")
        if key == _COMMAND:
            if value != name:
                raise GraphPruneError(f"{path} is for graphprune {value}, not for graphprune {name}.")
        elif key not in known:
            raise GraphPruneError(f"{path}: graphprune {name} has no option {key!r}{_near(key, known)}.")
        elif value is not None:  # as if it were not there
            values[known[key].dest] = _checked(known[key], value, f"{path}: {key}")
    return values


def _mapping(path: Path) -> dict[Any, Any]:
    import yaml

    from graphprune.io.checked_json import read_text

    try:
        found = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise GraphPruneError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise GraphPruneError(f"{path} has no options: write one a line, such as 'ratio: 0.2'.")
    return found


def _checked(action: argparse.Action, value: Any, where: str) -> Any:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise GraphPruneError(f"{where} is true or false, not {value!r}.")
        return value
    if action.nargs != "+":
        return _one(action, value, where)
    several = value if isinstance(value, list) else [value]
    if not several and not action.option_strings:
        raise GraphPruneError(f"{where} is empty.")
    return [_one(action, one, where) for one in several]


def _one(action: argparse.Action, value: Any, where: str) -> Any:
    kind: Any = action.type
    right = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    try:
        if not right or (kind is int and isinstance(value, float)):
            raise ValueError(value)
        value = str(value) if kind is None else kind(value)  # YAML takes 1e-3 for text
    except ValueError:
        raise GraphPruneError(f"{where} is to be {_KINDS[kind]}, not {value!r}.") from None
    if action.choices is not None and value not in action.choices:
        raise GraphPruneError(
            f"{where} is one of {', '.join(action.choices)}, not {value!r}{_near(value, action.choices)}."
        )
    return value


def _near(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), 1)
    return f": did you mean {near[0]!r}?" if near else ""


def write_run(options: argparse.Namespace, folder: Path) -> None:
    """Write what a command was asked, and with it all values that were in effect, as run.yaml in ``folder``.

    Raises :class:`GraphPruneError` when it cannot be written.
    """
    import yaml

    import graphprune

    values = {_COMMAND: options.command}
    for key, action in settable(options.parser).items():
        if action.dest not in NAMES:
            values[key] = getattr(options, action.dest)
    head = f"# graphprune {graphprune.__version__}: graphprune {options.command} --config {RUN} does this again.\n"
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=10_000)
    write_text(folder / RUN, head + text)
