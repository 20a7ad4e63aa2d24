"""A pruned model trains like any other: LoRA, Trainer, gradient checkpointing, heads for classification."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from pruned_models import ALL, CAUSAL, TOKENS, fresh, logits, pruned

import graphprune


def a_step(model: torch.nn.Module, **given: torch.Tensor) -> float:
    """One step of SGD; the loss before it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss = model(**given).loss
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", [*CAUSAL, "bert"])
def test_lora(name: str, tmp_path: Path) -> None:
    """Trained, saved, put on a model that was saved and loaded as well, and merged."""
    wanted = ["c_attn", "c_proj"] if name == "gpt2" else "all-linear"
    adapted = get_peft_model(fresh(name), LoraConfig(r=2, target_modules=wanted, init_lora_weights=False))  # no dropout
    first = a_step(adapted, input_ids=TOKENS, labels=TOKENS)
    assert a_step(adapted, input_ids=TOKENS, labels=TOKENS) < first
    adapted.eval().save_pretrained(tmp_path / "adapter")
    graphprune.save(pruned(name), tmp_path / "model")
    loaded = PeftModel.from_pretrained(graphprune.load(tmp_path / "model"), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, name), logits(adapted, name))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, name), logits(adapted, name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_trainer(name: str, tmp_path: Path) -> None:
    """Two steps, and what it saved is loaded into the same model again."""
    model = fresh(name)
    rows = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(2, 1)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    assert trainer.train().global_step == 2
    assert not torch.equal(logits(model.eval(), name), logits(pruned(name), name))
    from safetensors.torch import load_model

    again = fresh(name)
    load_model(again, tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert torch.equal(logits(again, name), logits(model, name))


def test_a_trained_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = fresh("free").train()
    a_step(model, input_ids=TOKENS, labels=TOKENS)
    graphprune.save(model, tmp_path / "model")
    assert torch.equal(logits(graphprune.load(tmp_path / "model"), "free"), logits(model.eval(), "free"))


@pytest.mark.parametrize("name", [*CAUSAL, "bert"])
def test_gradient_checkpointing(name: str) -> None:
    """The same gradients."""
    plain, saving = fresh(name).train(), fresh(name).train()
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, saving):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.use_cache = False
        torch.manual_seed(0)
        model.zero_grad()
        for dropout in ("attention_dropout", "attn_dropout", "attention_probs_dropout_prob"):
            for module in model.modules():
                if isinstance(getattr(module, dropout, None), float):
                    setattr(module, dropout, 0.0)
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert any(getattr(module, "gradient_checkpointing", False) for module in saving.modules())
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(other.grad, one.grad)


def test_a_classifier_trains_and_comes_back(tmp_path: Path) -> None:
    model = fresh("classifier").train()
    labels = torch.tensor([0, 2])
    first = a_step(model, input_ids=TOKENS, labels=labels)
    assert a_step(model, input_ids=TOKENS, labels=labels) < first
    graphprune.save(model, tmp_path / "model")
    loaded = graphprune.load(tmp_path / "model")
    assert logits(loaded, "classifier").shape == (2, 3)
    assert torch.equal(logits(loaded, "classifier"), logits(model.eval(), "classifier"))


def test_a_stock_language_model_becomes_a_classifier(tmp_path: Path) -> None:
    """With a new head, as from_pretrained does it for any checkpoint."""
    graphprune.save(pruned("stock"), tmp_path / "model")
    made = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=3)
    assert type(made).__name__ == "LlamaForSequenceClassification"
    old = dict(pruned("stock").model.named_parameters())
    assert all(torch.equal(one, old[name]) for name, one in made.model.named_parameters())
    first = a_step(made.train(), input_ids=TOKENS, labels=torch.tensor([0, 2]))
    assert a_step(made, input_ids=TOKENS, labels=torch.tensor([0, 2])) < first


@pytest.mark.parametrize("name", ALL)
def test_its_own_save_pretrained_says_when_it_cannot_be_loaded(name: str, tmp_path: Path) -> None:
    """What only graphprune can load is never loaded wrongly by transformers."""
    pruned(name).save_pretrained(tmp_path / "model")
    if name == "stock":
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert torch.equal(logits(loaded, name), logits(pruned(name), name))
    else:
        with pytest.raises((RuntimeError, ValueError), match=r"mismatch|size|multiple"):
            type(pruned(name)).from_pretrained(tmp_path / "model")
