"""Texts from files, and rows of tokens from texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from graphprune.errors import GraphPruneError

SUFFIXES = (".txt", ".jsonl")
_FIELD = "text"
# Up to so many texts are all read. Of more, random ones are, until they have so many times the tokens that are needed.
MANY = 4096
_TIMES_NEEDED = 16
_SAY_EVERY = 100

Say = Callable[[str], None]


def silent(text: str) -> None:
    """Says nothing: progress that nobody asked for."""


def is_path(text: str) -> bool:
    """Whether a str names a text file rather than being a text: one line that ends with .txt or .jsonl."""
    return text.endswith(SUFFIXES) and "\n" not in text


def read_texts(paths: Sequence[str | Path]) -> list[str]:
    """The texts of ``.txt`` files (one each) and ``.jsonl`` files (the field ``text`` of every row).

    Raises :class:`GraphPruneError` naming the file, and the row (counted from 1), that cannot be read.
    """
    return [text for path in map(Path, paths) for text in _read(path)]


def data_of(names: Sequence[str] | None, made: Container[str]) -> str | list[str] | None:
    """What ``--data`` of a command names: one of the inputs that are ``made``, or the texts of files."""
    if not names:
        return None
    return names[0] if len(names) == 1 and names[0] in made else read_texts(names)


def _read(path: Path) -> list[str]:
    return [item if path.suffix == ".txt" else text_of(item, where) for item, where in contents(path)]


def contents(path: Path) -> Iterator[tuple[Any, str]]:
    """What a file holds, read as it is wanted: the text of ``.txt``, the rows of ``.jsonl``; each with where it is.

    Raises :class:`GraphPruneError` naming the file, and the row (counted from 1), that cannot be read.
    """
    if path.suffix not in SUFFIXES:
        raise GraphPruneError(f"{path}: texts are read from .txt and .jsonl files.")
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".txt":
                yield file.read(), str(path)
                return
            # Not splitlines(): JSON strings may hold separators such as U+2028 as they are.
            for n, line in enumerate(file, 1):
                if line.strip():
                    yield _row(line, f"{path}, row {n}"), f"{path}, row {n}"
    except FileNotFoundError:
        raise GraphPruneError(f"There is no file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise GraphPruneError(f"{path} cannot be read as text: {error}") from error


def _row(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise GraphPruneError(f"{where} is no JSON: {error}") from error


def text_of(row: Any, where: str) -> str:
    """The field ``text`` of a row, which ``where`` names in errors."""
    if not isinstance(row, dict):
        raise GraphPruneError(f"{where} is no object with a field {_FIELD!r}, but {type(row).__name__}.")
    if _FIELD not in row:
        raise GraphPruneError(f"{where} has no field {_FIELD!r}; it has: {', '.join(map(str, row)) or 'none'}.")
    if not isinstance(row[_FIELD], str):
        raise GraphPruneError(f"{where}: the field {_FIELD!r} is {type(row[_FIELD]).__name__}, not text.")
    return row[_FIELD]


def token_rows(
    texts: Sequence[str], tokenizer: Any, samples: int, length: int, seed: int, say: Say = silent
) -> torch.Tensor:
    """``samples`` rows of ``length`` consecutive tokens, int64, from random places of the joined texts.

    Raises :class:`GraphPruneError` for a text without tokens and for too few tokens in all.
    """

    def tokens() -> Iterator[Any]:
        for done, index in enumerate(order(len(texts), seed)):
            if done % _SAY_EVERY == 0:
                say(f"tokenising calibration texts: {done} of {len(texts)}")
            yield _tokens(texts[index], tokenizer, index)

    return windows(tokens(), len(texts), samples, length, seed)


def _tokens(text: str, tokenizer: Any, index: int) -> Sequence[int]:
    try:
        ids = tokenizer(text, verbose=False)["input_ids"] if text.strip() else []
    except (TypeError, KeyError, AttributeError) as error:
        raise GraphPruneError(
            "tokenizer= turns a text into {'input_ids': [...]}, as those of transformers do; "
            f"this {type(tokenizer).__name__} does not: {error!r}"
        ) from error
    if not len(ids):
        raise GraphPruneError(f"Row {index} of the calibration texts (counted from 0) is empty: leave it out.")
    return ids


def order(how_many: int, seed: int) -> Iterable[int]:
    """The order in which to read texts or rows: as they come, or a random one where not all will be read."""
    if how_many <= MANY:
        return range(how_many)
    return torch.randperm(how_many, generator=torch.Generator().manual_seed(seed)).tolist()


def windows(pieces: Iterable[Any], how_many: int, samples: int, length: int, seed: int) -> torch.Tensor:
    """``samples`` rows of ``length`` consecutive tokens, int64, from random places of the joined pieces.

    All pieces are joined; of more than :data:`MANY`, so many as hold 16 times the tokens that the rows need.

    Raises :class:`GraphPruneError` when the pieces have less than twice the tokens of one row.
    """
    joined: list[torch.Tensor] = []
    tokens, enough = 0, _TIMES_NEEDED * samples * length
    for piece in pieces:
        joined.append(torch.as_tensor(piece, dtype=torch.long))
        tokens += len(joined[-1])
        if how_many > MANY and tokens >= enough:
            break
    if tokens < 2 * length:
        raise GraphPruneError(
            f"The calibration data has {tokens} tokens; at least {2 * length} are needed for rows of {length}."
        )
    stream = torch.cat(joined)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(stream) - length + 1, (samples,), generator=generator)
    return torch.stack([stream[start : start + length] for start in starts.tolist()])
