"""lm-evaluation-harness: the model type ``graphprune``, and its command with that type known.

Stock ``from_pretrained``, which lm-eval's type ``hf`` uses, cannot build a model with other widths in every layer.
lm-eval finds model types in its registry alone, which this module adds to when it is imported.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.evaluate.language_model import TOKENS_PER_FORWARD, check_language_model
from graphprune.io.models import load_model

# HFLM takes these for a model that is loaded already; it would ignore the others without a word.
_OPTIONS = {
    "add_bos_token",
    "backend",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "max_length",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
}


@register_model("graphprune")
class HarnessModel(HFLM):
    """What ``lm_eval --model graphprune --model_args pretrained=MODEL`` runs.

    Args:
        pretrained: a model, or what :func:`graphprune.io.models.load_model` takes.
        tokenizer: a tokenizer, or the name of one; that of ``pretrained`` by default.
        batch_size: requests per forward; ``"auto"``: as many as keep a forward within a number of tokens, few long ones
            or many short ones.
        device: where a model that is loaded goes; the CPU when that is CUDA and there is none.
        dtype: of its weights, such as ``"bfloat16"``; as stored by default.

    Raises:
        GraphPruneError: when the model cannot be loaded, has no tokenizer, is no causal language model of transformers,
            or with options that belong to other ways of loading.
    """

    def __init__(
        self,
        pretrained: str | nn.Module,
        *,
        tokenizer: Any = None,
        batch_size: int | str = "auto",
        device: str | None = None,
        dtype: str | None = None,
        **options: Any,
    ) -> None:
        if others := sorted(options.keys() - _OPTIONS):
            raise GraphPruneError(f"lm-eval's model type graphprune takes no {', '.join(others)}.")
        name = pretrained if isinstance(pretrained, str) else ""
        model, own = load_model(pretrained, dtype=_dtype(dtype)) if isinstance(pretrained, str) else (pretrained, None)
        if name:
            model.to(_device(device))
        if isinstance(tokenizer, str):
            import transformers

            tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer)
        tokenizer = own if tokenizer is None else tokenizer
        if tokenizer is None:
            raise GraphPruneError(f"{name or 'The model'} comes without a tokenizer, which lm-eval's tasks need.")
        check_language_model(model, 2)
        if not all(hasattr(model, name) for name in ("config", "device", "tie_weights")):
            raise GraphPruneError(f"lm-eval's tasks need a model of transformers, not a {type(model).__name__}.")
        # A copy: HFLM gives a tokenizer without a padding token one.
        super().__init__(model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, **options)
        self.pretrained = name  # what results are filed under

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[tuple[Any, list[int], list[int]]]) -> int:
        """How many requests the batch that ``pos`` belongs to should have.

        lm-eval asks for every position in turn, and ends a batch where it has as many. Requests come longest first, and
        are padded to the first of their batch.
        """
        if pos == 0:
            self._batch_start = 0
        _, context, continuation = n_reordered_requests[self._batch_start]
        size = max(1, TOKENS_PER_FORWARD // min(len(context) + len(continuation), self.max_length))
        if pos + 1 == self._batch_start + size:
            self._batch_start = pos + 1
        return size

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """Without requests to look at: as many as fit when all are as long as can be."""
        return max(1, TOKENS_PER_FORWARD // self.max_length)


def _dtype(name: str | None) -> torch.dtype | None:
    if name in (None, "auto"):
        return None
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise GraphPruneError(f"torch has no dtype {name!r}.")
    return found


def _device(name: str | None) -> torch.device:
    """The command lm_eval asks for ``cuda:0`` when its user asked for nothing."""
    try:
        device = torch.device(name or "cuda")
    except RuntimeError as error:
        raise GraphPruneError(f"There is no device {name!r}.") from error
    return torch.device("cpu") if device.type == "cuda" and not torch.cuda.is_available() else device


def run_command(arguments: Sequence[str]) -> None:
    """The command ``lm_eval`` with ``arguments``, knowing the model type ``graphprune``."""
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
