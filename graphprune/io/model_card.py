"""README.md of a saved model: what the hub, and whoever finds the folder, has to know. Only what is known is said."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml
from huggingface_hub import ModelCard, ModelCardData

from graphprune.errors import GraphPruneError
from graphprune.folding import starred
from graphprune.io.atomic import replace_file
from graphprune.reporting import Report

if TYPE_CHECKING:
    from graphprune.evaluate.evaluation import Evaluation

    Evaluations: TypeAlias = Evaluation | Mapping[str, Evaluation]

CARD = "README.md"
# What is measured later goes between these, and leaves alone what else a person wrote.
_BEGIN, _END = "<!-- graphprune: measurements -->", "<!-- graphprune: end of measurements -->"
_LICENSE = ("license", "license_name", "license_link")


def write_card(
    folder: Path,
    done: Report,
    class_name: str,
    loader: str,
    *,
    metadata: Mapping[str, Any] | None = None,
    evaluations: Evaluations | None = None,
) -> None:
    """Write README.md into a folder that holds a pruned model.

    Args:
        done: what was done to it. class_name: of the model.
        loader: what loads the folder: ``"transformers"`` by itself, ``"graphprune"``, or the auto class of transformers
            that takes the modelling file of a portable folder.
        metadata: fields of the card's front matter, such as ``license``, over those that are known.
        evaluations: of the model, or of several by their titles, the dense one first.

    Raises:
        GraphPruneError: for metadata that is no plain data.
    """
    data = _metadata(done, class_name, loader) | dict(metadata or {})
    body = "\n".join(_body(done, class_name, loader, evaluations))
    (folder / CARD).write_text(_with_metadata(data, body), encoding="utf-8")


def update_card(
    folder: str | PathLike[str],
    *,
    evaluations: Evaluations | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Put measurements into the README.md that :func:`graphprune.save` wrote, and fields into its front matter.

    What else is in the file, such as a person's own words, stays.

    Args:
        folder: that of the model.
        evaluations: of the model, or of several by their titles, the dense one first.
        metadata: fields of the front matter, such as ``{"license": "mit"}``, over those that are there.

    Raises:
        GraphPruneError: when there is no such file, or no place for measurements in it, or for metadata that is no
            plain data.
    """
    path = Path(folder, CARD)
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise GraphPruneError(f"{path} is no model card: {error}.") from error
    text = card.text
    if evaluations is not None:
        before, begin, rest = text.partition(_BEGIN)
        _, end, after = rest.partition(_END)
        if not begin or not end:
            raise GraphPruneError(
                f"{path} has no place for measurements: put {_BEGIN} and {_END} on lines of their own."
            )
        text = before + "\n".join(_measurements(evaluations)) + after
    try:
        replace_file(path, _with_metadata(card.data.to_dict() | dict(metadata or {}), text.lstrip("\n")))
    except OSError as error:
        raise GraphPruneError(f"{path} could not be written: {error}.") from error


def _with_metadata(data: dict[str, Any], body: str) -> str:
    """A card whose front matter reads back as ``data``."""
    try:
        plain = json.loads(json.dumps({key: value for key, value in data.items() if value is not None}))
        block = ModelCardData(**plain).to_yaml()
        whole = ModelCard(f"---\n{block}\n---\n\n{body}")
        if whole.data.to_dict() == plain:
            return whole.content
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise GraphPruneError(f"The metadata of a model card must be plain data: {error}.") from None
    raise GraphPruneError("The metadata of the model card cannot be written as YAML: leave out control characters.")


def _metadata(done: Report, class_name: str, loader: str) -> dict[str, Any]:
    return {
        "library_name": "graphprune" if loader == "graphprune" else "transformers",
        "base_model": done.base_model,
        **_license(done),
        "pipeline_tag": _pipeline_tag(class_name),
        "tags": ["graphprune", "pruned"],
    }


def _license(done: Report) -> dict[str, str]:
    """As a card in the folder that the model was loaded from says it."""
    source = getattr(done.base_config, "_name_or_path", None)
    path = Path(source, CARD) if isinstance(source, str) and source else None
    try:
        if path is None or not path.is_file():
            return {}
        said = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}  # not a card
    return {key: said[key] for key in _LICENSE if isinstance(said.get(key), str)}


def _pipeline_tag(class_name: str) -> str | None:
    from transformers.modelcard import TASK_MAPPING

    tasks: Mapping[str, Any] = TASK_MAPPING
    for task, classes in tasks.items():
        for known in classes.values():
            if class_name == known or (isinstance(known, tuple) and class_name in known):
                return task
    return None


def _body(done: Report, class_name: str, loader: str, evaluations: Evaluations | None) -> list[str]:
    before = (done.history[0] if done.history else done).parameters_before
    of = f" of {_code(done.base_model)}" if done.base_model else ""
    lines = [
        f"# {class_name}, {1 - done.parameters_after / before:.1%} of its parameters removed",
        "",
        f"A smaller dense model: whole heads, channels and other structures{of} are gone. Made with graphprune, which "
        "proves that what is left computes what the original computes without them.",
        "",
    ]
    for number, one in enumerate((*done.history, done), 1):
        lines += [f"## Pruning {number}" if done.history else "## Pruning", "", *_pruning(one)]
    if done.training:
        lines += ["## Training", "", "After pruning; the proof above is of the model before it.", ""]
        lines += [*(f"- {_plain(one)}" for one in done.training), ""]
    lines += ["## Measurements", "", *([_BEGIN, _END] if evaluations is None else _measurements(evaluations)), ""]
    return [*lines, *_use(class_name, loader)]


def _pruning(done: Report) -> list[str]:
    before, after = done.parameters_before, done.parameters_after
    lines = [
        *_table(
            ["", "before", "after"],
            [
                ["parameters", f"{before:,}", f"{after:,} (−{done.ratio:.2%})"],
                ["bytes", f"{done.bytes_before:,}", f"{done.bytes_after:,}"],
                *([_code(name), str(old or ""), str(new)] for name, (old, new) in (done.fields or {}).items()),
            ],
        ),
        "",
        *_how(done),
        "",
        *_proof(done),
        "",
    ]
    if done.widths:
        lines += [*_table(["sizes", "axes", "before", "after"], _widths(done.widths)), ""]
    if done.settings:
        lines += ["```python", _call(done), "```", ""]
    return lines


def _how(done: Report) -> list[str]:
    allocation = done.settings.get("allocation")
    lines = [f"- Method: {_code(done.plan.method or 'a plan')}"]
    if allocation is not None:
        lines.append(f"- Allocation: {_code(allocation if isinstance(allocation, str) else json.dumps(allocation))}")
    if done.calibration is not None:
        rows, length = done.calibration
        data = done.settings.get("data", "made by graphprune")
        told = "data that were given" if data == "given" else f"inputs: {_plain(data)}"
        lines.append(f"- Calibration: {rows} rows{'' if length is None else f' of {length} tokens'}; {told}")
    if done.settings and "plan" not in done.settings:
        lines.append(f"- Seed: {_code(done.settings.get('seed', 0))}")
    return lines


def _proof(done: Report) -> list[str]:
    if done.oracle_error is None:
        return ["Not verified against the masked original."]
    return [
        f"Verified against the masked original, which is the unpruned model where the removed structures are dropped "
        f"from what consumes them: the largest difference is {done.oracle_error:.1e} of the largest output."
    ]


def _widths(widths: dict[str, tuple[int, int]]) -> list[list[str]]:
    """A row per kind of axis: over all blocks."""
    found: dict[str, list[tuple[int, int]]] = {}
    for name, pair in widths.items():
        found.setdefault(starred(name), []).append(pair)
    return [
        [_code(name), str(len(pairs)), _range(old for old, _ in pairs), _range(new for _, new in pairs)]
        for name, pairs in found.items()
    ]


def _range(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]}–{found[-1]}"


def _call(done: Report) -> str:
    """What makes it again: ``graphprune.compile(model, …)``; data that were given are not in it."""
    replayed = {"data": "data", "plan": "plan"}
    arguments = [
        f"{name}={replayed[name] if value == 'given' and name in replayed else repr(value)}"
        for name, value in done.settings.items()
        if name != "ratio" and name.isidentifier()
    ]
    ratio = [repr(done.settings["ratio"])] if "ratio" in done.settings else []
    call = f"graphprune.compile({', '.join(['model', *ratio, *arguments])})"
    return call.replace("`", "'")  # the end of the block


def _measurements(evaluations: Evaluations) -> list[str]:
    from graphprune.evaluate.table import rows_of

    named: dict[str, Evaluation] = (
        dict(evaluations) if isinstance(evaluations, Mapping) else {"this model": evaluations}
    )
    columns = [{title: text for title, (text, _) in rows_of(one)} for one in named.values()]
    titles = dict.fromkeys(title for column in columns for title in column)
    rows = [[_plain(title), *(column.get(title, "") for column in columns)] for title in titles]
    return [_BEGIN, "", *_table(["", *map(_plain, named)], rows), "", _END]


def _use(class_name: str, loader: str) -> list[str]:
    where = "`FOLDER` is this folder, or its name on the hub:"
    load = f"from transformers import {class_name}\n\nmodel = {class_name}.from_pretrained(FOLDER)"
    if loader not in ("transformers", "graphprune"):
        where += " its layers have sizes that the config cannot say, and the modelling file beside it gives them."
        load = f"from transformers import {loader}\n\nmodel = {loader}.from_pretrained(FOLDER, trust_remote_code=True)"
    elif loader == "graphprune":
        where = (
            "`FOLDER` is a copy of this one. Its layers have sizes that the config cannot say, so graphprune loads it "
            "(and, once that is imported, `from_pretrained`):"
        )
        load = "import graphprune\n\nmodel = graphprune.load(FOLDER)"
    plan = "`graphprune.report(graphprune.load(FOLDER))` has the plan: which indices of which weights were kept."
    return ["## Use", "", where, "", "```python", load, "```", "", plan, ""]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _plain(text: Any) -> str:
    """In one line, without what Markdown or HTML would take for markup."""
    one_line = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]|<>])", r"\\\1", one_line)


def _code(text: Any) -> str:
    """As code in one line, which may stand in a table."""
    return "`" + " ".join(str(text).split()).replace("`", "'").replace("|", "\\|") + "`"
