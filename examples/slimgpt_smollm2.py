"""SlimGPT on a pretrained language model, beside the bare call that needs no data.

    python examples/slimgpt_smollm2.py .cache/SmolLM2-135M-Instruct.Q4_1.gguf

Calibrated on the opening of Alice, measured on that of Oz; with as little text as this SlimGPT shows little of what it
can. About two minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import graphprune
from graphprune.evaluate import perplexity
from graphprune.io.models import load_model

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a folder, a hub name or a .gguf file")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    alice, oz = ((HERE / name).read_text("utf-8") for name in ("alice.txt", "oz.txt"))
    model, tokenizer = load_model(options.model)
    print(f"dense: perplexity {perplexity(model, tokenizer, oz, length=options.length):.1f}")
    calibration = {"data": [alice], "tokenizer": tokenizer, "samples": options.samples, "length": options.length}
    for name, settings in (("bare", {}), ("slimgpt", {"method": "slimgpt", **calibration})):
        small = graphprune.compile(model, options.ratio, **settings)
        print(f"{name}: perplexity {perplexity(small, tokenizer, oz, length=options.length):.1f}")
        print(f"  {graphprune.report(small)}")


if __name__ == "__main__":
    main()
