from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import graphprune
from graphprune.cli import _parser, main
from graphprune.passes.methods import DEFAULT_METHOD


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
    )
    path = tmp_path_factory.mktemp("model") / "llama"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_prune_writes_a_folder_that_loads(folder, tmp_path, capsys):
    out = tmp_path / "small"
    assert main(["prune", str(folder), "--ratio", "0.3", "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    for word in ("parameters", "MACs", "bytes", "oracle error", "model.layers.0", str(out.name)):
        assert word in printed
    loaded = graphprune.load(out)
    report = graphprune.report(loaded)
    assert sum(p.numel() for p in loaded.parameters()) == report.parameters_after
    assert abs(report.ratio - 0.3) < 0.01


def test_json_and_plan_replay(folder, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["prune", str(folder), "--ratio", "0.3", "-o", str(first), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"][1] < facts["parameters"][0]
    assert facts["macs"][1] < facts["macs"][0]
    assert facts["oracle_error"] < 1e-4
    plan = tmp_path / "plan.json"
    plan.write_text(graphprune.report(graphprune.load(first)).plan.to_json())
    assert main(["prune", str(folder), "--plan", str(plan), "-o", str(second)]) == 0
    a, b = graphprune.load(first).state_dict(), graphprune.load(second).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a.keys() == b.keys()


def test_width_and_its_plan(folder, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["prune", str(folder), "--ratio", "0.3", "--width", "-o", str(first)]) == 0
    plan = tmp_path / "plan.json"
    plan.write_text(graphprune.report(graphprune.load(first)).plan.to_json())
    assert main(["prune", str(folder), "--plan", str(plan), "-o", str(second)]) == 0
    a, b = graphprune.load(first).state_dict(), graphprune.load(second).state_dict()
    assert a["model.norm.weight"].numel() < 32
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_experts_and_their_plan(tmp_path):
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
        num_local_experts=6,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixture")
    first, second = tmp_path / "first", tmp_path / "second"
    assert (
        main(
            [
                "prune",
                str(tmp_path / "mixture"),
                "--ratio",
                "0.3",
                "--method",
                "magnitude",
                "--experts",
                "-o",
                str(first),
            ]
        )
        == 0
    )
    plan = tmp_path / "plan.json"
    plan.write_text(graphprune.report(graphprune.load(first)).plan.to_json())
    assert main(["prune", str(tmp_path / "mixture"), "--plan", str(plan), "-o", str(second)]) == 0
    a, b = graphprune.load(first).state_dict(), graphprune.load(second).state_dict()
    assert len(a["model.layers.0.mlp.gate.weight"]) < 6
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_pruning_a_pruned_folder_again(folder, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["prune", str(folder), "--ratio", "0.2", "-o", str(first)]) == 0
    assert main(["prune", str(first), "--ratio", "0.2", "-o", str(second)]) == 0
    sizes = [sum(p.numel() for p in graphprune.load(f).parameters()) for f in (first, second)]
    assert sizes[1] < 0.85 * sizes[0]


def test_how_slices_are_aggregated_reaches_the_compiler(folder, tmp_path, monkeypatch):
    seen = {}

    def compile(*args, **options):
        seen.update(options)
        raise graphprune.GraphPruneError("enough")

    monkeypatch.setattr(graphprune, "compile", compile)
    out = ["-o", str(tmp_path / "small")]
    assert main(["prune", str(folder), "--ratio", "0.2", "--method", "llm-pruner", "--aggregation", "max", *out]) == 1
    assert (seen["method"], seen["aggregation"]) == ("llm-pruner", "max")


def test_inspect(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.*.mlp.gate_proj.weight[0]  size 48  ×2" in printed
    assert "looked up by index" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ratio", "1.5"], "between 0 and 1"),
        (["--ratio", "0.99"], "as far as it goes"),
        (["--ratio", "0.2", "--method", "magic"], "There is no method"),
        (["--ratio", "0.2", "--method", "wanda-sp", "--data", "notes.md"], ".txt and .jsonl"),
        (["--plan", "missing.json"], "missing.json"),
        (["--ratio", "0.2", "--data", "missing.txt"], "missing.txt"),
        (["--ratio", "0.2", "--include", "nothing.like.this"], "matches no module"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(folder, tmp_path, capsys, arguments, words):
    out = tmp_path / "small"
    assert main(["prune", str(folder), "-o", str(out), *arguments]) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert not out.exists()


def test_calibration_on_what_the_model_writes(folder, tmp_path):
    """--data takes words for inputs that are made; without it the model writes snippets."""
    plans = []
    for data in ([], ["--data", "snippets"], ["--data", "sampled"]):
        out = tmp_path / f"small{len(plans)}"
        arguments = ["--ratio", "0.3", "--method", "wanda-sp", "--samples", "4", "--length", "9", *data]
        assert main(["prune", str(folder), "-o", str(out), *arguments]) == 0
        plans.append(graphprune.report(graphprune.load(out)).plan.keep)
    assert plans[0] == plans[1] != plans[2]


def test_an_output_folder_that_exists_is_left_alone(folder, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["prune", str(folder), "--ratio", "0.2", "-o", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_missing_models(tmp_path, capsys):
    for name in (str(tmp_path / "no.gguf"), str(tmp_path), "no-such-org/no-such-model"):
        assert main(["inspect", name]) == 1
    (tmp_path / "file.bin").write_bytes(b"")
    assert main(["inspect", str(tmp_path / "file.bin")]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_the_help_tells_the_default_method(capsys):
    assert _parser().parse_args(["prune", "x", "-o", "y"]).method == DEFAULT_METHOD
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    assert f"{DEFAULT_METHOD} (default)" in " ".join(capsys.readouterr().out.split())


def test_wrong_usage_exits_with_2():
    with pytest.raises(SystemExit) as exit_:
        main(["prune"])
    assert exit_.value.code == 2


def test_deploy_writes_what_transformers_loads(folder, tmp_path, capsys):
    arguments = ["prune", str(folder), "--ratio", "0.2", "--method", "magnitude", "--deploy", "transformers"]
    assert main([*arguments, "-o", str(tmp_path / "small"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    name, (before, after) = next(iter(found["fields"].items()))
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert before != after == config[name]
    assert 0 <= found["unsaid"] < 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert sum(p.numel() for p in loaded.parameters()) == found["parameters"][1]
    assert main([*arguments, "-o", str(tmp_path / "again")]) == 0
    assert f"config: {name} {before} → {after}" in capsys.readouterr().out


def test_portable_writes_a_modelling_file(folder, tmp_path):
    out = tmp_path / "small"
    assert main(["prune", str(folder), "--ratio", "0.3", "-o", str(out), "--method", "magnitude", "--portable"]) == 0
    assert (out / "modeling_pruned_llama.py").is_file()
    assert "AutoModelForCausalLM" in json.loads((out / "config.json").read_text())["auto_map"]
