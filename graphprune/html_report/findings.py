"""Everything that a folder says about how its model was made and what it can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from graphprune.errors import GraphPruneError
from graphprune.evaluate.evaluation import Evaluation, finite, read_evaluations
from graphprune.io.checked_json import read_text
from graphprune.io.manifest import MANIFEST, read_manifest
from graphprune.io.report_json import report_to_data
from graphprune.ir.knowledge import Knowledge
from graphprune.recovery.recover import DONE, STAGES, Stage, read_stage
from graphprune.recovery.shear import EVALUATION, MODEL, PRUNED
from graphprune.reporting import Report, widths_over_all

KNOWLEDGE = "knowledge.json"


@dataclass
class Findings:
    """What there is; what was not recorded is empty or None.

    Attributes:
        title: what the folder is called. class_name: of the model. versions: package → version that wrote it.
        reports: of every pruning, oldest first. stages: of recovery.
        evaluations: model → what was measured. knowledge: what the model loses with each node group.
    """

    title: str
    class_name: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    knowledge: Knowledge | None = None

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Pruned axis → (size at first, size at last)."""
        return widths_over_all(self.reports[-1]) if self.reports else {}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. A report is what graphprune.json has of it, without the kept indices, with widths."""
        return {
            "title": self.title,
            "class_name": self.class_name,
            "versions": self.versions,
            "reports": [_without_indices(report) for report in self.reports],
            "widths": {name: list(pair) for name, pair in self.widths.items()},
            "stages": finite([asdict(stage) for stage in self.stages]),
            "evaluations": {name: one.to_dict() for name, one in self.evaluations.items()},
            "knowledge": None if self.knowledge is None else self.knowledge.to_dict(),
        }


def _without_indices(report: Report) -> dict[str, Any]:
    data = report_to_data(report)
    plan = data.pop("plan")
    return {**data, "ratio": report.ratio, "method": plan["method"], "widths": report.widths}


def collect(
    folder: str | Path, evaluations: Sequence[str | Path] = (), knowledge: str | Path | None = None
) -> Findings:
    """Read a folder: one that ``graphprune.save`` wrote, or one of a run of ``shear`` or ``recover``.

    Args:
        folder: see above. What ``graphprune eval -o`` and ``graphprune knowledge -o`` wrote there as evaluation.json
            and knowledge.json is read as well, and so is the run beside a model that ``graphprune recover`` wrote.
        evaluations, knowledge: such files that are elsewhere.

    Raises:
        GraphPruneError: when the folder holds nothing of graphprune, or a file is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise GraphPruneError(f"There is no folder {folder}.")
    found = Findings(folder.resolve().name)
    model = next((one for one in (folder, folder / MODEL, folder / PRUNED) if (one / MANIFEST).is_file()), None)
    if model is not None:
        manifest = read_manifest(model)
        last = manifest.report(None)
        found.class_name, found.versions, found.reports = manifest.class_name, manifest.versions, [*last.history, last]
    found.stages = _stages(folder)
    for path in (*([folder / EVALUATION] if (folder / EVALUATION).is_file() else []), *map(Path, evaluations)):
        found.evaluations |= read_evaluations(path)
    said = folder / KNOWLEDGE if knowledge is None else Path(knowledge)
    if knowledge is not None or said.is_file():
        found.knowledge = Knowledge.from_json(read_text(said))
    if not (found.reports or found.stages or found.evaluations or found.knowledge):
        raise GraphPruneError(
            f"{folder} holds nothing to report: it was written neither by graphprune.save, nor by shear or recover."
        )
    return found


def _stages(folder: Path) -> list[Stage]:
    """The stages of recovery that are done, of a run as it is or of the one that made the model in this folder."""
    for run in (folder / "recovery", folder, folder.with_name(f"{folder.resolve().name}.run")):
        done = [run / name / DONE for name in STAGES if (run / name / DONE).is_file()]
        if done:
            return [read_stage(path) for path in done]
    return []
