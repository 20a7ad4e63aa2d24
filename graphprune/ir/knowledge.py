"""The knowledge distribution of a model: how much it loses when one node group alone is masked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from graphprune.errors import GraphPruneError
from graphprune.io.checked_json import of_kind, take

FORMAT = 1
MEASURES = {
    "perplexity": "perplexity",
    "loss": "loss",
    "outputs": "relative distance of the outputs",
}
_NUMBER = (int, float)
_WHERE = "The knowledge distribution"


@dataclass(frozen=True)
class GroupKnowledge:
    """One node group.

    Attributes:
        name: the group's.
        modules: paths of the modules that its parameters are in.
        size: its number of structures.
        removed: how many of them were masked, one number per ratio.
        losses: the mean loss over the evaluation rows with so many masked, one per ratio; inf where it is not finite.
    """

    name: str
    modules: list[str]
    size: int
    removed: list[int]
    losses: list[float]


@dataclass(frozen=True)
class Knowledge:
    """The result of LoRAShear's knowledge distribution analysis (arXiv 2310.18356, Alg. 3), as plain data.

    Attributes:
        ratios: the shares of its structures that each group lost, alone.
        measure: what ``loss`` is: ``"perplexity"`` (the mean negative log-likelihood of tokens, whose exponential is
            the perplexity), ``"loss"`` (the model's own, for batches with labels), or ``"outputs"`` for a model
            without a loss: the squared distance of its outputs from the dense model's, relative to their squared size.
        loss: of the dense model, a mean over the evaluation rows.
        rows: how many those are.
        groups: every node group that was measured, in the order of the model.
        left_out: name of every other prunable group → why masking it alone is not possible.
    """

    ratios: tuple[float, ...]
    measure: str
    loss: float
    rows: int
    groups: list[GroupKnowledge]
    left_out: dict[str, str] = field(default_factory=dict)

    def deviations(self, group: GroupKnowledge) -> list[float]:
        """How much the loss rises, one number per ratio."""
        return [loss - self.loss for loss in group.losses]

    def shown(self, group: GroupKnowledge) -> list[float]:
        """:meth:`deviations` as they are shown: of the perplexity, where the loss has one."""
        if self.measure != "perplexity":
            return self.deviations(group)
        return [_exp(loss) - _exp(self.loss) for loss in group.losses]

    def worst(self, gamma: float) -> list[GroupKnowledge]:
        """The share ``gamma`` of the groups (at least one) whose loss rises most, in the mean over the ratios."""
        if not self.groups or not gamma:
            return []
        by_deviation = sorted(self.groups, key=lambda group: -sum(self.deviations(group)))
        return by_deviation[: max(1, round(gamma * len(self.groups)))]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what is not finite is None."""
        return {
            "format": FORMAT,
            "ratios": list(self.ratios),
            "measure": self.measure,
            "loss": self.loss,
            "rows": self.rows,
            "groups": [
                {
                    "name": group.name,
                    "modules": group.modules,
                    "size": group.size,
                    "removed": group.removed,
                    "losses": [loss if math.isfinite(loss) else None for loss in group.losses],
                    "deviations": [rise if math.isfinite(rise) else None for rise in self.shown(group)],
                }
                for group in self.groups
            ],
            "left_out": self.left_out,
        }

    def to_json(self) -> str:
        """As JSON text; what is not finite is null."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Knowledge:
        """Read what :meth:`to_json` wrote. Raises :class:`GraphPruneError` for anything else."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise GraphPruneError(f"{_WHERE} is damaged, it is not JSON: {error}.") from None
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise GraphPruneError(f"This is no knowledge distribution of format {FORMAT}.")
        ratios = tuple(float(ratio) for ratio in _list(data, "ratios", _NUMBER))
        groups = [_group(of_kind(one, dict, _WHERE), len(ratios)) for one in take(data, "groups", list, _WHERE)]  # type: ignore[arg-type]
        measure = take(data, "measure", str, _WHERE)  # type: ignore[arg-type]
        if measure not in MEASURES:
            raise GraphPruneError(f"{_WHERE} is damaged: {measure!r} is no measure.")
        return cls(
            ratios=ratios,
            measure=measure,
            loss=float(take(data, "loss", _NUMBER, _WHERE)),  # type: ignore[arg-type]
            rows=take(data, "rows", int, _WHERE),  # type: ignore[arg-type]
            groups=groups,
            left_out={name: of_kind(why, str, _WHERE) for name, why in take(data, "left_out", dict, _WHERE).items()},  # type: ignore[arg-type]
        )

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the deviations over the groups, in the order of the model, as Figure 4 of the paper.

        The name of ``path`` says the format (.png, .svg, .pdf). Raises :class:`GraphPruneError` when matplotlib is
        missing or the file cannot be written.
        """
        from graphprune.plotting import plot_knowledge

        plot_knowledge(self, path)

    def __str__(self) -> str:
        """A table: a row per group, a column per ratio."""
        title = f"{MEASURES[self.measure]} of the dense model: {self._dense()} ({self.rows} rows)"
        header = ["node group", "size", *(f"+ at {ratio:g}" for ratio in self.ratios)]
        rows = [[g.name, str(g.size), *(f"{rise:,.4g}" for rise in self.shown(g))] for g in self.groups]
        lines = [title, *_aligned([header, *rows])]
        lines += [f"left out: {name}: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)

    def _dense(self) -> str:
        return f"{_exp(self.loss) if self.measure == 'perplexity' else self.loss:,.4g}"


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _list(data: Any, key: str, kind: type | tuple[type, ...]) -> list[Any]:
    return [of_kind(value, kind, f"{_WHERE}: {key}") for value in take(data, key, list, _WHERE)]


def _group(data: dict[str, Any], ratios: int) -> GroupKnowledge:
    losses = [math.inf if loss is None else float(loss) for loss in _list(data, "losses", (*_NUMBER, type(None)))]
    removed = _list(data, "removed", int)
    if len(losses) != ratios or len(removed) != ratios:
        raise GraphPruneError(f"{_WHERE} is damaged: a group does not have one loss per ratio.")
    return GroupKnowledge(
        take(data, "name", str, _WHERE), _list(data, "modules", str), take(data, "size", int, _WHERE), removed, losses
    )
