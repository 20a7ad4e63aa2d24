"""The benchmark runs, measures what it says, and fails only when asked to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

Load = Callable[[str], ModuleType]


@pytest.fixture
def bench(load_tool: Load) -> ModuleType:
    return load_tool("bench_compile")


@pytest.mark.slow
def test_the_whole_comparison_at_small_sizes(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "result.json"
    assert bench.main(["--small", "--repeats", "1", "--json", str(out)]) == 0
    kept = json.loads(out.read_text())
    for stage in ("export", "compile", "compile-inplace"):
        assert kept["medians"][stage]["seconds"] > 0
        assert kept["medians"][stage]["peak_bytes"] > kept["medians"][stage]["over_loaded_bytes"] >= 0
    for stage in ("compile", "compile-inplace"):
        assert kept["medians"][stage]["ratio"] == pytest.approx(bench.RATIO, abs=0.005)
        assert kept["medians"][stage]["pass trace_model"] > 0
    shown = capsys.readouterr().out
    if bench.importlib.util.find_spec("torch_pruning") is None:
        assert "not installed" in shown
        assert kept["medians"]["torch-pruning"] is None
    else:
        assert kept["medians"]["torch-pruning"]["ratio"] == pytest.approx(bench.RATIO, abs=0.005)
    assert "compile / bare export" in shown


def test_the_big_plan_at_small_sizes(bench: ModuleType) -> None:
    found = bench.run_stage("big", bench.SIZES["big-small"], cold=True)
    assert found["ratio"] == pytest.approx(bench.RATIO, abs=0.01)
    assert not torch.empty(0).is_meta


def middle(**changes: float | None) -> dict:
    """Medians that meet every target exactly."""
    stages: dict = {
        "export": {"seconds": 4.0},
        "compile": {"seconds": 10.0, "over_loaded_bytes": 115.0, "pruned_bytes": 100.0},
        "compile-inplace": {"seconds": 10.0, "over_loaded_bytes": 80.0, "peak_bytes": 800.0},
        "torch-pruning": {"seconds": 20.0, "over_loaded_bytes": 100.0, "peak_bytes": 1000.0},
    }
    for name, value in changes.items():
        stage, _, field = name.partition("__")
        stages[stage.replace("_", "-")][field] = value
    return stages


def test_targets_are_met_at_their_limits(bench: ModuleType) -> None:
    assert all(target.met for target in bench.targets_of(middle()))


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"compile__seconds": 10.1}, ["time: compile / torch-pruning", "time: compile / bare export"]),
        ({"compile_inplace__seconds": 10.1}, ["time: in place / torch-pruning"]),
        ({"compile_inplace__over_loaded_bytes": 81.0}, ["peak over the loaded model: in place / torch-pruning"]),
        ({"compile_inplace__peak_bytes": 801.0}, ["peak of the whole process: in place / torch-pruning"]),
        ({"compile__over_loaded_bytes": 116.0}, ["peak of compile over the loaded model / pruned weights"]),
    ],
)
def test_a_missed_target_is_named(bench: ModuleType, change: dict, missed: list[str]) -> None:
    assert [target.name for target in bench.targets_of(middle(**change)) if not target.met] == missed


def test_without_torch_pruning_only_its_columns_are_missing(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    one = {name: run for name, run in middle().items() if name != "torch-pruning"}
    run = {"cpu_seconds": 1.0, "peak_bytes": 1.0, "over_loaded_bytes": 1.0}
    monkeypatch.setattr(bench, "_in_own_process", lambda stage, arguments: run | one[stage])
    assert bench.main([]) == 0
    assert capsys.readouterr().out.count("not installed") == 5
    assert bench.main(["--check"]) == 1


def test_check_fails_only_for_a_missed_target(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: object())
    stages = middle()
    run = {"cpu_seconds": 1.0, "peak_bytes": 1.0, "over_loaded_bytes": 1.0}
    monkeypatch.setattr(bench, "_in_own_process", lambda stage, arguments: run | stages[stage])
    assert bench.main(["--check"]) == 0
    stages["export"]["seconds"] = 3.0
    assert bench.main([]) == 0
    assert bench.main(["--check"]) == 1


def test_the_median_counts(bench: ModuleType) -> None:
    assert bench.medians([{"seconds": 1.0}, {"seconds": 9.0}, {"seconds": 2.0}]) == {"seconds": 2.0}
    assert bench.medians("not installed") is None


def test_both_tools_remove_the_same_share(bench: ModuleType) -> None:
    model = bench.build(bench.SIZES["full"], "meta")
    heads, channels = bench.matching_ratios(model)
    sizes = bench.SIZES["full"]
    attention, ffn = 4 * sizes.hidden**2, 3 * sizes.hidden * sizes.ffn
    removed = sizes.layers * (heads * attention + channels * ffn)
    assert removed == pytest.approx(bench.RATIO * sum(p.numel() for p in model.parameters()))
    assert heads * sizes.heads == int(heads * sizes.heads)


def test_memory_is_seen(bench: ModuleType) -> None:
    """In a process of its own, as the stages are: what other tests freed is still resident in this one."""
    code = f"""
import runpy, torch
bench = runpy.run_path({bench.__file__!r}, run_name="bench_compile")
gone = torch.ones(256 * 2**20 // 4)
del gone
bench["forget_peak"]()
before = bench["peak"]()
held = torch.ones(128 * 2**20 // 4)
assert 64 * 2**20 < bench["peak"]() - before < 256 * 2**20, (before, bench["peak"]())
assert bench["resident"]() > held.nbytes
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("repeats", ["0", "-1", "two"])
def test_repeats_is_a_positive_number(bench: ModuleType, repeats: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--repeats", repeats])
    assert "at least 1" in capsys.readouterr().err
