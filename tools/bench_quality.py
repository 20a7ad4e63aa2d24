"""Perplexity and tasks of every method and of other packages, at the same parameters and without tuning.

    python tools/bench_quality.py MODEL --data DIR -o out/quality.md [--tasks] [--ratios 0.1 0.2 0.3 0.5] [--methods …]

MODEL is a gated decoder such as the demo's: a folder or a .gguf file. DIR holds ``calib/c4.jsonl`` (to calibrate on),
``wikitext2/wikitext2_raw_test_rows.jsonl`` (whose rows, joined by empty lines, are the text) and, for tasks,
``lm_eval_tasks/``. Written are OUT.md (tables), OUT.png (perplexity over ratio) and OUT.json (every cell).

**A cell** is one method in one setting at one ratio: a process of its own loads the model in float32, prunes it
(on CUDA where there is one, which runs tasks in TF32) and measures it. Each is kept in OUT.json as soon as it is
finished; the same command again goes on where the last one stopped. A cell that failed is reported with the last line
it wrote, and is kept too: ``--retry`` does those again. Tasks are run only for the best setting of each method and
ratio.

**What is compared.** Everyone removes the same number of parameters, to within one FFN channel per layer, or the cell
has failed; everyone that takes data gets the same tokens (``--samples`` rows of ``--length``, drawn from C4). Every
method and package has a short list of settings (``SETTINGS``), all of which are tried at every ratio: the tables show
the one with the lowest perplexity at the first of ``--lengths``, for all alike. What sparing the outer blocks makes
impossible (half of all parameters from the FFNs) is among the failed cells. ``--first`` tries only the first setting of
each that can be reached at a ratio: of ours the method's own allocation, of other packages the sparing one.

**Other packages** prune FFN channels, with and without sparing the first three and last two blocks, in place:

- torch-pruning 1.6.1, ``GroupMagnitudeImportance(p=2)`` and ``GroupTaylorImportance()`` with their defaults (mean over
  the group, normalised by the mean), ``BasePruner`` with local and with global ranking. Roots are the gate and up
  projections, all other layers are ignored, as pruning grouped-query attention with it does not come to an end here.
  Taylor's gradients are those of the mean next-token loss of all rows.
- optipfair 0.4.2, ``prune_model(pruning_type="MLP_GLU")``: without data by its default, peak-to-peak magnitude (at 20%
  its L2, PON and VOW are 9 to 15 times worse on SmolLM2), with data by its hybrid of that and activation norms, 16 rows
  a batch; ``layer_indices`` spares blocks.

"bare" is ``graphprune.compile(model, ratio)``: what comes of no choice at all.

**With** ``--recover TOKENS`` every method is also trained back, on so many tokens, as its paper does it
(:mod:`quality_recovery`): ``calib/`` holds the sources of text, ``instruct/`` the instructions. Each of ``--seeds`` is
a cell, and tables show their mean, least and most; a cell is measured by everything at once.

``--parallel`` runs so many cells side by side, for a GPU that one small model does not fill.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DENSE, BARE = "dense", "bare"
SEED = 0
CALIBRATION = "calib/c4.jsonl"
TEXT = "wikitext2/wikitext2_raw_test_rows.jsonl"
TASKS = "lm_eval_tasks"
ALL_TASKS = ["local_commonsense"]
TRAINING = ("batch", "rank", "lr", "distill", "bf16", "texts")  # options of --recover, as given

Setting = dict[str, Any]
Result = dict[str, Any]

_SPARED: Setting = {"skip_first": 3, "skip_last": 2}
# As the method spreads it by itself, which spares the outer blocks and the few heads; FFN channels of all blocks alike.
OURS: tuple[Setting, ...] = ({}, {"include": ["*.mlp"], "allocation": "uniform"})
_WITH_AND_WITHOUT_SPARING: tuple[Setting, ...] = (_SPARED, {})

# What is tried for each method and package; a method that is not here gets OURS.
SETTINGS: dict[str, tuple[Setting, ...]] = {
    DENSE: ({},),
    BARE: ({},),
    "torch-pruning L2": _WITH_AND_WITHOUT_SPARING,
    "torch-pruning Taylor": (*_WITH_AND_WITHOUT_SPARING, {"global_pruning": True}),
    "optipfair": _WITH_AND_WITHOUT_SPARING,
    "optipfair with data": _WITH_AND_WITHOUT_SPARING,
}


@dataclass(frozen=True)
class Cell:
    """Everything that a result depends on, as plain data: a finished cell is known by being equal.

    ``measures``: ``{"lengths": [...], "tokens": n or None}`` or ``{"tasks": [...], "limit": n or None}``, or both.
    """

    method: str
    setting: Setting
    ratio: float
    measures: dict[str, Any]
    model: str
    data: str
    calibration: dict[str, int]


# ------------------------------------------------------------------------------------------- in a cell's own process


def measure(cell: Cell, work: Path) -> Result:
    """Load, prune and measure in this process; ``work`` is a folder for what cells share.

    Raises :class:`ValueError` when what was removed is more than one channel per layer off the ratio.
    """
    import torch

    from graphprune.io.models import load_model

    torch.manual_seed(SEED)
    model, tokenizer = load_model(cell.model, dtype=torch.float32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    before = sum(parameter.numel() for parameter in model.parameters())
    tolerance = 3 * model.config.hidden_size * model.config.num_hidden_layers / before
    start = time.perf_counter()
    seconds = 0.0
    if cell.method != DENSE:
        model, seconds = _pruned(cell, model, tokenizer, device, work)
    after = sum(parameter.numel() for parameter in model.parameters())
    removed = 1 - after / before
    if abs(removed - cell.ratio) > tolerance:
        raise ValueError(f"removed {removed:.3%} of all parameters, which is not {cell.ratio:.3%}")
    found = _measured(cell, model, tokenizer)
    return {
        **found,
        "parameters": after,
        "removed": removed,
        "prune_seconds": seconds,
        "seconds": time.perf_counter() - start,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
    }


def _pruned(cell: Cell, model: Any, tokenizer: Any, device: Any, work: Path) -> tuple[Any, float]:
    """The pruned model, and the seconds from the calibration tokens to it."""
    from quality_peers import PEERS

    import graphprune

    rows = calibration_rows(cell.data, tokenizer, **cell.calibration).to(device)
    start = time.perf_counter()
    if "recover" in cell.setting:
        from quality_recovery import TrainBack, recovered

        how = TrainBack(**cell.setting)
        pruned = recovered(model, tokenizer, cell.method, cell.ratio, rows, Path(cell.data), work, how)
    elif cell.method in PEERS:
        pruned = PEERS[cell.method](model, cell.ratio, rows, cell.setting)
    elif cell.method == BARE:
        pruned = graphprune.compile(model, cell.ratio)
    else:
        batches = [{"input_ids": batch} for batch in rows.split(4)]
        pruned = graphprune.compile(model, cell.ratio, method=cell.method, data=batches, **cell.setting)
    return pruned, time.perf_counter() - start


def calibration_rows(data: str | Path, tokenizer: Any, samples: int, length: int) -> Any:
    """Tokens that everyone calibrates on: an int64 tensor of shape ``(samples, length)``."""
    from graphprune.data.calibration import read_texts, token_rows

    return token_rows(read_texts([str(Path(data, CALIBRATION))]), tokenizer, samples, length, SEED)


def evaluation_text(data: str | Path) -> str:
    """The text that perplexity is measured on."""
    lines = Path(data, TEXT).read_text(encoding="utf-8").splitlines()
    return "\n\n".join(json.loads(line)["text"] for line in lines)


def _measured(cell: Cell, model: Any, tokenizer: Any) -> Result:
    import torch

    from graphprune.evaluate import Tasks, average, perplexity

    found: Result = {}
    if "lengths" in cell.measures:
        text, tokens = evaluation_text(cell.data), cell.measures["tokens"]
        values = {n: perplexity(model, tokenizer, text, length=n, tokens=tokens) for n in cell.measures["lengths"]}
        # JSON has no infinity; float() reads it back.
        found["perplexity"] = {str(n): value if value < float("inf") else "inf" for n, value in values.items()}
    if "tasks" in cell.measures:
        torch.set_float32_matmul_precision("high")  # TF32, where a GPU has it
        tasks = Tasks(cell.measures["tasks"], include_path=Path(cell.data, TASKS), limit=cell.measures["limit"])
        scores = tasks.scores(model, tokenizer)
        found |= {"tasks": scores, "average": average(scores)}
    return found


# ------------------------------------------------------------------------------------------------------ all the cells


def run_cell(cell: Cell, work: Path, timeout: float) -> Result:
    """Measure in a process of its own; whatever becomes of it, it is a result: ``{"failed": why}`` if it has none."""
    command = [sys.executable, __file__, "--cell", json.dumps(asdict(cell)), str(work)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"not finished after {timeout:g} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0:
        return {"failed": f"killed by {signal.Signals(-done.returncode).name}"}
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"failed": lines[-1] if lines else f"exit status {done.returncode}"}


class Kept:
    """Finished cells with their results, in a JSON file that is complete at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: list[dict[str, Any]] = []
        if path.exists():
            try:
                self._entries = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise SystemExit(f"{path} is not a file of this tool, and is left as it is: {error}") from None

    def result(self, cell: Cell) -> Result | None:
        plain = asdict(cell)
        return next((entry["result"] for entry in self._entries if entry["cell"] == plain), None)

    def add(self, cell: Cell, result: Result) -> None:
        plain = asdict(cell)
        self._entries = [entry for entry in self._entries if entry["cell"] != plain]
        self._entries.append({"cell": plain, "result": result})
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text(json.dumps(self._entries, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


@dataclass
class Scoreboard:
    """Which cells there are for what was asked, and what is known of them."""

    arguments: argparse.Namespace
    kept: Kept

    def settings(self, method: str) -> tuple[Setting, ...]:
        a = self.arguments
        if a.recover and method != DENSE:
            given = {name: getattr(a, name) for name in TRAINING if getattr(a, name) not in (None, False)}
            return tuple({"recover": a.recover, "seed": seed, **given} for seed in a.seeds)
        return SETTINGS.get(method, OURS)

    def ratios(self, method: str) -> list[float]:
        return [0.0] if method == DENSE else self.arguments.ratios

    def cell(self, method: str, setting: Setting, ratio: float, tasks: bool = False) -> Cell:
        a = self.arguments
        texts, questions = {"lengths": a.lengths, "tokens": a.tokens or None}, {"tasks": a.tasks, "limit": a.limit}
        measures = {**texts, **questions} if a.recover and a.tasks else questions if tasks else texts
        calibration = {"samples": a.samples, "length": a.length}
        return Cell(method, setting, ratio, measures, a.model, str(a.data), calibration)

    def perplexity_cells(self) -> list[Cell]:
        """All settings; the ratios one after the other, so that what is there first is a whole column."""
        everything = [DENSE, *self.arguments.methods]
        ratios = sorted({ratio for method in everything for ratio in self.ratios(method)})
        return [
            self.cell(method, setting, ratio)
            for ratio in ratios
            for method in everything
            if ratio in self.ratios(method)
            for setting in self.settings(method)
        ]

    def best(self, method: str, ratio: float) -> tuple[Setting, Result] | None:
        """The setting with the lowest perplexity at the first length, of those measured; None if there is none."""
        first = str(self.arguments.lengths[0])
        found = [(s, self.kept.result(self.cell(method, s, ratio))) for s in self.settings(method)]
        known = [(setting, result) for setting, result in found if result and "failed" not in result]
        return min(known, key=lambda pair: float(pair[1]["perplexity"][first]), default=None)

    def shown(self, method: str, ratio: float, tasks: bool = False) -> list[Result]:
        """What the tables show of a method: its best setting, or every seed of a recovery; and what failed of it."""
        if self.arguments.recover:
            settings = self.settings(method)
        else:
            best = self.best(method, ratio)
            settings = (best[0],) if best else ()
        results = [self.kept.result(self.cell(method, setting, ratio, tasks)) for setting in settings]
        return [result for result in results if result]

    def task_cells(self) -> list[Cell]:
        """The best settings, as far as perplexities are known. What is trained back is measured by all at once."""
        if self.arguments.recover or not self.arguments.tasks:
            return []
        pairs = [(method, ratio) for method in [DENSE, *self.arguments.methods] for ratio in self.ratios(method)]
        found = [(method, ratio, self.best(method, ratio)) for method, ratio in pairs]
        return [self.cell(method, best[0], ratio, tasks=True) for method, ratio, best in found if best]

    def run(self, cells: Sequence[Cell]) -> None:
        """Measure what is not there yet, ``--parallel`` cells side by side."""
        running: dict[Future[Result], Cell] = {}
        with ThreadPoolExecutor(self.arguments.parallel) as pool:
            for number, cell in enumerate(cells, 1):
                if len(running) == self.arguments.parallel:
                    self._keep(running)
                if not self._wanted(cell):
                    continue
                kind = "tasks" if "lengths" not in cell.measures else "perplexity"
                what = f"{cell.method} {cell.ratio:.0%} {json.dumps(cell.setting)}"
                print(f"{number:4} of {len(cells)}  {kind}  {what}", file=sys.stderr, flush=True)
                work = self.arguments.output.with_suffix(".work")
                running[pool.submit(run_cell, cell, work, self.arguments.timeout)] = cell
            while running:
                self._keep(running)

    def _wanted(self, cell: Cell) -> bool:
        known = self.kept.result(cell)
        if known is not None and not (self.arguments.retry and "failed" in known):
            return False
        other = self.arguments.first and not self.arguments.recover and "lengths" in cell.measures
        return not (other and self.best(cell.method, cell.ratio))

    def _keep(self, running: dict[Future[Result], Cell]) -> None:
        """Wait until a cell is finished, and keep its result."""
        for done in wait(running, return_when=FIRST_COMPLETED).done:
            cell, result = running.pop(done), done.result()
            self.kept.add(cell, result)
            said = result.get("failed") or result.get("perplexity") or result.get("average")
            about = f"{cell.method} {cell.ratio:.0%}: " if self.arguments.parallel > 1 else ""
            print(f"{about}{'FAILED ' if 'failed' in result else ''}{said}".rjust(12), file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 0 when every cell has a result, also where that is that it failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--cell"]:
        print(json.dumps(measure(Cell(**json.loads(argv[1])), Path(argv[2]))))
        return 0
    arguments = _arguments(argv)
    from quality_report import write_report

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    board = Scoreboard(arguments, Kept(arguments.output.with_suffix(".json")))
    command = "python tools/bench_quality.py " + shlex.join(argv)
    try:
        board.run(board.perplexity_cells())
        board.run(board.task_cells())
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    finally:
        write_report(board, command, arguments.output)
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    """What was asked, checked before anything is measured: exits with a message otherwise."""
    from quality_peers import PEERS
    from quality_recovery import INSTRUCTIONS, RECOVERED

    from graphprune.passes.methods import METHODS, method_names, trains

    everything = [*(name for name in sorted(METHODS) if not trains(name)), BARE, *PEERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder or a .gguf file")
    add("--data", type=Path, required=True, metavar="DIR", help="where the text, calibration text and tasks are")
    add("-o", "--output", type=Path, default=Path("out/quality.md"), metavar="OUT.md")
    add("--ratios", type=_ratio, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    add("--methods", nargs="+", metavar="METHOD", help=f"by default {', '.join(everything)}; with --recover others")
    add("--recover", type=int, metavar="TOKENS", help="train back on so many tokens, as the paper of each method does")
    add("--seeds", type=int, nargs="+", default=[0], help="of recovery, each for itself (default 0)")
    add("--batch", type=int, metavar="ROWS", help="of recovery, rows per step")
    add("--rank", type=int, help="of recovery, of LoRA")
    add("--lr", type=float, help="of recovery, the learning rate")
    add("--distill", type=float, metavar="W", help="of recovery, weight of the dense model's predictions in the loss")
    add("--bf16", action="store_true", help="of recovery, train in bfloat16 by autocast")
    add("--texts", type=float, metavar="SHARE", help="of recovery, tokens of text rather than of instructions")
    add("--tokens", type=int, default=20_000, help="of the text; 0 for all of it (default %(default)s)")
    add("--lengths", type=int, nargs="+", default=[128, 2048], help="tokens per window; the first decides what is best")
    add("--tasks", nargs="*", metavar="TASK", help=f"also run these, by default {', '.join(ALL_TASKS)}")
    add("--limit", type=int, help="rows of every task; by default all")
    add("--samples", type=int, default=64, help="rows to calibrate on (default %(default)s)")
    add("--length", type=int, default=256, help="tokens per row (default %(default)s)")
    add("--timeout", type=float, default=7200, metavar="S", help="seconds for one cell (default %(default)s)")
    add("--parallel", type=int, default=1, metavar="N", help="cells side by side (default %(default)s)")
    add("--first", action="store_true", help="only the first setting of each method that can be reached")
    add("--retry", action="store_true", help="do cells that failed again")
    arguments = parser.parse_args(argv)
    arguments.methods = arguments.methods or (RECOVERED if arguments.recover else everything)
    if arguments.recover and {BARE, *PEERS} & set(arguments.methods):
        parser.error("--recover is for methods of graphprune")
    if arguments.tasks == []:
        arguments.tasks = ALL_TASKS
    for method in arguments.methods:
        if method not in {BARE, *PEERS, *method_names()}:
            parser.error(f"there is no method {method!r}; there is {', '.join([BARE, *PEERS, *method_names()])}")
    if not Path(arguments.model).exists():
        parser.error(f"there is no {arguments.model}")
    more = [*([TASKS] if arguments.tasks else []), *([INSTRUCTIONS] if arguments.recover else [])]
    for name in (CALIBRATION, TEXT, *more):
        if not (arguments.data / name).exists():
            parser.error(f"{arguments.data} has no {name}")
    if arguments.output.suffix != ".md":
        parser.error(f"{arguments.output} does not end in .md")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install 'graphprune[bench]'")
    return arguments


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"a ratio is between 0 and 1, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
