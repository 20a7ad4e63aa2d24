"""The latency benchmark runs, compares turn by turn, and fails only when asked to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Load = Callable[[str], ModuleType]


@pytest.fixture
def bench(load_tool: Load, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """In this process: every stage in its own would import everything nine times."""
    module = load_tool("bench_latency")
    here: list[str] = []

    def in_this_process(what: str, stage: str, given: list[str]) -> str:
        arguments = module._parser().parse_args(given)
        here.append(f"{what} {stage}")
        return json.dumps(module.measure(stage, arguments)) if what == "--stage" else module.make(stage, arguments)

    monkeypatch.setattr(module, "_in_own_process", in_this_process)
    module.here = here
    return module


@pytest.mark.slow
def test_the_whole_comparison_at_small_sizes(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "result.json"
    arguments = ["-o", str(tmp_path / "models"), "--small", "--repeats", "2", "--prompt", "8", "--tokens", "3"]
    assert bench.main([*arguments, "--json", str(out)]) == 0
    runs = json.loads(out.read_text())["runs"]
    for stage, ratio in bench.STAGES.items():
        assert len(runs[stage]) == 2
        assert runs[stage][0]["parameters"] == pytest.approx((1 - ratio) * runs["dense"][0]["parameters"], rel=0.03)
        assert runs[stage][0]["prefill_ms"] > 0 < runs[stage][0]["decode_ms"]
        assert runs[stage][0]["checkpoint_bytes"] > 4 * runs[stage][0]["parameters"]
    assert bench.here[3:6] == ["--stage dense", "--stage minus-20", "--stage minus-50"]
    shown = capsys.readouterr().out
    assert "minus-50: decode_ms / dense" in shown
    bench.here.clear()
    assert bench.main([*arguments, "--repeats", "1"]) == 0
    assert not [one for one in bench.here if one.startswith("--make")]  # they are there


def run(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, *ratios: float) -> list[str]:
    """The targets that are missed, when −50% takes so much of what the dense model takes, turn by turn."""
    fields = ("parameters", "prefill_ms", "decode_ms", "checkpoint_bytes", "peak_bytes")
    speeds = [1.0, 100.0, 3.0]  # the machine is busy at times
    runs = {
        stage: [dict.fromkeys(fields, speed * share) for speed, share in zip(speeds, shares, strict=True)]
        for stage, shares in (("dense", (1, 1, 1)), ("minus-20", (0.8, 0.8, 0.8)), ("minus-50", ratios))
    }
    return [target.name for target in bench.targets_of(runs) if not target.met]


def test_turns_are_compared_with_themselves(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(bench, monkeypatch, 0.5, 0.5, 5.0) == []
    assert run(bench, monkeypatch, 0.5, 0.61, 0.61) == [
        "minus-50: prefill_ms / dense",
        "minus-50: decode_ms / dense",
        "minus-50: peak_bytes / dense",
        "minus-50: bytes on disk / dense",
    ]


def test_check_fails_only_for_a_missed_target(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "run_all", lambda arguments, given: {})
    monkeypatch.setattr(bench, "show", lambda runs, targets: None)
    for value, code in ((0.5, 0), (0.7, 1)):
        monkeypatch.setattr(bench, "targets_of", lambda runs, v=value: [bench.Target("it", 0.6, "×", v)])
        assert bench.main(["-o", str(tmp_path)]) == 0
        assert bench.main(["-o", str(tmp_path), "--check"]) == code
