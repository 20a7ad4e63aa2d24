"""Pretraining text as tokens: its paragraphs, but for those that are too short to learn from.

A paragraph is a longest piece without an empty line: a text whose lines end with one newline each is one paragraph.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from graphprune.data.instructions import tokenise

ALL, SHORT = "paragraphs", "short paragraphs"
_EMPTY_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffd\ud800-\udfff]")


def encode_texts(texts: Sequence[str], tokenizer: Any, shortest: int, dropped: Counter[str]) -> Iterator[list[int]]:
    """The tokens of each document that has paragraphs of more than ``shortest`` tokens, and EOS.

    ``dropped`` counts :data:`ALL` and :data:`SHORT` paragraphs.
    """
    paragraphs = [_paragraphs(text) for text in texts]
    tokens = iter(tokenise([one for document in paragraphs for one in document], tokenizer))
    kept: list[list[tuple[str, list[int]]]] = []
    for document in paragraphs:
        pairs = [(one, next(tokens)) for one in document]
        kept.append([(one, ids) for one, ids in pairs if len(ids) > shortest])
        dropped[ALL] += len(pairs)
        dropped[SHORT] += len(pairs) - len(kept[-1])
    joined = iter(tokenise(["\n\n".join(one for one, _ in d) for d in kept if len(d) > 1], tokenizer))
    end = getattr(tokenizer, "eos_token_id", None)
    for document_kept in kept:
        if document_kept:
            ids = next(joined) if len(document_kept) > 1 else document_kept[0][1]
            yield ids if end is None else [*ids, end]


def _paragraphs(text: str) -> list[str]:
    """The longest pieces without an empty line, with lines that end as on Unix, and without control characters."""
    clean = _NO_TEXT.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return [piece for piece in (one.strip("\n") for one in _EMPTY_LINES.split(clean)) if piece.strip()]
