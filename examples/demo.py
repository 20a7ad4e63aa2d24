"""Prune a pretrained language model by 20%, prove it, save it, load it, and let it write.

    python examples/demo.py MODEL OUT

MODEL is a .gguf file, a folder or a hub name. Calibrated on one short public-domain text, measured on another.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging

import graphprune
from graphprune.cli import print_tables, summary
from graphprune.evaluate.macs import count_macs, positions
from graphprune.evaluate.perplexity import perplexity
from graphprune.io.models import load_model
from graphprune.trace.inputs import example_inputs_for

HERE = Path(__file__).parent
PROMPT = "The best way to learn a new language is to"


def sentence(model: torch.nn.Module, tokenizer: object) -> str:
    """A greedy continuation of the prompt."""
    ids = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=30, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0], skip_special_tokens=True).replace("\n", " ")


def main(name: str, out: str) -> None:
    logging.set_verbosity_error()
    say = Console(highlight=False).print
    calibration, other = (HERE / "alice.txt").read_text("utf-8"), (HERE / "oz.txt").read_text("utf-8")
    say(f"loading {name}")
    model, tokenizer = load_model(name)
    inputs = example_inputs_for(model, torch.device("cpu"), torch.float32)
    tokens = positions(inputs)

    say("pruning 20% of all parameters: Wanda-sp on alice.txt, the FFNs of all blocks but the first 3 and last 2")
    pruned = graphprune.compile(
        model,
        0.2,
        method="wanda-sp",
        data=[calibration],
        tokenizer=tokenizer,
        include=["*.mlp"],
        skip_first=3,
        skip_last=2,
    )
    report = graphprune.report(pruned)
    print_tables(report, summary(report, (count_macs(model, inputs) // tokens, count_macs(pruned, inputs) // tokens)))

    say(f"perplexity on oz.txt: {perplexity(model, tokenizer, other):.1f} before, ", end="")
    say(f"{perplexity(pruned, tokenizer, other):.1f} after")
    say(f"before: {sentence(model, tokenizer)}")
    say(f"after:  {sentence(pruned, tokenizer)}")

    graphprune.save(pruned, out, tokenizer=tokenizer)
    again = graphprune.load(out)
    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        same = torch.equal(again(**ids).logits, pruned.eval()(**ids).logits)
    say(f"written to {out}; loaded again, its logits are {'bitwise the same' if same else 'NOT THE SAME'}")
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
