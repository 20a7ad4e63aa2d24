"""Inputs that the compiler makes when nobody gives any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import analyse, randomise, snapshot, toy
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import graphprune
from graphprune import GraphPruneError
from graphprune.data.calibration import calibration_batches
from graphprune.data.made_inputs import vocabulary

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(**settings: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        **(SIZES | {"vocab_size": 40, "bos_token_id": 3, "eos_token_id": 7, "pad_token_id": 0} | settings)
    )
    return randomise(LlamaForCausalLM(config)).eval()  # type: ignore[return-value]


def made(model: nn.Module, example: Any = None, **options: Any) -> list[dict[str, Any]]:
    return calibration_batches(analyse(model, example, **({"samples": 6, "length": 20} | options)))


def joined(batches: list[dict[str, Any]], name: str = "input_ids") -> Tensor:
    return torch.cat([batch[name] for batch in batches])


def test_tokens_are_uniform_over_the_plain_ones() -> None:
    tokens = joined(made(llama(), data="random", samples=100, length=40))
    assert tokens.shape == (100, 40)
    counts = tokens.flatten().bincount(minlength=40)
    special = [0, 3, 7]
    assert counts[special].tolist() == [0, 0, 0]
    plain = counts[[n for n in range(40) if n not in special]]
    # 4000 draws of 37: about 108 of each, with a deviation of 10.
    assert plain.min() > 60
    assert plain.max() < 160


def test_draws_follow_the_seed_and_no_generator_is_touched() -> None:
    model = llama()
    for data in ("random", "snippets", "sampled"):
        programs = [analyse(model, data=data, samples=6, length=20, seed=seed) for seed in (1, 1, 2)]
        state = torch.get_rng_state()
        first, again, other = (joined(calibration_batches(program)) for program in programs)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_no_data_is_snippets_where_a_model_writes_and_random_data_elsewhere() -> None:
    model = llama()
    assert torch.equal(joined(made(model)), joined(made(model, data="snippets")))
    bert = BertForMaskedLM(BertConfig(**SIZES, vocab_size=40)).eval()
    assert torch.equal(joined(made(bert)), joined(made(bert, data="random")))
    mute = llama()
    mute.lm_head.weight.data.fill_(float("nan"))  # generate fails
    assert torch.equal(joined(made(mute)), joined(made(mute, data="random")))


def test_how_many_rows_there_are_when_nobody_says() -> None:
    counted = {data: len(joined(made(llama(), data=data, samples=None))) for data in ("random", "snippets", "sampled")}
    assert counted == {"random": 32, "snippets": 8, "sampled": 32}


def test_a_row_is_no_longer_than_the_model() -> None:
    config = BertConfig(**SIZES, vocab_size=40, max_position_embeddings=16)
    assert joined(made(BertForMaskedLM(config).eval())).shape == (6, 14)
    assert joined(made(llama(max_position_embeddings=10), data="sampled")).shape == (6, 8)


def test_a_given_mask_of_ones_does_not_bind_the_shape() -> None:
    tokens = torch.arange(10).view(2, 5)
    free = made(llama(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    assert joined(free).shape == (6, 20)
    bound = made(llama(), {"input_ids": tokens, "attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])})
    assert [tuple(batch["input_ids"].shape) for batch in bound] == [(2, 5)] * 3
    assert all(batch["attention_mask"].tolist() == [[1] * 5, [0, 0, 1, 1, 1]] for batch in bound)


def test_an_encoder_and_its_decoder_both_get_tokens() -> None:
    config = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, vocab_size=40)
    batches = made(T5ForConditionalGeneration(config).eval())
    assert joined(batches).shape == joined(batches, "decoder_input_ids").shape == (6, 20)
    assert not torch.equal(joined(batches), joined(batches, "decoder_input_ids"))


def test_images_are_normal_in_the_shape_of_the_example() -> None:
    config = ViTConfig(**SIZES, image_size=16, patch_size=4)
    batches = made(ViTForImageClassification(config).eval(), samples=12)
    assert {tuple(batch["pixel_values"].shape[1:]) for batch in batches} == {(3, 16, 16)}
    images = joined(batches, "pixel_values")
    assert 12 <= len(images) < 24
    assert images.mean().abs() < 0.05
    assert images.std() == pytest.approx(1, abs=0.05)
    assert len({float(image.sum()) for image in images}) == len(images)


def test_places_of_an_image_stay_in_the_text() -> None:
    vision = {**SIZES, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "projection_dim": 16}
    text = {**SIZES, "model_type": "llama", "vocab_size": 60}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=50, vision_feature_layer=-1)
    program = analyse(LlavaForConditionalGeneration(config).eval(), samples=9)
    (_, example), batches = program.inputs, calibration_batches(program)
    places = example["input_ids"] == 50
    assert places.any()
    assert len(batches) > 1
    for batch in batches:
        assert torch.equal(batch["input_ids"] == 50, places)
        assert not torch.equal(batch["input_ids"], example["input_ids"])
        assert not torch.equal(batch["pixel_values"], example["pixel_values"])


class Mixed(nn.Module):
    """Reads numbers, indices, a mask, and features with their positions in front."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 7)
        self.up, self.down = nn.Linear(7, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor, index: Tensor, keep_mask: Tensor, patches: Tensor) -> Tensor:
        placed = self.table(patches[..., 0].long()) * patches[..., 1:].mean(-1, keepdim=True)
        return self.down(self.up((x + self.table(index) + placed) * keep_mask.unsqueeze(-1)).relu())


def mixed_example() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 5 + 2 * torch.randn(4, 50, 7, generator=generator)
    index = torch.randint(3, 9, (4, 50), generator=generator)
    mask = torch.randint(0, 2, (4, 50), generator=generator)
    patches = torch.cat([torch.arange(50).remainder(12).expand(4, 50)[..., None], x], -1)
    return {"x": x, "index": index, "keep_mask": mask, "patches": patches}


def test_every_kind_of_tensor_is_made_like_the_example() -> None:
    example = mixed_example()
    batches = made(Mixed().eval(), example, samples=10)
    assert len(batches) == 3
    for batch in batches:
        assert {n: (v.shape, v.dtype) for n, v in batch.items()} == {n: (v.shape, v.dtype) for n, v in example.items()}
        assert torch.equal(batch["keep_mask"], example["keep_mask"])
        assert torch.equal(batch["patches"][..., 0], example["patches"][..., 0])
    x, index = joined(batches, "x"), joined(batches, "index")
    assert x.mean() == pytest.approx(5, abs=0.2)
    assert x.std() == pytest.approx(2, abs=0.2)
    assert (index.min(), index.max()) == (3, 8)
    assert not torch.equal(batches[0]["x"], batches[1]["x"])


def test_positional_and_flat_examples() -> None:
    batches = made(toy(1), torch.zeros(3, 5, 7), samples=7)
    assert [list(batch) for batch in batches] == [["x"]] * 3
    assert joined(batches, "x").std() == pytest.approx(1, abs=0.2)  # a flat example says nothing: N(0, 1)
    half = made(toy(1).to(torch.bfloat16), (torch.zeros(3, 5, 7, dtype=torch.bfloat16),))
    assert {batch["x"].dtype for batch in half} == {torch.bfloat16}


def test_inputs_that_hang_together_stay_as_they_are() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(7, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            if not x.is_meta and lengths.device.type == "cpu" and not torch.compiler.is_exporting():
                torch._assert(int(lengths.sum()) == 6, "lengths add up to 6")
            return self.down(self.up(x).relu())

    example = {"x": torch.randn(3, 7), "lengths": torch.tensor([1, 2, 3])}
    (batch,) = made(Picky().eval(), example)
    assert batch["x"] is example["x"] or torch.equal(batch["x"], example["x"])
    assert torch.equal(batch["lengths"], example["lengths"])


def test_a_module_that_knows_its_vocabulary() -> None:
    class Reader(Mixed):
        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
            return self.down(self.up(self.table(input_ids)).relu())

    tokens = joined(made(Reader().eval(), torch.ones(2, 5, dtype=torch.long)))
    assert tokens.shape == (6, 20)
    assert set(tokens.flatten().tolist()) == set(range(12))


def test_a_config_of_another_kind_says_nothing() -> None:
    model = Mixed().eval()
    model.config = {"vocab_size": 12}  # type: ignore[assignment]
    assert len(made(model, mixed_example(), samples=10)) == 3


def test_a_config_without_a_vocabulary() -> None:
    assert vocabulary(ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=4))) is None


def test_arguments_without_names_are_refused() -> None:
    class Stars(Mixed):
        def forward(self, *xs: Tensor) -> Tensor:  # type: ignore[override]
            return self.down(self.up(xs[0]).relu())

    with pytest.raises(GraphPruneError, match=r"arguments without names \(\(\*xs"):
        made(Stars().eval(), (torch.randn(3, 7),))


# ------------------------------------------------------------------------------------------------------ sampled text


def test_sampled_text_is_what_the_model_says() -> None:
    """A model that always says its last token plus one, whatever it starts with."""
    model = llama(hidden_size=40, num_attention_heads=2, tie_word_embeddings=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(40))
        model.model.norm.weight.fill_(10)
        model.lm_head.weight.copy_(torch.eye(40).roll(1, 0))
    snippets = joined(made(model, data="snippets", length=16)).view(-1, 8)
    assert torch.equal(snippets[:, 1:], (snippets[:, :-1] + 1) % 40)
    assert joined(made(model, data="snippets")).shape == (6, 20)  # the last snippet is cut
    tokens = joined(made(model, data="sampled"))
    assert tokens.shape == (6, 20)
    assert torch.equal(tokens[:, 1:], (tokens[:, :-1] + 1) % 40)  # also through the end of a text
    assert len(set(tokens[:, 0].tolist())) > 1


def test_sampling_follows_the_distribution() -> None:
    """Temperature 1 and nothing cut off, whatever the generation config of the model says."""
    model = llama(tie_word_embeddings=False)
    model.generation_config.update(do_sample=False, top_k=1, temperature=0.01, repetition_penalty=5.0, max_length=4)
    bias = torch.zeros(40).scatter_(0, torch.tensor([10, 11]), torch.tensor([2.0, 1.0]).log() + 20)
    model.lm_head.weight.data.zero_()
    model.lm_head.register_parameter("bias", nn.Parameter(bias))
    counts = joined(made(model, data="sampled", samples=40, length=40))[:, 1:].flatten().bincount(minlength=40)
    assert counts[10] + counts[11] == 40 * 39
    assert counts[10] / counts[11] == pytest.approx(2, abs=0.3)


def test_sampling_leaves_the_model_alone_and_tells_its_progress() -> None:
    model = llama().train()
    unchanged = snapshot(model)
    calls: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    program = analyse(model, data="sampled", samples=34, length=5)
    told: list[str] = []
    program.progress = told.append
    assert joined(calibration_batches(program)).shape == (34, 5)
    unchanged()
    assert calls == []
    assert told[0] == "sampling texts 1 to 32 of 34: 2 of 5 tokens"
    assert told[-1] == "sampling texts 33 to 34 of 34: 5 of 5 tokens"


def test_only_models_that_continue_text_are_sampled() -> None:
    bert = BertForMaskedLM(BertConfig(**SIZES, vocab_size=40)).eval()
    config = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, vocab_size=40)
    for model, example in ((toy(1), torch.zeros(3, 5, 7)), (bert, None), (T5ForConditionalGeneration(config), None)):
        with pytest.raises(GraphPruneError, match="'sampled' is for models that continue text"):
            made(model.eval(), example, data="sampled")


def test_what_generate_raises_is_said() -> None:
    model = llama()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(GraphPruneError, match=r"generate failed \(RuntimeError: .*\). Use data='random'"):
        made(model, data="sampled")


@pytest.mark.parametrize("data", [None, "random", "snippets", "sampled"])
def test_pruning_without_data(data: str | None) -> None:
    pruned = graphprune.compile(llama(), 0.1, method="wanda-sp", data=data, samples=4, length=8, include=["*.mlp"])
    assert graphprune.report(pruned).oracle_error <= 1e-4
