"""Measure a model: quality, size, speed, memory; and compare a pruned one with what it was.

>>> from graphprune.evaluate import evaluate
>>> evaluate(model, tokenizer, text=text).perplexity      # doctest: +SKIP
{128: 53.95, 2048: 19.92}
"""

from __future__ import annotations

from graphprune.evaluate.evaluation import Evaluation, evaluate
from graphprune.evaluate.macs import count_macs
from graphprune.evaluate.memory import peak_memory, peak_memory_of
from graphprune.evaluate.perplexity import perplexity
from graphprune.evaluate.size import checkpoint_bytes, parameter_bytes
from graphprune.evaluate.table import comparison
from graphprune.evaluate.tasks import Tasks, average
from graphprune.evaluate.timing import Latency, latency

__all__ = [
    "Evaluation",
    "Latency",
    "Tasks",
    "average",
    "checkpoint_bytes",
    "comparison",
    "count_macs",
    "evaluate",
    "latency",
    "parameter_bytes",
    "peak_memory",
    "peak_memory_of",
    "perplexity",
]
