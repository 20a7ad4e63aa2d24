"""Folders of pruned models, loaded by stock ``from_pretrained``: in a process of its own, or here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from models import CASES
from safetensors.torch import save_file
from torch import nn

import graphprune

TOKENS = torch.arange(34).reshape(2, 17) * 7 % 96
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
GENERATE = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}

# Runs in a process of its own: "imported" after importing graphprune, "stock" and "portable" where that raises, the
# latter with the modelling files in the folders. Writes what the models compute and, but for "stock", what those do
# that their save_pretrained wrote.
_LOAD = """
import importlib.abc, json, sys

class Forbidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "graphprune":
            raise ImportError("graphprune is not installed here")

folder, mode = sys.argv[1:3]
if mode == "imported":
    import graphprune
    assert "transformers" not in sys.modules and "torch" not in sys.modules
else:
    sys.meta_path.insert(0, Forbidden())
options = {"trust_remote_code": True} if mode == "portable" else {}
import torch, transformers
torch.set_num_threads(1)  # as in the tests
from safetensors.torch import load_file, save_file

given = load_file(f"{folder}/given.safetensors")
made, notes = {}, {}

def run(name, model, auto, generates):
    for tensor in (*model.parameters(), *model.buffers()):  # not where the file is mapped to
        tensor.data = tensor.data.clone()
    with torch.no_grad():
        if "ImageClassification" in auto:
            made[name] = model(given["images"]).logits
        elif "Seq2Seq" in auto:
            made[name] = model(input_ids=given["tokens"], decoder_input_ids=given["tokens"]).logits
        else:
            made[name] = model(given["tokens"]).logits
    if generates:
        made[f"{name}.generated"] = model.generate(given["tokens"], **json.loads(sys.argv[3]))

for name, (auto, generates) in json.load(open(f"{folder}/cases.json")).items():
    load = getattr(transformers, auto).from_pretrained
    model, info = load(f"{folder}/{name}", output_loading_info=True, **options)
    notes[name] = {"class": type(model).__name__, **{key: str(value) for key, value in info.items() if value}}
    run(name, model, auto, generates)
    if mode != "stock":
        model.save_pretrained(f"{folder}/again/{name}")
        run(f"{name}.again", load(f"{folder}/again/{name}", **options), auto, False)
save_file({key: value.contiguous() for key, value in made.items()}, f"{folder}/made.safetensors")
json.dump(notes, open(f"{folder}/notes.json", "w"))
"""


def start(mode: str, pruned: dict[str, nn.Module], folder: Path) -> subprocess.Popen[str]:
    """Save models, by the names of their cases, and have transformers load them; see :func:`finish`."""
    folder.mkdir()
    for name, model in pruned.items():
        graphprune.save(model, folder / name, portable=mode == "portable")
    save_file({"tokens": TOKENS, "images": IMAGES}, folder / "given.safetensors")
    (folder / "cases.json").write_text(json.dumps({name: (CASES[name].auto, CASES[name].generates) for name in pruned}))
    command = [sys.executable, "-c", _LOAD, str(folder), mode, json.dumps(GENERATE)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=folder
    )


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for it: made.safetensors and notes.json are there then."""
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-4000:]


def logits(model: nn.Module, auto: str = "AutoModelForCausalLM") -> torch.Tensor:
    with torch.no_grad():
        if auto == "AutoModelForImageClassification":
            return model(IMAGES).logits
        if auto == "AutoModelForSeq2SeqLM":
            return model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
        return model(TOKENS).logits


def in_own_memory(model: Any) -> Any:
    """What lies in a mapped file is computed with otherwise, off the boundaries of SIMD."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def reloaded(model: Any, folder: Path) -> Any:
    """``model`` as its own class loads it from ``folder``, where it is saved."""
    graphprune.save(model, folder)
    return in_own_memory(type(model).from_pretrained(folder))
