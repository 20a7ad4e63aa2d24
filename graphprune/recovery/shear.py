"""The whole of LoRAShear in a folder: prepare data, prune, recover, evaluate. Each stage is done once.

    RUN/
      run.json          what the run is of
      tokens/           prepared sources
      prune.safetensors state of training while pruning, until that is done
      pruned/           the pruned model (graphprune.load)
      recovery/         checkpoints and logs of every stage
      model/            the recovered model (graphprune.load)
      evaluation.json   dense, pruned and recovered
      report.md         all of it to read; mixing.png beside it

What a stage makes appears under its name when it is whole, so that a run that was interrupted in any way goes on with
the same call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.compiler import compile
from graphprune.data.corpus import Corpus, prepare
from graphprune.data.sources import Source, check_names, sources_of
from graphprune.data.texts import Say, silent
from graphprune.errors import GraphPruneError
from graphprune.evaluate import Evaluation, evaluate
from graphprune.evaluate.tasks import Tasks
from graphprune.io import fingerprint
from graphprune.io.atomic import replace_file
from graphprune.io.checked_json import read_json
from graphprune.io.folder import load, save
from graphprune.passes.analyze_knowledge import analyze_knowledge
from graphprune.passes.base import Pass
from graphprune.passes.methods import passes_of
from graphprune.passes.train_adapters import Training
from graphprune.passes.train_lhspg import Lhspg
from graphprune.passes.train_loraprune import LoraPrune
from graphprune.recovery.recover import Stage, recover_on
from graphprune.recovery.report import write_report
from graphprune.recovery.run_folder import belongs_to, once
from graphprune.recovery.settings import Recovery

PRUNED, MODEL, TOKENS, EVALUATION = "pruned", "model", "tokens", "evaluation.json"


@dataclass(frozen=True)
class Shear:
    """What a run does; :func:`shear`.

    Attributes:
        ratio: parameters to remove / all parameters.
        method: ``"lorashear"`` fades what goes while adapters train (LHSPG); any other of :func:`graphprune.compile`.
        unprunable_ratio: share of the node groups to leave whole, those that the model loses most with (γ).
        samples: rows that are calibrated on and trained on while pruning, drawn evenly from the pretraining sources.
        length: tokens per row, there and in recovery.
        validation: rows held out of every source.
        most: the most tokens to train on per source.
        seed: of every draw.
        compile: more arguments of :func:`graphprune.compile`, such as ``{"round_to": 64}``.
        lhspg: settings of LHSPG. It trains no longer than it takes to fade: recovery trains what is left.
        recovery: settings of recovery.
    """

    ratio: float
    method: str = "lorashear"
    unprunable_ratio: float = 0.0
    samples: int = 128
    length: int = 128
    validation: int = 16
    most: int | None = None
    seed: int = 0
    compile: dict[str, Any] = field(default_factory=dict)
    lhspg: Lhspg = field(default_factory=lambda: Lhspg(final_steps=0))
    recovery: Recovery = field(default_factory=Recovery)


@dataclass(frozen=True)
class Measures:
    """What is measured of the dense, the pruned and the recovered model, besides their sizes.

    Attributes:
        text, lengths, tokens: perplexity of a text, as :func:`graphprune.evaluate.evaluate` takes them: tokens per
        window,
            and how many of the text to use.
        tasks: of lm-eval (:class:`graphprune.evaluate.Tasks`).
    """

    text: str | None = None
    lengths: Sequence[int] = (128, 2048)
    tokens: int | None = None
    tasks: Tasks | None = None


@dataclass
class Shorn:
    """What :func:`shear` returns.

    Attributes:
        model: the recovered model.
        stages: what recovery did (:class:`graphprune.recovery.recover.Stage`).
        evaluations: ``"dense"``, ``"pruned"`` and ``"recovered"`` → :class:`graphprune.evaluate.Evaluation` as plain
        data.
    """

    model: nn.Module
    stages: list[Stage]
    evaluations: dict[str, dict[str, Any]]


def shear(
    model: nn.Module,
    folder: str | Path,
    what: Shear,
    *,
    tokenizer: Any,
    data: Any,
    instruct: Any = None,
    measures: Measures | None = None,
    progress: Say | None = None,
) -> Shorn:
    """Prune ``model``, train it back to what it knew, and measure what came of it: LoRAShear (arXiv 2310.18356).

    Args:
        model: a causal language model; it is not changed.
        folder: where everything goes; the same call goes on where an interrupted one stopped.
        what: all choices.
        tokenizer: of the model.
        data, instruct: pretraining sources, and those of instructions if there are any; see
            :func:`graphprune.recovery.recover.recover`.
        measures: what to measure at the end; sizes always are.
        progress: called with what is being done.

    Under ``accelerate launch`` all processes call it; the first one prunes and measures, all of them recover.

    Raises :class:`GraphPruneError` for a folder of another run, and as its stages do.
    """
    run = _Run(Path(folder), what, progress or silent)
    sources = [*sources_of(data), *([] if instruct is None else sources_of(instruct, instruct=True))]
    check_names(sources)
    run.begin(model)
    corpora = run.tokens(sources, tokenizer)
    run.prune(model, tokenizer, corpora)
    run.say("recovering")
    pruned = load(run.folder / PRUNED, device=next(model.parameters()).device)
    recovered = recover_on(
        pruned, corpora, run.folder / "recovery", dense=model, settings=what.recovery, progress=run.say
    )
    once(run.folder / MODEL, lambda: save(recovered.model, run.folder / MODEL, tokenizer=tokenizer))
    models = {"dense": lambda: model, "pruned": lambda: pruned, "recovered": lambda: recovered.model}
    once(run.folder / "report.md", lambda: run.measure(models, tokenizer, measures or Measures(), recovered.stages))
    found = read_json(run.folder / EVALUATION)
    return Shorn(recovered.model, recovered.stages, {name: one for name, one in found.items() if name in models})


@dataclass
class _Run:
    folder: Path
    what: Shear
    say: Say

    def begin(self, model: nn.Module) -> None:
        """Note what the run is of, or check that it is the same as before."""
        of = fingerprint.fingerprint(fingerprint.of_model(model), repr(_told(self.what)))
        belongs_to(self.folder, of, _told(self.what))

    def tokens(self, sources: list[Source], tokenizer: Any) -> list[Corpus]:
        what = self.what
        return prepare(
            sources,
            tokenizer,
            self.folder / TOKENS,
            length=what.length,
            validation=what.validation,
            most=what.most,
            seed=what.seed,
            progress=self.say,
        )

    def prune(self, model: nn.Module, tokenizer: Any, corpora: list[Corpus]) -> None:
        """Choose what goes, train while it fades if the method does so, and slice it away."""

        def make() -> None:
            self.say(f"pruning {self.what.ratio:.0%} by {self.what.method}")
            rows = even_rows(corpora, self.what.samples, self.what.seed)
            small = compile(
                model,
                self.what.ratio,
                method=self.what.method,
                passes=self._passes(),
                data=rows,
                seed=self.what.seed,
                progress=self.say,
                **self.what.compile,
            )
            save(small, self.folder / PRUNED, tokenizer=tokenizer)
            (self.folder / _STATE).unlink(missing_ok=True)

        once(self.folder / PRUNED, make)

    def _passes(self) -> tuple[Pass, ...]:
        what = self.what

        def kept(training: Training) -> Training:
            return replace(training, checkpoint=self.folder / _STATE, seed=what.seed)

        training = {
            "lorashear": replace(what.lhspg, training=kept(what.lhspg.training)),
            "loraprune": LoraPrune(training=kept(Training())),
        }
        how = passes_of(what.method, training.get(what.method))
        if what.unprunable_ratio:
            how = (analyze_knowledge(what.unprunable_ratio, cache=self.folder / "knowledge"), *how)
        return how

    def measure(
        self, models: dict[str, Callable[[], nn.Module]], tokenizer: Any, measures: Measures, stages: list[Stage]
    ) -> None:
        """Measure each model, keep that as soon as it is known, and write the report."""
        path = self.folder / EVALUATION
        found = read_json(path) if path.exists() else {}
        for name, model in models.items():
            if name not in found:
                self.say(f"measuring the {name} model")
                found[name] = _evaluation(model(), tokenizer, measures).to_dict()
                replace_file(path, json.dumps(found, indent=1, allow_nan=False))
        write_report(self.folder, _told(self.what), stages, found)


_STATE = "prune.safetensors"


def _evaluation(model: nn.Module, tokenizer: Any, measures: Measures) -> Evaluation:
    return evaluate(
        model,
        tokenizer,
        text=measures.text,
        lengths=measures.lengths,
        tokens=measures.tokens,
        tasks=measures.tasks or (),
    )


def _told(what: Shear) -> dict[str, Any]:
    """The settings that decide what comes out."""
    return {**asdict(what), "recovery": what.recovery.deciding()}


def even_rows(corpora: Sequence[Corpus], samples: int, seed: int) -> torch.Tensor:
    """``samples`` training rows of the pretraining sources, as evenly as may be: int64, ``(samples, length)``.

    Raises :class:`GraphPruneError` when there are none, or too few.
    """
    texts = [corpus for corpus in corpora if not corpus.instruct]
    if not texts:
        raise GraphPruneError("Pruning is calibrated on pretraining text: give data=.")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(corpus.train), generator=generator).tolist() for corpus in texts]
    if sum(map(len, orders)) < samples:
        raise GraphPruneError(f"The sources have {sum(map(len, orders))} rows in all, and samples={samples}.")
    found: list[torch.Tensor] = []
    for place in range(max(map(len, orders))):
        for corpus, order in zip(texts, orders, strict=True):
            if place < len(order) and len(found) < samples:
                found.append(corpus.train[order[place]]["input_ids"])
    return torch.stack(found)
