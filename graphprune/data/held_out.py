"""Which documents of a source are held out for validation.

They are whole documents, in the order of a hash of their tokens and the seed: a uniform sample, whatever order they
come in. A document that occurs again is held out each time. As a long document would fill all of the validation rows,
each gives at most so many rows, from a random place, as keeps what is held out below an eighth of the source (or a
quarter, or what training can spare). What else a held-out document has is not used at all, and documents that are too
long for that share are trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from graphprune.data.spool import Spool


@dataclass(frozen=True)
class Held:
    """What is held out: which documents are not trained on (a bool for each), and the pieces to validate with."""

    held: np.ndarray
    pieces: Iterator[np.ndarray]


def held_examples(spool: Spool, rows: int) -> Held | None:
    """So many examples, one of each that are equal; None when there are not as many others to train on."""
    hashes = np.asarray(spool.hashes)
    order = np.unique(hashes, return_index=True)[1]
    chosen = order[:rows]
    held = np.isin(hashes, hashes[chosen])
    if len(chosen) < rows or int((~held).sum()) < rows:
        return None
    return Held(held, spool.documents(chosen))


def held_documents(spool: Spool, rows: int, length: int) -> Held | None:
    """Documents with pieces for so many rows of so many tokens; None when the rest would not give as many rows."""
    hashes, sizes = np.asarray(spool.hashes), np.asarray(spool.sizes)
    _, order, copies = np.unique(hashes, return_index=True, return_counts=True)
    needed = rows * length
    for share in (spool.tokens // 8, spool.tokens // 4, spool.tokens - needed):
        per = 1
        while per < 2 * rows:
            chosen = _choose(sizes[order], copies, needed, per * length, share)
            if chosen is not None:
                held = np.isin(hashes, hashes[order[chosen]])
                return Held(held, _pieces(spool, order[chosen], hashes, per * length))
            per *= 2
    return None


def _choose(sizes: np.ndarray, copies: np.ndarray, needed: int, per: int, share: int) -> list[int] | None:
    """The first documents that together have the needed tokens, ``per`` of each, and no more than ``share`` in all."""
    chosen: list[int] = []
    held = found = 0
    for n, (size, times) in enumerate(zip(sizes.tolist(), copies.tolist(), strict=True)):
        if held + size * times > share:
            continue
        chosen.append(n)
        held += size * times
        found += min(size, per)
        if found >= needed:
            return chosen
    return None


def _pieces(spool: Spool, which: np.ndarray, hashes: np.ndarray, per: int) -> Iterator[np.ndarray]:
    """At most ``per`` tokens of each document, from a place that its hash decides on."""
    for n, tokens in zip(which, spool.documents(which), strict=True):
        begin = int(hashes[n]) // 2**16 % (max(len(tokens) - per, 0) + 1)
        yield tokens[begin : begin + per]
