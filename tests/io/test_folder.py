"""save and load: what comes back is what was saved, bit by bit, and whatever is damaged is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import graphprune
from graphprune import GraphPruneError
from graphprune.io import weight_files
from graphprune.io.manifest import seal

TOKENS = torch.arange(34).reshape(2, 17) * 7 % 96


def llama(**changes: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            **changes,
        }
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


class ConvNet(nn.Module):
    """Batch norm, a non-persistent buffer, a tensor that is a plain attribute, and one frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 16, 3, bias=False)
        self.head = nn.Linear(16, 5)
        self.register_buffer("scale", torch.rand(5), persistent=False)
        self.offset = torch.rand(5)
        self.head.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.relu(self.norm(self.first(x)))).relu().mean((2, 3))
        return self.head(x) * self.scale + self.offset


def conv_net() -> nn.Module:
    net = ConvNet()
    net(torch.randn(4, 3, 11, 11))  # running statistics that are not 0 and 1
    return net.eval()


IMAGE = torch.rand(2, 3, 13, 13)


@pytest.fixture(scope="module")
def pruned() -> nn.Module:
    """Not to be changed by tests."""
    torch.manual_seed(0)
    return graphprune.compile(llama(), 0.2)


@pytest.fixture(scope="module")
def pruned_net() -> nn.Module:
    """Not to be changed by tests."""
    torch.manual_seed(0)
    return graphprune.compile(conv_net(), 0.3, example_inputs=IMAGE)


@pytest.fixture(scope="module")
def saved(pruned: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    graphprune.save(pruned, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def round_trip(pruned: nn.Module, tmp_path: Path, **arguments: Any) -> nn.Module:
    graphprune.save(pruned, tmp_path / "model")
    return graphprune.load(tmp_path / "model", **arguments)


def assert_same_tensors(one: nn.Module, other: nn.Module) -> None:
    first, second = dict(one.named_parameters()), dict(other.named_parameters())
    assert list(first) == list(second)
    for name, parameter in first.items():
        assert parameter.dtype == second[name].dtype
        assert parameter.requires_grad == second[name].requires_grad
        assert torch.equal(parameter, second[name])
    first, second = dict(one.named_buffers()), dict(other.named_buffers())
    assert list(first) == list(second)
    assert all(torch.equal(buffer, second[name]) for name, buffer in first.items())
    assert one.state_dict().keys() == other.state_dict().keys()


# What comes back


def test_llama_comes_back_bit_by_bit(pruned: nn.Module, saved: Path) -> None:
    loaded = graphprune.load(str(saved))
    assert type(loaded) is type(pruned)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(pruned))
    assert_same_tensors(pruned, loaded)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.model.layers[0].mlp.gate_proj.out_features == loaded.model.layers[0].mlp.gate_proj.weight.shape[0]


def test_grouped_query_heads_come_back(tmp_path: Path) -> None:
    small = graphprune.compile(llama(tie_word_embeddings=False), 0.1, include="*.self_attn")
    assert small.model.layers[0].self_attn.k_proj.weight.shape[0] < 16
    loaded = round_trip(small, tmp_path)
    assert torch.equal(logits(loaded), logits(small))
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


def test_generates_after_loading(pruned: nn.Module, saved: Path) -> None:
    loaded = graphprune.load(saved)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(TOKENS, **arguments), pruned.generate(TOKENS, **arguments))
    assert torch.equal(loaded.generate(TOKENS, **arguments), loaded.generate(TOKENS, use_cache=False, **arguments))


def test_generation_settings_come_back(pruned: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(pruned)
    # Settings that transformers warns about but that models are published with.
    model.generation_config = transformers.GenerationConfig(temperature=0.3, do_sample=False, max_new_tokens=3)
    loaded = round_trip(model, tmp_path)
    assert loaded.generation_config.temperature == 0.3
    assert loaded.generate(TOKENS).shape == (2, 20)


def test_sizes_held_by_modules_come_back(tmp_path: Path) -> None:
    """GPT-2 reads the width of its fused projection from attributes."""
    small = graphprune.compile(gpt2(), 0.1, include="*.attn")
    attributes = graphprune.report(small).attributes
    assert attributes
    loaded = round_trip(small, tmp_path)
    assert loaded.transformer.h[0].attn.split_size == small.transformer.h[0].attn.split_size < 32
    assert graphprune.report(loaded).attributes == attributes
    assert torch.equal(logits(loaded), logits(small))


def test_bf16_comes_back_as_bf16(tmp_path: Path) -> None:
    small = graphprune.compile(llama().to(torch.bfloat16), 0.2)
    loaded = round_trip(small, tmp_path)
    assert_same_tensors(small, loaded)
    assert torch.equal(logits(loaded), logits(small))
    assert loaded.config.dtype == torch.bfloat16


def test_dtype_is_that_of_the_weights(saved: Path) -> None:
    loaded = graphprune.load(saved, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert logits(loaded).dtype == torch.bfloat16


def test_the_attention_in_use_comes_back(tmp_path: Path) -> None:
    small = graphprune.compile(llama(attn_implementation="eager"), 0.2)
    loaded = round_trip(small, tmp_path)
    assert loaded.config._attn_implementation == "eager"
    assert torch.equal(logits(loaded), logits(small))


def test_plain_module_comes_back(pruned_net: nn.Module, tmp_path: Path) -> None:
    loaded = round_trip(pruned_net, tmp_path, model=ConvNet)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGE), pruned_net(IMAGE))
    assert_same_tensors(pruned_net, loaded)
    assert torch.equal(loaded.offset, pruned_net.offset)
    assert not loaded.head.bias.requires_grad
    assert loaded.norm.num_features == loaded.first.out_channels < 12
    assert not (tmp_path / "model" / "config.json").exists()
    again = graphprune.compile(loaded, 0.2, example_inputs=IMAGE)
    assert graphprune.report(again).history[0].plan == graphprune.report(pruned_net).plan


def test_twice_pruned_model_comes_back(pruned: nn.Module, tmp_path: Path) -> None:
    twice = graphprune.compile(pruned, 0.2)
    loaded = round_trip(twice, tmp_path)
    assert torch.equal(logits(loaded), logits(twice))
    before, after = graphprune.report(twice), graphprune.report(loaded)
    assert after.plan == before.plan
    assert [one.plan for one in after.history] == [graphprune.report(pruned).plan]
    assert (after.parameters_before, after.parameters_after) == (before.parameters_before, before.parameters_after)
    assert (after.oracle_error, after.skipped, after.widths) == (before.oracle_error, before.skipped, before.widths)


def test_a_loaded_model_can_be_pruned_and_saved_again(saved: Path, tmp_path: Path) -> None:
    loaded = graphprune.load(saved)
    graphprune.save(loaded, tmp_path / "same")
    assert torch.equal(logits(graphprune.load(tmp_path / "same")), logits(loaded))
    again = graphprune.compile(loaded, 0.2)
    assert len(graphprune.report(again).history) == 1
    graphprune.save(again, tmp_path / "again")
    assert torch.equal(logits(graphprune.load(tmp_path / "again")), logits(again))


def test_large_models_are_sharded(pruned: nn.Module, tmp_path: Path) -> None:
    graphprune.save(pruned, tmp_path / "model", max_shard_size="20KB")
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 1
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert torch.equal(logits(graphprune.load(tmp_path / "model")), logits(pruned))


def test_the_tokenizer_is_written(pruned: nn.Module, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1})))
    graphprune.save(pruned, tmp_path / "model", tokenizer=tokenizer)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert read.get_vocab() == {"a": 0, "b": 1}


# What is on disk


def test_what_the_folder_holds(pruned: nn.Module, saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "graphprune.json",
        "graphprune_buffers.safetensors",
        "model.safetensors",
    ]
    # Tied tensors once, and nothing outside the state dict in the standard file.
    assert load_file(saved / "model.safetensors").keys() == pruned.state_dict().keys() - {"lm_head.weight"}
    assert "model.rotary_emb.inv_freq" in load_file(saved / "graphprune_buffers.safetensors")
    assert os.stat(saved).st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_config_is_the_one_before_pruning(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["intermediate_size"] == 48
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert transformers.AutoConfig.from_pretrained(saved).num_attention_heads == 4


def test_manifest_says_what_was_done(pruned: nn.Module, saved: Path) -> None:
    data = json.loads((saved / "graphprune.json").read_text())
    assert data["class_name"] == "LlamaForCausalLM"
    assert data["versions"]["torch"] == torch.__version__
    assert data["ties"]["lm_head.weight"]["to"] == "model.embed_tokens.weight"
    assert data["files"]["model.safetensors"]["bytes"] == (saved / "model.safetensors").stat().st_size
    done = graphprune.report(pruned)
    assert graphprune.Plan.from_dict(data["reports"][0]["plan"]) == done.plan
    assert data["reports"][0]["parameters_after"] == done.parameters_after
    assert data["tensors"]["model.norm.weight"]["shape"] == [32]


def test_quantisation_left_from_loading_is_not_claimed(pruned: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(pruned)
    graphprune.report(model).base_config.quantization_config = {"quant_method": "gguf"}
    loaded = round_trip(model, tmp_path)
    assert (
        json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]["quant_method"]
        == "graphprune"
    )
    assert not hasattr(loaded.config, "quantization_config")


def test_infinities_in_a_config_come_back(pruned: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(pruned)
    graphprune.report(model).base_config.limits = [0.0, float("inf")]
    assert round_trip(model, tmp_path).config.limits == [0.0, float("inf")]


def test_unpruned_weights_are_never_allocated(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything the constructor registers is on meta; what is real afterwards is what was on disk."""
    registered: list[torch.Tensor] = []
    plain = nn.Module.register_parameter

    def spy(self: nn.Module, name: str, param: Any) -> None:
        if param is not None:
            registered.append(param)
        plain(self, name, param)

    monkeypatch.setattr(nn.Module, "register_parameter", spy)
    loaded = graphprune.load(saved)
    assert registered
    assert all(parameter.is_meta for parameter in registered)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


def test_loaded_weights_do_not_depend_on_the_file(folder: Path, pruned: nn.Module) -> None:
    loaded = graphprune.load(folder)
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(logits(loaded), logits(pruned))


# Saving is all or nothing


def assert_nothing_in(folder: Path) -> None:
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("failing", ["save_file", "fingerprint"])
def test_a_failing_write_leaves_nothing(
    pruned: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    real = getattr(weight_files, failing)
    calls = []

    def fails_second_time(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(weight_files, failing, fails_second_time)
    with pytest.raises(GraphPruneError, match="No space left"):
        graphprune.save(pruned, tmp_path / "model", max_shard_size="20KB")
    assert len(calls) == 2
    assert_nothing_in(tmp_path)


def test_an_interrupt_leaves_nothing(pruned: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        graphprune.save(pruned, tmp_path / "model")
    assert_nothing_in(tmp_path)


@pytest.mark.parametrize("kind", ["file", "folder", "broken link"])
def test_an_existing_target_is_left_as_it_is(pruned: nn.Module, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "model"
    if kind == "file":
        target.write_text("mine")
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(GraphPruneError, match="exists"):
        graphprune.save(pruned, target)
    assert list(tmp_path.iterdir()) == [target]
    assert kind != "file" or target.read_text() == "mine"
    assert kind != "folder" or not list(target.iterdir())


def test_a_parent_that_is_a_file(pruned: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(GraphPruneError, match="could not be written"):
        graphprune.save(pruned, tmp_path / "file" / "model")


def test_parents_are_made(pruned: nn.Module, tmp_path: Path) -> None:
    graphprune.save(pruned, tmp_path / "a" / "b")
    assert graphprune.report(graphprune.load(tmp_path / "a" / "b")).plan == graphprune.report(pruned).plan


def test_only_pruned_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match="not made by graphprune"):
        graphprune.save(llama(), tmp_path / "model")
    with pytest.raises(GraphPruneError, match=r"torch\.nn\.Module"):
        graphprune.save("model", tmp_path / "model")  # type: ignore[arg-type]
    assert_nothing_in(tmp_path)


def test_what_could_not_be_loaded_is_not_saved(pruned: nn.Module, tmp_path: Path) -> None:
    grown = copy.deepcopy(pruned)
    grown.resize_token_embeddings(100)
    with pytest.raises(GraphPruneError, match="changed otherwise"):
        graphprune.save(grown, tmp_path / "model")
    adapted = copy.deepcopy(pruned)
    adapted.model.adapter = nn.Linear(2, 2)
    with pytest.raises(GraphPruneError, match="adapter"):
        graphprune.save(adapted, tmp_path / "model")
    with pytest.raises(GraphPruneError, match="meta"):
        graphprune.save(copy.deepcopy(pruned).to("meta"), tmp_path / "model")
    with pytest.raises(GraphPruneError, match="tokenizer"):
        graphprune.save(pruned, tmp_path / "model", tokenizer="a")
    with pytest.raises(GraphPruneError, match="5 potatoes"):
        graphprune.save(pruned, tmp_path / "model", max_shard_size="5 potatoes")
    assert_nothing_in(tmp_path)


# What is refused on loading


@pytest.fixture
def no_weights_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong must be found before a weight is read."""

    def refuse(*_: Any) -> None:
        pytest.fail("weights were read from a damaged folder")

    monkeypatch.setattr("graphprune.io.folder.read_weights", refuse)


def refuses(folder: Path, match: str, **arguments: Any) -> None:
    with pytest.raises(GraphPruneError, match=match):
        graphprune.load(folder, **arguments)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change graphprune.json on purpose, with a checksum that fits."""
    data = json.loads((folder / "graphprune.json").read_text())
    change(data)
    data["sha256"] = seal(data)
    (folder / "graphprune.json").write_text(json.dumps(data))


def reseal_file(folder: Path, name: str) -> None:
    stored = weight_files.fingerprint(folder / name)
    edit(folder, lambda data: data["files"].update({name: {"bytes": stored.bytes, "sha256": stored.sha256}}))


@pytest.mark.usefixtures("no_weights_read")
class TestRefused:
    def test_foreign_folders(self, tmp_path: Path) -> None:
        refuses(tmp_path / "nowhere", "no folder")
        refuses(tmp_path, "not written by graphprune")
        (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        refuses(tmp_path, "not written by graphprune")
        (tmp_path / "file").write_text("{}")
        refuses(tmp_path / "file", "no folder")

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
    )
    def test_damaged_json(self, folder: Path, content: bytes) -> None:
        (folder / "graphprune.json").write_bytes(content)
        refuses(folder, r"graphprune\.json")

    def test_a_changed_digit(self, folder: Path) -> None:
        path = folder / "graphprune.json"
        text = path.read_text()
        assert '"parameters_before": 1' in text
        path.write_text(text.replace('"parameters_before": 1', '"parameters_before": 2'))
        refuses(folder, "does not match its checksum")

    def test_every_missing_key_and_wrong_type(self, folder: Path) -> None:
        whole = json.loads((folder / "graphprune.json").read_text())
        for key in whole:
            if key in ("format", "sha256"):
                continue
            edit(folder, lambda data, key=key: data.pop(key))
            refuses(folder, f"{key}.* is missing")
            edit(folder, lambda data, key=key: data.update(whole) or data.update({key: 1.5}))
            refuses(folder, f"{key} is damaged: expected")
            edit(folder, lambda data: data.update(whole))
        graphprune.io.manifest.read_manifest(folder)  # all put back

    def test_every_missing_key_and_wrong_type_of_a_report(self, folder: Path) -> None:
        whole = json.loads((folder / "graphprune.json").read_text())["reports"][0]
        for key in whole:
            rest = {k: v for k, v in whole.items() if k != key}
            if key not in ("settings", "calibration", "scores"):  # older folders have none of them
                edit(folder, lambda data, rest=rest: data.update(reports=[rest]))
                refuses(folder, f"reports.*{key}.* is missing")
            edit(folder, lambda data, rest=rest, key=key: data.update(reports=[{**rest, key: "no"}]))
            refuses(folder, f"reports.*{key} is damaged")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda d: d.update(format=99), "format 99"),
            (lambda d: d.update(reports=[]), "no report"),
            (lambda d: d["reports"][0].update(plan={"format": 1}), "plan is damaged"),
            (lambda d: d["tensors"]["model.norm.weight"].update(dtype="load"), "no dtype"),
            (lambda d: d["tensors"]["model.norm.weight"].update(kind="module"), "none of parameter"),
            (lambda d: d["tensors"]["model.norm.weight"].update(shape=[-32]), "negative"),
            (lambda d: d["tensors"]["model.norm.weight"].update(shape=["32"]), "expected int"),
            (lambda d: d["tensors"]["model.norm.weight"].update(shape=[True]), "expected int"),
            (lambda d: d["tensors"]["model.norm.weight"].update(shape=[2**62, 2**62]), "tensor table says"),
            (lambda d: d["tensors"]["model.norm.weight"].update(shape=[31]), "tensor table says"),
            (lambda d: d["tensors"]["model.norm.weight"].update(dtype="int64"), "cannot require gradients"),
            (lambda d: d["tensors"].pop("model.norm.weight"), "disagree on 'model.norm.weight'"),
            (lambda d: d["tensors"].update(x=d["tensors"]["model.norm.weight"]), "disagree on 'x'"),
            (lambda d: d["tensors"]["model.norm.weight"].update(file="other.safetensors"), "none of its weight files"),
            (lambda d: d["tensors"]["model.norm.weight"].update(file="config.json"), "none of its weight files"),
            (lambda d: d["tensors"]["model.norm.weight"].update(kind="buffer"), "is a parameter of"),
            (lambda d: d["ties"].clear(), "lm_head.weight"),
            (lambda d: d["ties"].update(x={"to": "model.norm.weight", "kind": "parameter"}), "'x'"),
            (lambda d: d["ties"].update(x={"to": "y", "kind": "parameter"}), "cannot share"),
        ],
    )
    def test_manifests_that_do_not_hold_together(
        self, folder: Path, change: Callable[[dict[str, Any]], Any], match: str
    ) -> None:
        edit(folder, change)
        refuses(folder, match)

    @pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", "a\nb"])
    def test_file_names_that_lead_elsewhere(self, folder: Path, name: str) -> None:
        shutil.copy(folder / "model.safetensors", folder.parent / "secret.safetensors")

        def move(data: dict[str, Any]) -> None:
            data["files"][name] = data["files"].pop("model.safetensors")
            for stored in data["tensors"].values():
                stored["file"] = name if stored["file"] == "model.safetensors" else stored["file"]

        edit(folder, move)
        refuses(folder, "will not be opened")

    @pytest.mark.parametrize("name", ["model.safetensors", "graphprune_buffers.safetensors", "config.json"])
    def test_missing_truncated_and_flipped_files(self, folder: Path, name: str) -> None:
        path = folder / name
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[-1] ^= 1
        path.write_bytes(flipped)
        refuses(folder, f"{name} does not match its checksum")
        path.write_bytes(whole[:-1])
        refuses(folder, f"{name} has .* bytes")
        path.write_bytes(b"")
        refuses(folder, f"{name} has 0 bytes")
        path.unlink()
        refuses(folder, f"no file {name}")
        path.mkdir()
        refuses(folder, f"no file {name}")

    def test_a_header_that_promises_more_than_the_file_holds(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        whole = path.read_bytes()
        size = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + size])
        header["model.norm.weight"].update(shape=[2**40], data_offsets=[0, 2**42])
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
        reseal_file(folder, path.name)
        refuses(folder, "no readable safetensors file")

    def test_weights_that_do_not_come_from_pruning_this_model(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] = torch.ones(33)
        save_file(tensors, folder / "model.safetensors")
        reseal_file(folder, "model.safetensors")
        edit(folder, lambda data: data["tensors"]["model.norm.weight"].update(shape=[33]))
        refuses(folder, r"model\.norm\.weight has shape \[33\]")

    @pytest.mark.parametrize(
        ("owner", "name", "index"),
        [
            ("model.layers.7", "width", None),
            ("model.layers.0.mlp", "nonsense", None),
            ("model@nonsense", "width", None),
            ("@config", "nonsense", None),
            ("@config", "hidden_size", 0),
            ("@config", "architectures", 3),
            ("@_modules@model", "training", None),
            ("", "forward", None),
        ],
    )
    def test_attributes_that_do_not_exist(self, folder: Path, owner: str, name: str, index: int | None) -> None:
        attribute = {"owner": owner, "name": name, "index": index, "value": 3}
        edit(folder, lambda data: data["reports"][0].update(attributes=[attribute]))
        refuses(folder, "no such integer attribute")

    @pytest.mark.parametrize("name", ["os", "modeling_utils.os", "AutoModel", "LlamaConfig", "NoSuchModel", "__name__"])
    def test_only_model_classes_of_transformers_are_built(self, folder: Path, name: str) -> None:
        edit(folder, lambda data: data.update(class_name=name))
        refuses(folder, "does not have as a model class")

    def test_configs_of_something_else(self, folder: Path) -> None:
        def rewrite(**changes: Any) -> None:
            data = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**data, **changes}))
            reseal_file(folder, "config.json")

        rewrite(hidden_size="wide")
        refuses(folder, "describes no LlamaForCausalLM")
        rewrite(hidden_size=64)
        refuses(folder, "this is not the model")
        rewrite(hidden_size=32, intermediate_size=10**15)  # on meta this costs nothing
        refuses(folder, "this is not the model")
        rewrite(intermediate_size=48, num_hidden_layers=10**5)
        refuses(folder, "far more tensors")
        rewrite(num_hidden_layers=3)
        refuses(folder, "of which the weights are not in the folder")
        rewrite(num_hidden_layers=1)
        refuses(folder, "has no place")
        (folder / "config.json").write_text("[]")
        reseal_file(folder, "config.json")
        refuses(folder, "no JSON object")

    def test_a_class_that_transformers_does_not_have(self, pruned_net: nn.Module, tmp_path: Path) -> None:
        graphprune.save(pruned_net, tmp_path / "net")
        refuses(tmp_path / "net", r"load\(folder, model=f\)")
        refuses(tmp_path / "net", "built a Linear", model=lambda: nn.Linear(2, 2))
        refuses(tmp_path / "net", "function", model=pruned_net)
        refuses(tmp_path / "net", "function", model=3)

    def test_a_factory_of_another_size(self, pruned_net: nn.Module, tmp_path: Path) -> None:
        def wider() -> nn.Module:
            net = ConvNet()
            net.second = nn.Conv2d(12, 17, 3, bias=False)
            return net

        graphprune.save(pruned_net, tmp_path / "net")
        refuses(tmp_path / "net", "this is not the model", model=wider)

    def test_bad_arguments(self, folder: Path) -> None:
        refuses(folder, "meta", device="meta")
        refuses(folder, "nonsense", device="nonsense")
        refuses(folder, "floating-point", dtype=torch.int8)
        refuses(folder, "floating-point", dtype="bf16")


def test_stored_dtypes_are_checked(folder: Path) -> None:
    edit(folder, lambda data: data["tensors"]["model.norm.weight"].update(dtype="bfloat16"))
    refuses(folder, "the tensor table says bfloat16")


def test_damaged_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    refuses(folder, r"generation_config\.json is damaged")


def test_code_named_by_a_config_is_not_fetched(folder: Path) -> None:
    """An attention implementation may be the name of a repository with kernels to download and run."""
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        data = json.loads((folder / "config.json").read_text())
        data[key] = "someone/kernels"
        data["auto_map"] = {"AutoModelForCausalLM": "evil--evil.Evil"}
        (folder / "config.json").write_text(json.dumps(data))
    reseal_file(folder, "config.json")
    edit(folder, lambda data: data.update(attention="someone/kernels"))
    loaded = graphprune.load(folder)
    assert loaded.config._attn_implementation == "sdpa"
    assert not hasattr(loaded.config, "auto_map")


def test_pickles_are_never_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a pickle was read")

    monkeypatch.setattr("pickle.Unpickler", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("torch.load", refuse)
    graphprune.load(folder)


def test_tensors_that_cannot_be_restored_are_named(tmp_path: Path) -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 3)
            self.tables = [torch.ones(3)]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x))) + self.tables[0]

    small = graphprune.compile(Hidden(), 0.3, example_inputs=torch.rand(5, 6))
    graphprune.save(small, tmp_path / "model")
    refuses(tmp_path / "model", "keeps a tensor in 'tables'", model=Hidden)


def test_safetensors_metadata_is_that_of_transformers(saved: Path) -> None:
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
