"""What runs models runs pruned ones: pipelines, lm_eval's stock type, quantisation afterwards."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lm_eval_task import write_task
from pruned_models import CAUSAL, IMAGES, TOKENS, WORDS, fresh, logits, pruned
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import graphprune


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Words w0, w1, … of the same numbers."""
    tokens = Tokenizer(WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    tokens.pre_tokenizer = Whitespace()
    kind = transformers.PreTrainedTokenizerFast
    return kind(tokenizer_object=tokens, pad_token="w0", bos_token="w1", eos_token="w2", mask_token="w3")


@pytest.mark.parametrize("name", CAUSAL)
def test_a_pipeline_writes(name: str, tokenizer: Any) -> None:
    pipe = transformers.pipeline("text-generation", model=fresh(name), tokenizer=tokenizer)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    (found,) = pipe("w5 w6 w7", return_tensors=True, **how)
    assert found["generated_token_ids"] == pruned(name).generate(torch.tensor([[5, 6, 7]]), **how)[0].tolist()


def test_a_pipeline_fills_in(tokenizer: Any) -> None:
    pipe = transformers.pipeline("fill-mask", model=fresh("bert"), tokenizer=tokenizer)
    found = pipe("w5 w3 w7", top_k=WORDS)
    with torch.no_grad():
        expected = pruned("bert")(torch.tensor([[5, 3, 7]])).logits[0, 1].softmax(-1)
    assert found[0]["token"] == int(expected.argmax())
    assert found[0]["score"] == pytest.approx(float(expected.max()), rel=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="needs pillow")
def test_a_pipeline_sees() -> None:
    from PIL import Image

    processor = (
        transformers.ViTImageProcessorFast(size={"height": 32, "width": 32})
        if importlib.util.find_spec("torchvision")
        else transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    )
    pipe = transformers.pipeline("image-classification", model=fresh("vit"), image_processor=processor)
    pixels = (IMAGES[0].permute(1, 2, 0) * 127 + 128).to(torch.uint8).numpy()
    found = pipe(Image.fromarray(pixels))
    assert len(found) == 3
    assert sum(one["score"] for one in found) == pytest.approx(1, abs=1e-5)


def test_the_stock_type_of_lm_eval(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``lm_eval --model hf`` on a folder made for stock transformers."""
    from lm_eval.__main__ import cli_evaluate

    graphprune.save(pruned("stock"), tmp_path / "model", tokenizer=tokenizer)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [
        {"question": f"w{i} w{i + 1}", "choices": [f"w{(7 * i + k) % 90 + 4}" for k in range(4)], "answer": i % 4}
        for i in range(12)
    ]
    write_task(tasks, "tiny", rows)
    # Its own 14,000 tasks take many seconds to index.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "none" / "manager.py"))
    out = tmp_path / "out.json"
    arguments = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'}", "--tasks", "tiny"]
    arguments += ["--device", "cpu", "--include_path", str(tasks), "--output_path", str(out)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *arguments])
    cli_evaluate()
    (written,) = tmp_path.glob("out*.json")
    found = json.loads(written.read_text())["results"]["tiny"]["acc,none"]

    from graphprune.evaluate import Tasks

    assert found == Tasks(["tiny"], include_path=tasks).scores(pruned("stock"), tokenizer)["tiny"]["acc"]


# Quantisation


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
@pytest.mark.parametrize("name", CAUSAL)
def test_int8_weights_of_torchao(name: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    small = fresh(name)
    quantize_(small, Int8WeightOnlyConfig())
    quantised = [m for m in small.modules() if type(getattr(m, "weight", None)).__module__.startswith("torchao")]
    assert quantised
    before, after = logits(pruned(name), name), logits(small, name)
    assert 0 < float((after - before).norm() / before.norm()) < 0.05
    assert small.generate(TOKENS, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, 20)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_stock_transformers_quantises_on_loading(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    graphprune.save(pruned("stock"), tmp_path / "model")
    config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
    assert type(loaded.model.layers[0].mlp.up_proj.weight).__module__.startswith("torchao")
    before, after = logits(pruned("stock"), "stock"), logits(loaded, "stock")
    assert 0 < float((after - before).norm() / before.norm()) < 0.05


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["free", "stock", "bert"])
def test_dynamic_int8_of_torch(name: str) -> None:
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(pruned(name)), {torch.nn.Linear}, dtype=torch.qint8)
    before, after = logits(pruned(name), name), logits(small, name)
    assert 0 < float((after - before).norm() / before.norm()) < 0.1
