"""The benchmark of SlimGPT runs, and names the parts of both its floors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=101,
)


@pytest.mark.slow
def test_the_whole_comparison_at_small_sizes(
    load_tool: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path)
    code = load_tool("bench_slimgpt").main([str(tmp_path), "--samples", "8", "--length", "8", "--repeats", "1"])
    assert code in (0, 1)  # that is a matter of the machine
    shown = capsys.readouterr().out
    for row in ("slimgpt", "forward without the head", "Hessian products", "factorisations", "peak", "activations"):
        assert row in shown


def test_what_the_parts_of_the_floor_count(load_tool: Callable[[str], ModuleType]) -> None:
    bench = load_tool("bench_slimgpt")
    model = LlamaForCausalLM(CONFIG).eval()
    batches = [{"input_ids": torch.randint(0, 101, (4, 8))}] * 2
    program = bench.planned(model, batches, 0.2)
    bench.run_passes(program, bench.METHODS["slimgpt"])
    assert bench.pruned_columns(program) == [48] * 4  # the heads are few and spared
    block = model.model.layers[0]
    found = bench.columns_of(program, program.need("prunable"))
    assert sorted(name.rpartition("layers.0.")[2] for name in found if "layers.0." in name) == [
        "mlp.down_proj.weight",
        "self_attn.o_proj.weight",
    ]
    # 64 tokens: what 14 modules return, as wide as they return it; the attention returns no weights.
    widths = 32 * (1 + 1 + 1 + 1 + 4 + 1 + 1) + 48 * 3
    assert bench.activations(model, block, batches) == 4 * 64 * widths
