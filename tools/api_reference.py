"""Write the API reference from the docstrings: ``python tools/api_reference.py -o docs/api.md``.

Nothing but :mod:`inspect`. Every public name is in one of ``SECTIONS`` below; a docstring in it becomes Markdown line
by line, so that what the reference says is what the code says.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_INTRO = """# API reference

Made of the docstrings by `python tools/api_reference.py -o docs/api.md`; a test keeps it up to date. Errors that a
user can act on are `graphprune.GraphPruneError`.
"""

# Title → modules and what of each; None is all of its ``__all__``.
SECTIONS: dict[str, list[tuple[str, tuple[str, ...] | None]]] = {
    "graphprune": [("graphprune", None)],
    "Loading": [("graphprune.io.models", ("load_model",))],
    "Evaluating": [("graphprune.evaluate", None)],
    "Settings of methods that train": [
        ("graphprune.passes.add_adapters", ("Adapters",)),
        ("graphprune.passes.train_adapters", ("Training",)),
        ("graphprune.passes.train_lhspg", ("Lhspg", "HalfSpace")),
        ("graphprune.passes.train_loraprune", ("LoraPrune",)),
        ("graphprune.recovery.shear", ("Measures", "Shorn")),
        ("graphprune.recovery.recover", ("Recovered", "Stage", "Round", "recover_on")),
    ],
    "Passes": [
        ("graphprune.passes.base", ("Pass", "compiler_pass", "run_passes")),
        ("graphprune.passes.analyze_knowledge", ("analyze_knowledge",)),
        ("graphprune.passes.score", ("score_by",)),
        ("graphprune.passes.allocate_budget", ("allocate_budget",)),
        ("graphprune.passes.select_structures", ("select_structures", "make_plan")),
        ("graphprune.passes.prune_in_order", ("prune_by_obs", "prune_by_moments")),
        ("graphprune.passes.train_lhspg", ("train_lhspg",)),
        ("graphprune.passes.train_loraprune", ("train_loraprune",)),
        ("graphprune.passes.tune_adapters", ("tune_adapters",)),
        ("graphprune.passes.replay_plan", ("replay_plan",)),
    ],
    "What passes work on": [
        ("graphprune.ir.program", ("Program", "NodeGroup", "Member", "ComposedGroup", "AxisMap")),
        ("graphprune.inspection", ("Inspection",)),
        ("graphprune.ir.knowledge", ("GroupKnowledge",)),
    ],
    "Writing criteria and rules": [
        ("graphprune.passes.score", ("criterion", "add_to")),
        ("graphprune.passes.allocate_budget", ("allocation",)),
        ("graphprune.data.calibration", ("calibration_batches",)),
        ("graphprune.rules", ("rule", "rule_by_name")),
    ],
}

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):$")
_ROLE = re.compile(r":(?:\w+):`~?([^`]+)`")


def entries() -> Iterator[tuple[str, str, Any]]:
    """(title of the section, full name, object) of everything in the reference."""
    for title, modules in SECTIONS.items():
        for path, names in modules:
            module = importlib.import_module(path)
            for name in module.__all__ if names is None else names:
                yield title, f"{path}.{name}", getattr(module, name)


def build() -> str:
    """The whole reference as Markdown."""
    lines, last = [_INTRO], None
    for title, name, thing in entries():
        if title != last:
            lines += [f"## {title}", ""]
            last = title
        lines += [*_entry(name, thing), ""]
    lines += ["## Names", "", *_names()]
    return "\n".join(lines).rstrip() + "\n"


def _entry(name: str, thing: Any) -> list[str]:
    lines = [f"### `{name}`", ""]
    thing = _function_of(thing)
    if not _is_error(thing) and callable(thing):
        lines += ["```py", signature(name.rpartition(".")[2], thing), "```", ""]
    lines += [markdown(inspect.getdoc(thing) or ""), ""]
    for method, member in vars(thing).items() if inspect.isclass(thing) else ():
        lines += _member(method, member)
    return lines[:-1]


def _member(name: str, member: Any) -> list[str]:
    """A public method or property; a property of one word of its own says it by its type."""
    if name.startswith("_"):
        return []
    if isinstance(member, property):
        doc = inspect.getdoc(member.fget) or ""
        said = f"- **`{name}`** → `{_plain(member.fget.__annotations__.get('return', ''))}`"  # type: ignore[union-attr]
    elif inspect.isfunction(member) or isinstance(member, classmethod):
        function = member.__func__ if isinstance(member, classmethod) else member
        doc, said = inspect.getdoc(function) or "", f"- **`{signature(name, function, wide=10**6)}`**"
    else:
        return []
    text = re.sub(r"\n(?=.)", "\n  ", markdown(doc))
    return [f"{said}: {text}" if text else said, ""]


def _function_of(thing: Any) -> Any:
    """The function behind a pass that is one object, which has the docstring."""
    return thing.run if type(thing).__name__ == "Pass" else thing


def _is_error(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, BaseException)


def signature(name: str, thing: Any, wide: int = 100) -> str:
    """``name(…) -> …``, on one line if it is not wider than ``wide``, else a line for each argument."""
    found = inspect.signature(thing)
    given = [p for p in found.parameters.values() if p.name not in ("self", "cls")]
    arguments = [_plain(str(p)) for p in given]
    keyword = [i for i, p in enumerate(given) if p.kind is p.KEYWORD_ONLY]
    if keyword:
        arguments.insert(keyword[0], "*")
    returns = "" if found.return_annotation is found.empty else f" -> {_plain(str(found.return_annotation))}"
    returns = "" if inspect.isclass(thing) else returns
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) <= wide:
        return line
    return "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f"){returns}"])


def _plain(text: str) -> str:
    """A signature's text without the quotes of annotations, and without addresses and paths of this machine."""
    text = re.sub(r"(: |-> |^)'([^']*)'", r"\1\2", text)
    text = re.sub(r"PosixPath\('([^']*)'\)", r"'\1'", text)
    return re.sub(r"<(?:function|class) '?(?:[\w.]*\.)?(\w+)'?(?: at 0x\w+)?>", r"\1", text)


def markdown(doc: str) -> str:
    """A docstring as Markdown: its sections become lists, its references code."""
    doc = _ROLE.sub(r"`\1`", doc).replace("``", "`")
    out: list[str] = []
    inside = None
    for line in doc.splitlines():
        section = _SECTION.match(line)
        if section:
            inside = section[1]
            out += [f"**{inside}**", ""]
        elif inside is None or (line and not line.startswith(" ")):
            inside = None
            out.append(line)
        else:
            out.append(_in_section(line[4:]))
    return "\n".join(out).strip()


def _in_section(line: str) -> str:
    """A line of a section: one that is not indented starts an item, with its name as code."""
    if not line or line.startswith(" "):
        return line[2:] if line.startswith("    ") else line
    name, colon, rest = line.partition(": ")
    return f"- `{name}`: {rest}" if colon and re.fullmatch(r"[\w, ]+", name) else f"- {line}"


def _names() -> list[str]:
    """What ``method=`` and ``allocation=`` take, each with the first line of what it says of itself."""
    from graphprune.passes.allocate_budget import _ALLOCATIONS
    from graphprune.passes.methods import METHODS
    from graphprune.passes.score.registry import _CRITERIA

    lines = ["Methods are tuples of passes:", "", "| `method=` | passes |", "|---|---|"]
    lines += [f"| `{name}` | {', '.join(f'`{step.name}`' for step in steps)} |" for name, steps in METHODS.items()]
    tables: list[tuple[str, dict[str, Callable[..., Any]]]] = [("method=", _CRITERIA), ("allocation=", _ALLOCATIONS)]
    for title, table in tables:
        what = "Criteria, each a method by itself:" if table is _CRITERIA else "Allocations:"
        lines += ["", what, "", f"| `{title}` | |", "|---|---|"]
        for name in sorted(own(table)):
            first = markdown((inspect.getdoc(table[name]) or "").partition("\n\n")[0]).replace("\n", " ")
            escaped = first.replace("|", "\\|")
            lines.append(f"| `{name}` | {escaped} |")
    return lines


def own(table: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """What graphprune itself has put into a registry; code that was run from a string may be of no module at all."""
    return {name: one for name, one in table.items() if (one.__module__ or "").startswith("graphprune.")}


def fields_of(thing: Any) -> list[str]:
    """The names that a caller may give: fields of a dataclass, or arguments of a function."""
    thing = _function_of(thing)
    if dataclasses.is_dataclass(thing):
        return [field.name for field in dataclasses.fields(thing) if field.init and not field.name.startswith("_")]
    if inspect.isclass(thing):
        return []
    return list(inspect.signature(thing).parameters)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the API reference from the docstrings.")
    parser.add_argument("-o", "--output", default="docs/api.md", metavar="FILE")
    Path(parser.parse_args(argv).output).write_text(build(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
