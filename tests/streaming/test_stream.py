"""What is streamed is, file by file and bit by bit, what compile and save make of the loaded model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import graphprune
from graphprune import GraphPruneError
from graphprune.cli import main
from graphprune.io.models import load_model
from graphprune.streaming import stream as stream_module
from graphprune.trace import stored
from tests.streaming.models import checkpoint, digests, gpt2, llama, mixtral, qwen2, tied

TOKENS = torch.arange(34).reshape(2, 17) * 7 % 96


def in_memory(source: Path, target: Path, ratio: float, dtype: Any = None, shard: str = "5GB", **how: Any) -> Path:
    model, tokenizer = load_model(str(source), dtype=dtype)
    pruned = graphprune.compile(model, ratio, verify=False, **how)
    graphprune.save(pruned, target, tokenizer=tokenizer, max_shard_size=shard)
    return target


@pytest.mark.parametrize(
    ("make", "shard", "how"),
    [
        pytest.param(llama, "30KB", {"method": "magnitude"}, marks=pytest.mark.slow),
        (tied, "30KB", {"method": "l1", "inner_axes": True, "exclude": ["model.layers.1.self_attn"]}),
        (qwen2, "5GB", {"method": "random", "seed": 3, "round_to": 4, "dtype": torch.float16}),
        pytest.param(gpt2, "5GB", {"method": "magnitude", "inner_axes": True}, marks=pytest.mark.slow),
        (mixtral, "60KB", {"method": "magnitude", "inner_axes": True, "experts": True}),
        (llama, "30KB", {"method": "peak-to-peak", "width": True, "deploy": "transformers"}),
    ],
    ids=["llama", "tied", "qwen2", "gpt2", "mixtral", "deployed"],
)
def test_it_is_bit_by_bit_what_is_saved_from_memory(
    tmp_path: Path, make: Callable[[], Any], shard: str, how: dict[str, Any]
) -> None:
    source = checkpoint(tmp_path / "dense", make(), shard)
    expected = in_memory(source, tmp_path / "memory", 0.25, shard=shard, **how)
    report = graphprune.stream(source, tmp_path / "stream", 0.25, max_shard_size=shard, **how)
    assert digests(tmp_path / "stream") == digests(expected)
    assert report.oracle_error is None  # nothing ran the weights, and nothing is claimed
    assert report.parameters_after < report.parameters_before
    loaded = graphprune.load(tmp_path / "stream")
    assert torch.isfinite(loaded(TOKENS).logits).all()


def test_stock_transformers_loads_what_is_deployed(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "dense", llama())
    graphprune.stream(source, tmp_path / "small", 0.2, method="magnitude", deploy="transformers")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(stock(TOKENS).logits, graphprune.load(tmp_path / "small")(TOKENS).logits)


def test_a_plan_is_replayed(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "dense", llama())
    model, tokenizer = load_model(str(source))
    pruned = graphprune.compile(model, 0.3, method="wanda-sp", data="random", samples=2, length=8)
    plan = graphprune.report(pruned).plan
    replayed = graphprune.compile(model, plan=plan, verify=False)
    graphprune.save(replayed, tmp_path / "memory", tokenizer=tokenizer)
    graphprune.stream(source, tmp_path / "stream", plan=plan)
    assert digests(tmp_path / "stream") == digests(tmp_path / "memory")


def test_what_graphprune_wrote_is_streamed_again(tmp_path: Path) -> None:
    """A per-layer plan, other dtypes, and a history of two."""
    source = checkpoint(tmp_path / "dense", tied())
    graphprune.stream(source, tmp_path / "once", 0.2, method="magnitude")
    expected = in_memory(tmp_path / "once", tmp_path / "memory", 0.2, torch.float32, method="magnitude")
    report = graphprune.stream(tmp_path / "once", tmp_path / "twice", 0.2, method="magnitude", dtype=torch.float32)
    assert digests(tmp_path / "twice") == digests(expected)
    assert len(report.history) == 1


def test_two_stored_copies_of_a_tied_weight_are_tied_if_they_are_equal(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = checkpoint(tmp_path / "dense", tied())
    tensors = load_file(source / "model.safetensors")
    for name, copy in (("equal", 0.0), ("other", 1.0)):
        both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + copy}
        save_file(both, source / "model.safetensors", metadata={"format": "pt"})
        expected = in_memory(source, tmp_path / f"{name}-memory", 0.2, method="magnitude")
        graphprune.stream(source, tmp_path / name, 0.2, method="magnitude")
        assert digests(tmp_path / name) == digests(expected), name
    sizes = [graphprune.load(tmp_path / name).num_parameters() for name in ("equal", "other")]
    assert sizes[0] < sizes[1]


def test_no_more_than_a_piece_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that reading hands out at a time, also of what is large: the embeddings are never read whole."""
    most = 2**12
    monkeypatch.setattr(stored, "_BYTES", most)
    monkeypatch.setattr(stored, "_ELEMENTS", most // 4)
    monkeypatch.setattr(stored.Stored.pieces, "__defaults__", (most,))
    source = checkpoint(tmp_path / "dense", llama(vocab_size=4000))
    read: list[int] = []
    plain = stream_module.open_checkpoint

    def counting(*args: Any) -> Any:
        found = plain(*args)
        for file in found.files:
            monkeypatch.setattr(file, "read", lambda at, n, whole=file.read: (read.append(n), whole(at, n))[1])
        return found

    monkeypatch.setattr(stream_module, "open_checkpoint", counting)
    graphprune.stream(source, tmp_path / "small", 0.03, method="magnitude")
    assert sum(read) > (source / "model.safetensors").stat().st_size / 2
    # Rows that stay are read with those that go between them: somewhat more than a piece.
    assert max(read) <= 4 * most


@pytest.mark.parametrize(
    ("make", "method", "how"),
    [
        (llama, "ppm", {}),
        (tied, "wanda-sp", {"data": "sampled", "inner_axes": True}),
        (gpt2, "flap", {"data": "random"}),
        pytest.param(llama, "flap", {"data": "random", "dtype": torch.float32}, marks=pytest.mark.slow),
        (mixtral, "slimgpt", {"data": "random"}),
        pytest.param(qwen2, "flap-wifn", {"data": torch.arange(64).reshape(2, 32) % 96}, marks=pytest.mark.slow),
    ],
)
def test_methods_that_look_at_activations_bring_weights_from_disk(
    tmp_path: Path, make: Callable[[], Any], method: str, how: dict[str, Any]
) -> None:
    """The model is never in memory, what is written is what it would be, biases and adapted weights too."""
    source = checkpoint(tmp_path / "dense", make())
    how = {"method": method, "samples": 4, "length": 16, **how}
    expected = in_memory(source, tmp_path / "memory", 0.25, **how)
    graphprune.stream(source, tmp_path / "stream", 0.25, **how)
    assert digests(tmp_path / "stream") == digests(expected)
    assert torch.isfinite(graphprune.load(tmp_path / "stream")(TOKENS).logits).all()


@pytest.mark.parametrize("method", ["llm-pruner", "taylor-second", "lorashear", "loraprune"])
def test_methods_that_train_are_refused_by_name(tmp_path: Path, method: str) -> None:
    source = checkpoint(tmp_path / "dense", llama())
    with pytest.raises(GraphPruneError, match="magnitude"):
        graphprune.stream(source, tmp_path / "small", 0.2, method=method)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "dense", llama())
    (tmp_path / "small").mkdir()
    with pytest.raises(GraphPruneError, match="exists already"):
        graphprune.stream(source, tmp_path / "small", 0.2, method="magnitude")
    assert list((tmp_path / "small").iterdir()) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "dense", llama())
    command = ["prune", str(source), "--ratio", "0.2", "--stream", "--method", "l1", "-o", str(tmp_path / "small")]
    assert main([*command, "--max-shard-size", "20KB", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["oracle_error"] is None
    assert abs(said["ratio"] - 0.2) < 0.05
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 1
    assert main([*command[:-1], str(tmp_path / "other"), "--unprunable-ratio", "0.1"]) == 1
    assert "--unprunable-ratio" in capsys.readouterr().err
