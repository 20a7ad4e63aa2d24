"""README.md of a saved model says what is known, nothing else, and no text that anybody gives can break it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune import GraphPruneError
from graphprune.cli import main
from graphprune.evaluate import Evaluation, Latency
from graphprune.evaluate.evaluation import read_evaluations
from graphprune.io.model_card import write_card

EVALUATION = Evaluation(
    parameters=31_337,
    parameter_bytes=125_348,
    macs=30_000,
    perplexity={128: 53.951, 2048: float("inf")},
    tasks={"arc|easy": {"acc": 0.25}},
    latency=[Latency(1, 16, 2.5, 1.25)],
)


def llama(**changes: Any) -> nn.Module:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **sizes, **changes)).eval()


@pytest.fixture(scope="module")
def pruned() -> nn.Module:
    """Not to be changed by tests. Its name on the hub is known."""
    model = llama()
    model.config._name_or_path = "some-org/some-model"
    return graphprune.compile(model, 0.2, samples=4, length=16, seed=3, skip_first=1)


def card(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text("utf-8"))


def test_a_card_of_a_plan_with_other_widths_per_layer(pruned: nn.Module, tmp_path: Path) -> None:
    graphprune.save(pruned, tmp_path / "model")
    found = card(tmp_path / "model")
    assert found.data.to_dict() == {
        "library_name": "graphprune",
        "base_model": "some-org/some-model",
        "pipeline_tag": "text-generation",
        "tags": ["graphprune", "pruned"],
    }
    done = graphprune.report(pruned)
    assert f"| parameters | {done.parameters_before:,} | {done.parameters_after:,} (−{done.ratio:.2%}) |" in found.text
    before, after = done.widths["model.layers.1.mlp.gate_proj.weight[0]"]
    assert f"| `model.layers.*.mlp.gate_proj.weight[0]` | 1 | {before} | {after} |" in found.text
    assert "- Method: `ppm`" in found.text
    assert "- Calibration: 4 rows of 16 tokens; inputs: made by graphprune" in found.text
    assert "- Seed: `3`" in found.text
    assert f"the largest difference is {done.oracle_error:.1e} of the largest output" in found.text
    assert "graphprune.compile(model, 0.2, skip_first=1, samples=4, length=16, seed=3)" in found.text
    assert "graphprune.load(FOLDER)" in found.text
    assert "from_pretrained(FOLDER" not in found.text
    assert "perplexity" not in found.text  # nothing was measured


def test_the_call_on_the_card_makes_the_same_model(pruned: nn.Module, tmp_path: Path) -> None:
    graphprune.save(pruned, tmp_path / "model")
    call = next(line for line in card(tmp_path / "model").text.splitlines() if line.startswith("graphprune.compile("))
    torch.manual_seed(0)
    scope = {"graphprune": graphprune, "model": llama()}
    first = graphprune.compile(scope["model"], 0.2, samples=4, length=16, seed=3, skip_first=1)
    assert graphprune.report(eval(call, scope)).plan == graphprune.report(first).plan


def test_a_card_of_a_stock_model(tmp_path: Path) -> None:
    small = graphprune.compile(llama(), 0.3, method="magnitude", deploy="transformers", verify=False)
    graphprune.save(small, tmp_path / "model")
    found = card(tmp_path / "model")
    assert found.data.library_name == "transformers"
    assert found.data.base_model is found.data.license is None
    assert "LlamaForCausalLM.from_pretrained(FOLDER)" in found.text
    assert f"| `intermediate_size` | 48 | {small.config.intermediate_size} |" in found.text
    assert "Not verified" in found.text
    assert "Calibration" not in found.text
    code = found.text.partition("## Use")[2].partition("```python\n")[2].partition("```")[0]
    scope: dict[str, Any] = {"FOLDER": tmp_path / "model"}
    exec(code, scope)
    assert type(scope["model"]) is type(small)


def test_given_data_and_passes_are_named_not_shown(tmp_path: Path) -> None:
    from graphprune.passes.methods import METHODS

    small = graphprune.compile(llama(), 0.2, data=torch.arange(64).reshape(4, 16), passes=METHODS["wanda-sp"])
    graphprune.save(small, tmp_path / "model")
    text = card(tmp_path / "model").text
    assert "4 rows of 16 tokens; data that were given" in text
    assert "data=data" in text
    assert "passes=['" in text


def test_everything_told_comes_back_from_a_folder(pruned: nn.Module, tmp_path: Path) -> None:
    """Also after pruning again: the model is still that of the hub."""
    graphprune.save(pruned, tmp_path / "model")
    loaded = graphprune.load(tmp_path / "model")
    before, after = graphprune.report(pruned), graphprune.report(loaded)
    assert after.settings == before.settings
    assert after.calibration == before.calibration == (4, 16)
    again = graphprune.compile(loaded, 0.1, method="random")
    graphprune.save(again, tmp_path / "again")
    found = card(tmp_path / "again")
    assert found.data.base_model == "some-org/some-model"
    assert "## Pruning 1" in found.text
    assert "## Pruning 2" in found.text
    dense = graphprune.report(again).history[0].parameters_before
    assert f"{1 - graphprune.report(again).parameters_after / dense:.1%} of its parameters removed" in found.text


def test_a_plain_module_has_a_card(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    graphprune.save(graphprune.compile(net, 0.3, example_inputs=torch.rand(5, 6)), tmp_path / "model")
    assert card(tmp_path / "model").data.to_dict() == {
        "library_name": "graphprune",
        "tags": ["graphprune", "pruned"],
    }


def test_the_license_is_that_of_the_folder_it_came_from(pruned: nn.Module, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text("---\nlicense: mit\nlicense_link: 3\n---\n# Mine\n")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    graphprune.save(graphprune.compile(model, 0.2, method="random"), tmp_path / "small")
    data = card(tmp_path / "small").data
    assert data.license == "mit"
    assert data.base_model is data.license_link is None  # a folder is no name on the hub
    (tmp_path / "dense" / "README.md").write_text("---\n{\n---\n")
    graphprune.save(graphprune.compile(model, 0.2, method="random"), tmp_path / "other")
    assert card(tmp_path / "other").data.license is None


# What is measured


def test_measurements_are_put_in_their_place(pruned: nn.Module, tmp_path: Path) -> None:
    graphprune.save(pruned, tmp_path / "model", evaluations={"dense": EVALUATION, "pruned|it": EVALUATION})
    path = tmp_path / "model" / "README.md"
    text = path.read_text("utf-8")
    assert "| perplexity @128 | 53.95 | 53.95 |" in text
    assert "| perplexity @2048 | inf | inf |" in text
    assert r"|  | dense | pruned\|it |" in text
    assert r"| arc\|easy acc | 0.2500 | 0.2500 |" in text
    path.write_text(text.replace("## Use", "My own words.\n\n## Use"), "utf-8")
    other = replace(EVALUATION, perplexity={128: 7.0})
    graphprune.update_card(tmp_path / "model", evaluations=other, metadata={"language": "en"})
    found = card(tmp_path / "model")
    assert "| perplexity @128 | 7.00 |" in found.text
    assert "53.95" not in found.text
    assert "My own words." in found.text
    assert found.data.language == "en"
    assert found.data.base_model == "some-org/some-model"
    graphprune.load(tmp_path / "model")  # a card may be changed


def test_the_command_reads_what_eval_wrote(pruned: nn.Module, tmp_path: Path) -> None:
    graphprune.save(pruned, tmp_path / "model")
    (tmp_path / "eval.json").write_text(json.dumps({"pruned": EVALUATION.to_dict()}))
    assert read_evaluations(tmp_path / "eval.json") == {"pruned": EVALUATION}
    arguments = ["card", str(tmp_path / "model"), "--evaluation", str(tmp_path / "eval.json"), "--license", "mit"]
    assert main(arguments) == 0
    assert "| decode ms, batch 1, 16 tokens | 1.25 |" in card(tmp_path / "model").text
    assert card(tmp_path / "model").data.license == "mit"


@pytest.mark.parametrize("key", [key for key in EVALUATION.to_dict() if key != "task_average"])
def test_damaged_evaluations_are_refused(tmp_path: Path, key: str) -> None:
    for data in ({**EVALUATION.to_dict(), key: "no"}, {k: v for k, v in EVALUATION.to_dict().items() if k != key}):
        (tmp_path / "eval.json").write_text(json.dumps({"it": data}))
        with pytest.raises(GraphPruneError, match=f"eval.json: it.*{key}"):
            read_evaluations(tmp_path / "eval.json")


def test_a_card_without_a_place_is_left_alone(pruned: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match="no model card"):
        graphprune.update_card(tmp_path, metadata={"license": "mit"})
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(GraphPruneError, match="no place for measurements"):
        graphprune.update_card(tmp_path, evaluations=EVALUATION)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


# What people write

TEXTS = st.text(max_size=30) | st.sampled_from(
    [
        "---",
        "a\n---\nb",
        "\n---\n",
        "...",
        "'",
        '"',
        ": x",
        "- x",
        "{{ 7 }}",
        "#",
        "!!python/object:os.system",
        "\t",
        "a|b",
        "x`y",
    ]
)


@given(TEXTS, TEXTS, TEXTS)
def test_no_text_breaks_the_metadata(pruned: nn.Module, one: str, other: str, method: str) -> None:
    """Whatever is given comes back as it was, or is refused; nothing becomes another field."""
    from tempfile import TemporaryDirectory

    done = graphprune.report(pruned)
    told = replace(
        done,
        base_model=one,
        plan=replace(done.plan, method=method, keep={other: [0]}, sizes={other: 2}),
        widths={other: (2, 1)},
        settings={"data": other, other: 1},
        training=[other],
    )
    with TemporaryDirectory() as folder:
        try:
            write_card(Path(folder), told, "Net", "graphprune", metadata={"license": other, "tags": [one]})
        except GraphPruneError:
            return
        content = Path(folder, "README.md").read_bytes().decode()
    found = ModelCard(content)
    assert found.data.to_dict() == {
        "library_name": "graphprune",
        "base_model": one,
        "license": other,
        "tags": [one],
    }
    assert found.text.lstrip().startswith("# Net, ")
    assert found.text.count("\n## ") == 4  # Pruning, Training, Measurements, Use
    rows = [line for line in found.text.splitlines() if line.startswith("| `")]
    assert all(line.replace("\\|", "").count("|") == 5 and line.count("`") == 2 for line in rows)


def test_most_texts_are_not_refused(pruned: nn.Module, tmp_path: Path) -> None:
    for number, text in enumerate(("---\nx: 1\n---", "a: b # c", "ünï — 統", "'\"`|{}[]", "no", "1.0", "null")):
        graphprune.save(pruned, tmp_path / str(number), metadata={"license": text})
        assert card(tmp_path / str(number)).data.license == text


@pytest.mark.parametrize("value", [object(), {1, 2}, float("nan")])
def test_metadata_that_is_no_plain_data(pruned: nn.Module, tmp_path: Path, value: Any) -> None:
    with pytest.raises(GraphPruneError, match="metadata"):
        graphprune.save(pruned, tmp_path / "model", metadata={"license": value})
    assert not list(tmp_path.iterdir())


def test_a_recovered_model_says_so(pruned: nn.Module, tmp_path: Path) -> None:
    done = replace(graphprune.report(pruned), training=["LoRA, stage pretraining: 3 steps"])
    write_card(tmp_path, done, "Net", "graphprune")
    assert "## Training" in card(tmp_path).text
    assert "- LoRA, stage pretraining: 3 steps" in card(tmp_path).text
