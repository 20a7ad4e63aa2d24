from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from helpers import snapshot

import graphprune
from graphprune import GraphPruneError
from graphprune.cli import main
from graphprune.evaluate import Tasks, average


def log_likelihoods(model, tokenizer, row: dict) -> list[float]:
    """Of every answer after the question, one token at a time, by itself."""
    found = []
    for choice in row["choices"]:
        context, answer = (tokenizer(part)["input_ids"] for part in (row["question"], choice))
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([context + answer])).logits[0].double().log_softmax(-1)
        found.append(sum(float(scores[len(context) + i - 1, token]) for i, token in enumerate(answer)))
    return found


def test_accuracies_against_a_loop_in_float64(model, tokenizer, rows, task_folder):
    right, right_by_length = [], []
    for row in rows:
        scores = log_likelihoods(model, tokenizer, row)
        lengths = [len(choice) for choice in row["choices"]]
        right.append(np.argmax(scores) == row["answer"])
        right_by_length.append(np.argmax(np.divide(scores, lengths)) == row["answer"])
    found = Tasks(["tiny_norm"], include_path=task_folder).scores(model, tokenizer)["tiny_norm"]
    assert found["acc"] == np.mean(right)
    assert found["acc_norm"] == np.mean(right_by_length)
    assert found["acc_stderr"] == pytest.approx(np.std(right, ddof=1) / len(rows) ** 0.5)
    assert found.keys() == {"acc", "acc_norm", "acc_stderr", "acc_norm_stderr"}


def test_a_pruned_model_on_a_group(model, tokenizer, task_folder):
    pruned = graphprune.compile(model, 0.2, allocation="global")
    tasks = Tasks("tiny_both", include_path=str(task_folder), limit=4)
    assert tasks.names == ["tiny_both"]
    dense, small = tasks.scores(model, tokenizer), tasks.scores(pruned, tokenizer)
    assert list(dense) == list(small) == ["tiny", "tiny_norm"]
    assert all(metrics["acc"] in (0, 0.25, 0.5, 0.75, 1) for metrics in (*dense.values(), *small.values()))


def test_batches_are_bounded_by_tokens(model, tokenizer, task_folder, monkeypatch):
    shapes = []
    model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    tasks = Tasks(["tiny_norm"], include_path=task_folder)
    plain = tasks.scores(model, tokenizer)
    assert len(shapes) == 1
    shapes.clear()
    monkeypatch.setattr("graphprune.evaluate.harness.TOKENS_PER_FORWARD", 70)
    assert tasks.scores(model, tokenizer) == plain
    assert all(shape.numel() <= 70 for shape in shapes)
    assert shapes[0][0] == 2  # long ones
    assert max(shape[0] for shape in shapes) > 5  # short ones


def test_nothing_of_the_callers_changes(model, tokenizer, task_folder):
    model.train()
    check = snapshot(model)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    Tasks(["tiny"], include_path=task_folder).scores(model, tokenizer)
    check()
    assert tokenizer.pad_token is None
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_a_broken_model_has_scores(model, tokenizer, task_folder):
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    found = Tasks(["tiny"], include_path=task_folder).scores(model, tokenizer)
    assert 0 <= found["tiny"]["acc"] <= 1


def test_average_is_of_acc_norm_or_acc():
    scores = {"a": {"acc": 0.2, "acc_norm": 0.4}, "b": {"acc": 0.6}, "c": {"word_perplexity": 9.0}}
    assert average(scores) == pytest.approx(0.5)
    assert average({"a": scores["a"], "c": scores["c"]}) is None


def test_errors(model, tokenizer, task_folder, tmp_path):
    tasks = Tasks(["tiny"], include_path=task_folder)
    with pytest.raises(GraphPruneError, match="without a tokenizer"):
        tasks.scores(model, None)
    with pytest.raises(GraphPruneError, match="need a model of transformers, not a Linear"):
        tasks.scores(torch.nn.Linear(3, 3), tokenizer)
    with pytest.raises(GraphPruneError, match="No tasks"):
        Tasks([])
    with pytest.raises(GraphPruneError, match=r"no folder .*nowhere"):
        Tasks(["tiny"], include_path=tmp_path / "nowhere")
    (task_folder / "rows.jsonl").unlink()
    with pytest.raises(GraphPruneError, match=r"tiny: the tasks cannot be loaded: .*rows\.jsonl"):
        Tasks(["tiny"], include_path=task_folder)


def test_the_lm_eval_command_runs_a_folder_with_other_widths_per_layer(
    model, tokenizer, task_folder, tmp_path, capsys, monkeypatch
):
    """And an unknown task, which both ways look for among lm-eval's own."""
    pruned = graphprune.compile(model, 0.2, skip_first=1)
    assert len({layer.mlp.up_proj.out_features for layer in pruned.model.layers}) == 2
    graphprune.save(pruned, tmp_path / "pruned", tokenizer=tokenizer)
    expected = Tasks(["tiny"], include_path=task_folder).scores(pruned, tokenizer)["tiny"]["acc"]

    # Its own 14,000 tasks take many seconds to index.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "none" / "manager.py"))
    arguments = ["--model", "graphprune", "--model_args", f"pretrained={tmp_path / 'pruned'}", "--tasks", "tiny"]
    assert main(["lm_eval", "run", *arguments, "--include_path", str(task_folder)]) == 0
    printed = capsys.readouterr().out
    assert f"|{expected:.4g}|" in printed.replace(" ", "")
    assert "graphprune ({'pretrained': " in printed

    with pytest.raises(GraphPruneError, match=r"knows no task 'tinny'; there is tiny.*include_path"):
        Tasks(["tinny"], include_path=task_folder)
    missing = [*arguments[:3], f"pretrained={tmp_path / 'missing'}", "--tasks", "tiny"]
    assert main(["lm_eval", *missing, "--include_path", str(task_folder)]) == 1
    wrong = [*arguments, "--include_path", str(task_folder)]
    wrong[3] += ",parallelize=True"
    assert main(["lm_eval", *wrong]) == 1
    assert "takes no parallelize" in capsys.readouterr().err
