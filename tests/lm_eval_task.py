"""Tasks for lm-eval over rows of one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_DATA = """
import json
from pathlib import Path
import datasets

def rows(**_):
    lines = (Path(__file__).parent / "rows.jsonl").read_text().splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
"""
_TASK = """
task: {name}
custom_dataset: !function data.rows
dataset_path: json
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_target: answer
doc_to_choice: choices
metric_list:
{metrics}
"""


def write_task(folder: Path, name: str, rows: Sequence[dict[str, Any]], metrics: Sequence[str] = ("acc",)) -> None:
    """The task ``name`` in ``folder``: ``rows`` of a question, choices and the number of the answer.

    Tasks in one folder have the same rows.
    """
    lines = "\n".join(f"  - metric: {metric}" for metric in metrics)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data.py").write_text(_DATA)
    (folder / f"{name}.yaml").write_text(_TASK.format(name=name, metrics=lines))
