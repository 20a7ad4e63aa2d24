"""Uploads, up to the calls of huggingface_hub that would reach the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard
from torch import nn

import graphprune
from graphprune import GraphPruneError

TOKENS = torch.arange(34).reshape(2, 17) * 7 % 96


def llama() -> nn.Module:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **sizes)).eval()


class Hub:
    """Keeps what would be uploaded: repository → files."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, []

    def create_repo(self, _: HfApi, repo_id: str, **arguments: Any) -> Any:
        self.calls.append(("create_repo", repo_id, arguments))
        return transformers.utils.generic.ModelOutput(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def upload_folder(self, api: HfApi, *, repo_id: str, folder_path: Path, **arguments: Any) -> str:
        import shutil

        self.calls.append(("upload_folder", repo_id, {"token": api.token, **arguments}))
        shutil.copytree(folder_path, self.folder / repo_id)
        return "the commit"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path)
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **more: made.create_repo(*args, **more))
    monkeypatch.setattr(HfApi, "upload_folder", lambda *args, **more: made.upload_folder(*args, **more))
    return made


def test_what_is_uploaded_is_what_save_writes(hub: Hub, tmp_path: Path) -> None:
    small = graphprune.compile(llama(), 0.2, method="random")
    arguments = {"private": True, "token": "secret", "revision": "main", "metadata": {"license": "mit"}}
    assert graphprune.push_to_hub(small, "small", commit_message="Smaller", **arguments) == "the commit"
    assert hub.calls == [
        ("create_repo", "small", {"private": True, "exist_ok": True}),
        (
            "upload_folder",
            "me/small",
            {"token": "secret", "revision": "main", "commit_message": "Smaller", "create_pr": False},
        ),
    ]
    loaded = graphprune.load(tmp_path / "me" / "small")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, small(TOKENS).logits)
    assert ModelCard.load(tmp_path / "me" / "small" / "README.md").data.license == "mit"


def test_stock_transformers_loads_an_uploaded_stock_model(hub: Hub, tmp_path: Path) -> None:
    small = graphprune.compile(llama(), 0.2, method="random", deploy="transformers")
    graphprune.push_to_hub(small, "me/small")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "me" / "small")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, small(TOKENS).logits)


def test_nothing_is_made_on_the_hub_for_a_model_that_cannot_be_saved(hub: Hub) -> None:
    with pytest.raises(GraphPruneError, match="not made by graphprune"):
        graphprune.push_to_hub(llama(), "me/small")
    assert hub.calls == []


def test_a_hub_that_is_not_there() -> None:
    """HF_HUB_OFFLINE is set in all tests."""
    small = graphprune.compile(llama(), 0.2, method="random", verify=False)
    with pytest.raises(GraphPruneError, match=r"me/small could not be uploaded: .*offline"):
        graphprune.push_to_hub(small, "me/small")
    with pytest.raises(GraphPruneError, match="could not be uploaded"):
        graphprune.push_to_hub(small, "no / name")
