"""How the scores of what was removed lie beside those of what was kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import X, toy

import graphprune
from graphprune import GraphPruneError
from graphprune.io.manifest import read_manifest
from graphprune.io.report_json import report_from_data, report_to_data
from graphprune.ir.score_spread import QUANTILES
from graphprune.passes.score import criterion


def pruned(method: str = "magnitude", **options: object) -> torch.nn.Module:
    return graphprune.compile(toy(), 0.2, method=method, example_inputs=X, **options)


def test_what_was_removed_scored_less() -> None:
    found = graphprune.report(pruned()).scores
    removed = {name: spread for name, spread in found.items() if spread.removed}
    assert removed
    for spread in found.values():
        assert list(spread.kept) == sorted(spread.kept)
        assert len(spread.kept) == len(QUANTILES)
    assert all(spread.removed[-1] <= spread.kept[0] for spread in removed.values())


def test_the_scores_are_those_of_the_criterion() -> None:
    @criterion("rising")
    def rising(program):  # type: ignore[no-untyped-def]
        return {group.axis: torch.arange(group.size).float() for group in program.need("prunable")}

    done = graphprune.report(pruned("rising"))
    for name, spread in done.scores.items():
        before, after = done.widths.get(name, (None, None))
        if before is not None:
            assert spread.kept == pytest.approx(np.quantile(np.arange(before - after, before), QUANTILES))
            assert spread.removed == pytest.approx(np.quantile(np.arange(before - after), QUANTILES))


def test_a_ragged_axis_has_the_scores_of_all_its_rows() -> None:
    done = graphprune.report(pruned(inner_axes=True))
    ragged = [name for name in done.plan.under if done.scores[name].removed]
    assert ragged
    for name in ragged:
        assert done.scores[name].removed[0] <= done.scores[name].kept[0]


@pytest.mark.parametrize("method", ["ppm", "wanda-sp", "flap"])
def test_methods_that_choose_in_order_tell_theirs(method: str) -> None:
    done = graphprune.report(pruned(method))
    assert done.widths.keys() <= done.scores.keys()
    for name in done.widths:
        assert done.scores[name].removed[-1] <= done.scores[name].kept[0]


def test_of_costs_that_change_the_first_are_told() -> None:
    done = graphprune.report(pruned("slimgpt"))
    assert done.widths.keys() <= done.scores.keys()
    assert all(done.scores[name].removed[0] <= done.scores[name].kept[0] for name in done.widths)


def test_a_replayed_plan_has_none() -> None:
    plan = graphprune.report(pruned()).plan
    assert graphprune.report(graphprune.compile(toy(), plan=plan, example_inputs=X)).scores == {}


def test_they_are_saved_and_loaded(tmp_path: Path) -> None:
    small = pruned()
    graphprune.save(small, tmp_path / "small")
    assert read_manifest(tmp_path / "small").report(None).scores == graphprune.report(small).scores != {}


@pytest.mark.parametrize("damage", [[1.0], ["a"] * 5, "x", None])
def test_damaged_scores_are_refused(damage: object) -> None:
    done = graphprune.report(pruned())
    data = json.loads(json.dumps(report_to_data(done)))
    next(iter(data["scores"].values()))["kept"] = damage
    with pytest.raises(GraphPruneError, match="scores"):
        report_from_data(data, "x.json", [], None)
