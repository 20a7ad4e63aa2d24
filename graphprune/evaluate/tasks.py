"""lm-evaluation-harness tasks over a model in memory."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.trace.quiet import eval_mode, log_level

Scores = dict[str, dict[str, float]]


class Tasks:
    """Tasks of lm-eval, found and their data read once, to be run on several models.

    Args:
        names: of tasks, groups and tags, with ``*`` as in lm-eval; or paths of task files (.yaml).
        include_path: a folder with more tasks, found before lm-eval's own.
        limit: use the first so many rows of every task, or, below 1, that share of them.

    Raises:
        GraphPruneError: when a task is not known, or its data cannot be read.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        include_path: str | os.PathLike[str] | None = None,
        limit: int | float | None = None,
    ) -> None:
        if isinstance(names, str):
            names = [names]
        if not names:
            raise GraphPruneError("No tasks were given.")
        if include_path is not None and not Path(include_path).is_dir():
            raise GraphPruneError(f"There is no folder {include_path} to find tasks in.")
        self.limit = limit
        with _quiet(), _own_randomness():
            self._manager = _manager(names, include_path)
            self.names = list(dict.fromkeys(match for name in names for match in _matches(self._manager, name)))
            try:
                self._manager.load(self.names)
            except Exception as error:  # data is read by code of the task's own, from disk or from the hub
                raise GraphPruneError(
                    f"{', '.join(self.names)}: the tasks cannot be loaded: {type(error).__name__}: {error}"
                ) from error

    def scores(self, model: nn.Module, tokenizer: Any) -> Scores:
        """Task → metric → value, with ``acc_stderr`` for the standard error of ``acc``, and so on.

        A group that has no scores of its own stands for its members. The model stays as it is, and where it is.

        Raises:
            GraphPruneError: when ``model`` is no causal language model of transformers, or there is no tokenizer.
        """
        from graphprune.evaluate.harness import HarnessModel

        with _quiet(), _own_randomness(), eval_mode(model):
            import lm_eval

            results = lm_eval.simple_evaluate(
                HarnessModel(model, tokenizer=tokenizer),
                tasks=list(self.names),
                task_manager=self._manager,
                limit=self.limit,
                log_samples=False,
            )
        assert results is not None  # only in other processes than the first
        found = {name: _metrics(values) for name, values in results["results"].items()}
        members = results.get("group_subtasks", {})
        return {name: found[name] for top in self.names for name in _with_scores(top, found, members)}


def average(scores: Scores) -> float | None:
    """Mean over tasks of ``acc_norm`` or, where a task has none, ``acc``: the average of the pruning papers.

    ``scores`` are those of :class:`Evaluation`: task → metric → value. None when fewer than two tasks have one.
    """
    accuracies = [metrics.get("acc_norm", metrics.get("acc")) for metrics in scores.values()]
    given = [value for value in accuracies if value is not None]
    return sum(given) / len(given) if len(given) > 1 else None


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """``{"acc,none": 0.5, "alias": …}`` → ``{"acc": 0.5}``; the name of a filter stays."""
    numbers = {key: value for key, value in values.items() if "," in key and isinstance(value, (int, float))}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}


def _with_scores(name: str, found: Scores, members: dict[str, list[str]]) -> list[str]:
    if found.get(name):
        return [name]
    return [inner for member in members.get(name, []) for inner in _with_scores(member, found, members)]


def _manager(names: Sequence[str], include_path: str | os.PathLike[str] | None) -> Any:
    """A task manager of lm-eval. Its own 14,000 tasks take seconds to index: only when they are asked for."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if _knows_all(own.task_index, names):
            return own
    return TaskManager(include_path=None if include_path is None else str(include_path))


def _knows_all(index: dict[str, Any], names: Sequence[Any]) -> bool:
    """Whether every name is in the index, and every member of a group too."""
    for name in names:
        if isinstance(name, dict):
            name = name.get("task", name.get("group"))
        entry = index.get(name) if isinstance(name, str) else None
        if entry is None:
            return False
        members = (entry.cfg or {}).get("task")
        if isinstance(members, list) and not _knows_all(index, members):
            return False
    return True


def _matches(manager: Any, name: str) -> list[str]:
    if found := manager.match_tasks([name]):
        return found
    if name.endswith(".yaml") and Path(name).is_file():
        return [name]
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    hint = f"; there is {', '.join(near)}" if near else ""
    raise GraphPruneError(f"lm-eval knows no task {name!r}{hint}. A folder with more tasks is given as include_path.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's warnings are not shown, and what it prints goes to standard error."""
    with log_level(logging.ERROR, "lm_eval"), contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """lm-eval seeds the global generators, so that results repeat; the caller's go on as if it had not."""
    numbers, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(arrays)
