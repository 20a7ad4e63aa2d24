"""All of LoRAShear in one folder: fade what goes while LoRA trains, recover on a mixture of sources, measure.

    python examples/lorashear.py .cache/SmolLM2-135M-Instruct.Q4_1.gguf out/shear

On two short texts and with so few steps that it only shows the way: the settings are those of a real run with smaller
numbers. Called again with the same folder it goes on where it stopped. About three minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import graphprune
from graphprune import Recovery, Shear
from graphprune.io.models import load_model
from graphprune.passes.train_adapters import Training
from graphprune.passes.train_lhspg import Lhspg
from graphprune.recovery.shear import Measures

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a folder, a hub name or a .gguf file")
    parser.add_argument("run", help="folder for all that the run makes")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    what = Shear(
        0.2,
        samples=16,
        length=32,
        validation=4,
        lhspg=Lhspg(warmup_steps=2, periods=2, period_steps=3, final_steps=0, training=Training(lr=1e-3)),
        recovery=Recovery(lr=1e-3, batch=4, rows_at_once=4, round_steps=4, rounds=2),
    )
    texts = {name: (HERE / f"{name}.txt").read_text("utf-8") for name in ("alice", "oz")}
    sources = {name: text.split("\n\n") for name, text in texts.items()}  # a paragraph is a document
    measures = Measures(text=texts["oz"], lengths=(128,))
    done = graphprune.shear(
        model, options.run, what, tokenizer=tokenizer, data=sources, measures=measures, progress=print
    )
    for stage in done.stages:
        print(f"{stage.name}: mean validation loss {' → '.join(f'{mean:.3f}' for mean in stage.means)} nats per token")
    for name, found in done.evaluations.items():
        print(f"{name}: {found['parameters']:,} parameters, perplexity {found['perplexity']}")
    print(f"the model is in {options.run}/model, the report in {options.run}/report.md")


if __name__ == "__main__":
    main()
