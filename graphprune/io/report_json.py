"""Report ↔ plain data."""

from __future__ import annotations

import json
from typing import Any

from graphprune.errors import GraphPruneError
from graphprune.io.checked_json import of_kind, take
from graphprune.ir.plan import Plan
from graphprune.ir.score_spread import QUANTILES, ScoreSpread
from graphprune.reporting import Report
from graphprune.trace.provenance import Attribute

_NUMBER = (int, float)


def report_to_data(report: Report) -> dict[str, Any]:
    """One report as JSON data; its history and its config are stored elsewhere."""
    return {
        "parameters_before": report.parameters_before,
        "parameters_after": report.parameters_after,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "oracle_error": report.oracle_error,
        "seconds": report.seconds,
        "total_seconds": report.total_seconds,
        "attributes": [
            {"owner": a.owner, "name": a.name, "index": a.index, "value": int(value)}
            for a, value in report.attributes.items()
        ],
        "skipped": report.skipped,
        **({"new_biases": report.new_biases} if report.new_biases else {}),
        **_stated(report),
        **_told(report),
        "plan": json.loads(report.plan.to_json()),
    }


def report_from_data(data: Any, where: str, history: list[Report], base_config: Any) -> Report:
    """Read what :func:`report_to_data` made; every field is checked.

    Raises :class:`graphprune.GraphPruneError` naming ``where`` when something is missing or of the wrong type.
    """
    of_kind(data, dict, where)
    plan = Plan.from_dict(take(data, "plan", dict, where))
    return Report(
        parameters_before=take(data, "parameters_before", int, where),
        parameters_after=take(data, "parameters_after", int, where),
        bytes_before=take(data, "bytes_before", int, where),
        bytes_after=take(data, "bytes_after", int, where),
        plan=plan,
        oracle_error=take(data, "oracle_error", (*_NUMBER, type(None)), where),
        skipped={k: of_kind(v, str, f"{where}: skipped") for k, v in take(data, "skipped", dict, where).items()},
        widths=plan.widths(),
        attributes=_attributes(take(data, "attributes", list, where), f"{where}: attributes"),
        seconds={k: of_kind(v, _NUMBER, f"{where}: seconds") for k, v in take(data, "seconds", dict, where).items()},
        total_seconds=take(data, "total_seconds", _NUMBER, where),
        history=history,
        base_config=base_config,
        new_biases=_paths(data.get("new_biases", []), f"{where}: new_biases"),
        fields=_fields(data["fields"], f"{where}: fields") if "fields" in data else None,
        unsaid=of_kind(data.get("unsaid", 0.0), _NUMBER, f"{where}: unsaid"),
        settings=of_kind(data.get("settings", {}), dict, f"{where}: settings"),
        calibration=_calibration(data.get("calibration"), f"{where}: calibration"),
        base_model=of_kind(data.get("base_model"), (str, type(None)), f"{where}: base_model"),
        training=_paths(data.get("training", []), f"{where}: training"),
        scores=_scores(data.get("scores", {}), f"{where}: scores"),
    )


def _stated(report: Report) -> dict[str, Any]:
    if report.fields is None:
        return {}
    return {"fields": {name: list(pair) for name, pair in report.fields.items()}, "unsaid": report.unsaid}


def _told(report: Report) -> dict[str, Any]:
    """What is only told to readers, as far as it is known; older folders have none of it."""
    told = {
        "settings": report.settings,
        "calibration": list(report.calibration or ()),
        "base_model": report.base_model,
        "training": report.training,
        "scores": {name: {"kept": list(one.kept), "removed": list(one.removed)} for name, one in report.scores.items()},
    }
    return {name: value for name, value in told.items() if value}


def _scores(items: Any, where: str) -> dict[str, ScoreSpread]:
    found = {}
    for name, item in of_kind(items, dict, where).items():
        of_kind(item, dict, f"{where}: {name!r}")
        kept, removed = (take(item, which, list, f"{where}: {name!r}") for which in ("kept", "removed"))
        for values in (kept, removed):
            if len(values) not in (0, len(QUANTILES)):
                raise GraphPruneError(f"{where}: {name!r} needs {len(QUANTILES)} numbers, and has {len(values)}.")
        numbers = [[float(of_kind(value, _NUMBER, where)) for value in values] for values in (kept, removed)]
        found[name] = ScoreSpread(*map(tuple, numbers))
    return found


def _calibration(pair: Any, where: str) -> tuple[int, int | None] | None:
    if pair is None:
        return None
    if len(of_kind(pair, list, where)) != 2:
        raise GraphPruneError(f"{where} needs a number of rows and a length.")
    return of_kind(pair[0], int, where), of_kind(pair[1], (int, type(None)), where)


def _fields(items: Any, where: str) -> dict[str, tuple[int | None, int]]:
    found = {}
    for name, pair in of_kind(items, dict, where).items():
        if len(of_kind(pair, list, where)) != 2:
            raise GraphPruneError(f"{where}: {name!r} needs a number before and one after.")
        found[name] = (of_kind(pair[0], (int, type(None)), where), of_kind(pair[1], int, where))
    return found


def _paths(items: Any, where: str) -> list[str]:
    return [of_kind(item, str, where) for item in of_kind(items, list, where)]


def _attributes(items: list[Any], where: str) -> dict[Attribute, int]:
    found = {}
    for item in items:
        of_kind(item, dict, where)
        attribute = Attribute(
            take(item, "owner", str, where),
            take(item, "name", str, where),
            take(item, "index", (int, type(None)), where),
        )
        found[attribute] = take(item, "value", int, where)
    return found
