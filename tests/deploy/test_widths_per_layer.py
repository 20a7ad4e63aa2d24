"""Plans with other widths in every layer, loaded by stock ``from_pretrained``, with and without graphprune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import ToyTransformer
from models import CASES, Case
from safetensors.torch import load_file
from stock_loading import GENERATE, TOKENS, finish, in_own_memory, logits, start
from torch import nn

import graphprune
from graphprune import GraphPruneError
from graphprune.deploy.portable import auto_classes
from graphprune.deploy.sizes_left import path_of
from graphprune.trace.provenance import Attribute

# Free widths need other options than those that a config can say.
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"method": "flap", "data": [TOKENS]},  # new biases
    "mistral": {"inner_axes": True, "ratio": 0.3},
    "phi3": {"inner_axes": True},
}
NAMES = [name for name in CASES if name not in ("llama_heads", "llama_width", "gpt2_width", "mixtral_experts")]
FEW = {"llama", "gpt2", "opt", "phi3", "mixtral", "t5", "vit"}  # the others are like one of them
MODES = ("portable", "imported")


def prune(case: Case, **changes: Any) -> nn.Module:
    options = {"ratio": 0.2, "method": "magnitude", "allocation": "global", **case.options, **changes}
    return graphprune.compile(case.build(), options.pop("ratio"), **options)


@pytest.mark.parametrize(
    "names", [FEW, pytest.param({*NAMES} - FEW, marks=pytest.mark.slow)], ids=["few", "the others"]
)
def test_transformers_computes_the_same(names: set[str], tmp_path: Path) -> None:
    """With a modelling file and without graphprune, and the other way round; also what save_pretrained writes then.

    One test, so that every model is pruned once and the processes run side by side.
    """
    pruned: dict[str, Any] = {name: prune(CASES[name], **OPTIONS.get(name, {})) for name in sorted(names)}
    assert_other_widths(pruned)
    processes = {mode: start(mode, pruned, tmp_path / mode) for mode in MODES}
    expected = {}
    for name, model in pruned.items():
        expected[name] = expected[f"{name}.again"] = logits(model, CASES[name].auto)
        if CASES[name].generates:
            expected[f"{name}.generated"] = model.generate(TOKENS, **GENERATE)
    for mode, process in processes.items():
        finish(process)
        made = load_file(tmp_path / mode / "made.safetensors")
        assert made.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(made[key], expected[key])] == [], mode
        # Nothing is missing, unexpected, or of another shape.
        notes = json.loads((tmp_path / mode / "notes.json").read_text())
        assert notes == {name: {"class": type(model).__name__} for name, model in pruned.items()}
        for name in names & {"llama", "gpt2", "opt"}:
            assert torch.equal(logits(graphprune.load(tmp_path / mode / name)), expected[name])


def assert_other_widths(pruned: dict[str, nn.Module]) -> None:
    reports = [graphprune.report(model) for model in pruned.values()]
    assert all(report.fields is None for report in reports)
    assert all(graphprune.report(model).new_biases for name, model in pruned.items() if name == "llama")
    widths = [{after for name, (_, after) in report.widths.items() if "mlp" in name} for report in reports]
    assert sum(len(found) > 1 for found in widths) > len(pruned) / 2


# With graphprune imported


@pytest.fixture(scope="module")
def llama() -> Any:
    """Not to be changed by tests."""
    return prune(CASES["llama"], **OPTIONS["llama"])


@pytest.fixture(scope="module")
def saved(llama: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("llama") / "model"
    graphprune.save(llama, target)
    return target


def test_the_class_itself(llama: Any, saved: Path) -> None:
    loaded = in_own_memory(transformers.LlamaForCausalLM.from_pretrained(saved))
    assert torch.equal(logits(loaded), logits(llama))


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForSequenceClassification"])
def test_without_its_head_or_with_another(llama: Any, saved: Path, auto: str) -> None:
    loaded = in_own_memory(getattr(transformers, auto).from_pretrained(saved))
    base = loaded if auto == "AutoModel" else loaded.model
    with torch.no_grad():
        assert torch.equal(base(TOKENS).last_hidden_state, llama.model(TOKENS).last_hidden_state)


def test_what_is_loaded_is_a_plain_model(llama: Any, saved: Path) -> None:
    """Trainer, peft and the compiler ask whether it is quantised: it is not."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert not loaded.is_quantized
    assert not hasattr(loaded, "hf_quantizer")
    assert not hasattr(loaded, "quantization_method")
    assert all("_is_quantized" not in vars(module.config) for module in loaded.modules() if hasattr(module, "config"))
    assert {name: p.shape for name, p in loaded.named_parameters()} == {n: p.shape for n, p in llama.named_parameters()}
    assert loaded.model.layers[0].mlp.up_proj.out_features == llama.model.layers[0].mlp.up_proj.out_features


def test_pruned_again_and_saved(saved: Path, tmp_path: Path) -> None:
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(saved)
    again = graphprune.compile(loaded, 0.1, method="magnitude")
    assert len(graphprune.report(again).history) == 1
    graphprune.save(again, tmp_path / "again")
    stock = in_own_memory(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again"))
    assert torch.equal(logits(stock), logits(again))


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision(tmp_path: Path, name: str, portable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``half`` rounds the buffers too, which the class would compute in float32."""
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model: Any = prune(CASES[name]).bfloat16()
    graphprune.save(model, tmp_path / "model", portable=portable)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=portable)
    assert loaded.dtype is torch.bfloat16
    assert torch.equal(logits(in_own_memory(loaded)), logits(model))
    assert torch.equal(logits(graphprune.load(tmp_path / "model")), logits(model))


def change(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": None}, "quantization_config.shapes is to be a dict"),
        ({"class": 3}, "quantization_config.class is to be a str"),
        ({"biases": ["model.layers.7"]}, r"LlamaForCausalLM has no module 'model\.layers\.7'"),
        ({"shapes": {"model.norm.weight": [1, 2]}}, r"shape \[32\] cannot get shape \[1, 2\]"),
        ({"attributes": {"model.layers.0.mlp.nothing": 3}}, "LlamaMLP has no attribute 'nothing'"),
        ({"attributes": {"model.layers.0.self_attn.config.nothing": 3}}, "LlamaConfig has no attribute 'nothing'"),
        ({"buffers": {"model.rotary_emb.inv_freq": "float99"}}, "float99"),
    ],
)
def test_damaged_sizes_are_named(llama: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    graphprune.save(llama, tmp_path / "model")
    with pytest.raises(GraphPruneError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(change(tmp_path / "model", **changes))


# The modelling file


def test_the_modelling_file_is_small_and_names_its_class(llama: Any, tmp_path: Path) -> None:
    graphprune.save(llama, tmp_path / "model", portable=True)
    text = (tmp_path / "model" / "modeling_pruned_llama.py").read_text()
    assert "class LlamaForCausalLM(transformers.LlamaForCausalLM):" in text
    assert "import graphprune" not in text
    assert "from graphprune" not in text
    assert len(text.splitlines()) < 150
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_pruned_llama.LlamaForCausalLM"}


def test_its_auto_classes() -> None:
    found = {name: auto_classes(CASES[name].build()) for name in ("gpt2", "bert", "t5", "vit")}
    assert "AutoModelForCausalLM" in found["gpt2"]
    assert "AutoModelForMaskedLM" in found["bert"]
    assert "AutoModelForSeq2SeqLM" in found["t5"]
    assert "AutoModelForImageClassification" in found["vit"]


@pytest.mark.parametrize("head", ["LlamaForSequenceClassification", "LlamaModel"])
def test_other_kinds_of_models(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = getattr(transformers, head)(CASES["llama"].build().config).eval()  # type: ignore[union-attr]
    pruned = graphprune.compile(model, 0.2, method="magnitude", allocation="global")
    graphprune.save(pruned, tmp_path / "model", portable=True)
    auto = "AutoModel" if head == "LlamaModel" else "AutoModelForSequenceClassification"
    assert auto_classes(pruned) == [auto]
    loaded = in_own_memory(getattr(transformers, auto).from_pretrained(tmp_path / "model", trust_remote_code=True))
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS)[0], pruned(TOKENS)[0])


def test_no_file_where_the_config_says_all(tmp_path: Path) -> None:
    model = graphprune.compile(CASES["qwen3"].build(), 0.2, method="magnitude", deploy="transformers")
    graphprune.save(model, tmp_path / "model", portable=True)
    assert not list((tmp_path / "model").glob("*.py"))
    assert (
        not {"auto_map", "graphprune", "quantization_config"}
        & json.loads((tmp_path / "model" / "config.json").read_text()).keys()
    )


def test_a_class_that_transformers_does_not_have(tmp_path: Path) -> None:
    model = graphprune.compile(ToyTransformer(), 0.2, method="magnitude", example_inputs=torch.randn(3, 5, 7))
    with pytest.raises(GraphPruneError, match=r"portable=True: .*ToyTransformer is none"):
        graphprune.save(model, tmp_path / "model", portable=True)
    assert not (tmp_path / "model").exists()


def test_paths_of_attributes() -> None:
    assert path_of(Attribute("a.b@config@text", "heads")) == "a.b.config.text.heads"
    assert path_of(Attribute("", "sizes", 2)) == "sizes.2"
