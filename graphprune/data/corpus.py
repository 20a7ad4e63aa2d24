"""Corpora for training: sources filtered, tokenised once into shards, with a validation sample held out.

:func:`prepare` reads each source as a stream. Tokens of documents go to a *spool*, one file on the disk, since only
when all documents are read is it known which of them to hold out; then rows go from there to shards, and the spool is
removed. What was prepared from the same data, with the same tokenizer and settings, is opened as it is.

**Documents.** A document of pretraining text is split into paragraphs, the longest pieces without an empty line. Those
of at most ``shortest`` tokens are left out; so are control characters and halves of surrogate pairs. What is left,
joined by empty lines again, is tokenised and ends with the EOS token. Documents are joined and cut into rows.

**Validation.** Whole documents are held out, in the order of a hash of their tokens and the seed: a uniform sample,
whatever order they come in. A document that occurs again is held out each time. As a long document would fill all of
the validation rows, each gives at most so many rows, from a random place, as keeps what is held out below an eighth of
the source (or a quarter, or what training can spare). What else a held-out document has is not used, and documents that
are too long for that share are not held out. Of instructions, examples are held out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from graphprune.data import instructions, shards
from graphprune.data.instructions import tokenise
from graphprune.data.shards import Rows, Shard, Written
from graphprune.data.sources import Source, add_document, check_names, digest, documents
from graphprune.data.texts import Say, silent
from graphprune.errors import GraphPruneError
from graphprune.io.checked_json import of_kind, read_json, take
from graphprune.io.fingerprint import fingerprint

__all__ = ["Corpus", "Rows", "open_corpus", "prepare"]

FORMAT = 1
INDEX = "index.json"
_SHARD_NAME = re.compile(r"(?:train|validation)-[0-9]{5}\.safetensors")
_FOLDER_NAME = re.compile(r".+-[0-9a-f]{20}")
_AT_ONCE = 64  # documents that are tokenised together
_PROBE = "The quick brown fox (née 狐) can't jump 3.14 times;\n\n\tit sleeps."
_ALL = "paragraphs"  # among what is dropped: how many there were
_EMPTY_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffd\ud800-\udfff]")


@dataclass(frozen=True)
class Corpus:
    """A prepared source.

    Attributes:
        name: of the source; ``instruct`` as it was there.
        train: rows to train on; ``validation`` rows of documents that no row of these has tokens of.
        fingerprint: hex, of tokenizer, data and settings.
        dropped: how many of what was left out, such as ``{"short paragraphs": 12}``.
    """

    name: str
    instruct: bool
    train: Rows
    validation: Rows
    fingerprint: str
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Settings:
    length: int
    validation: int
    shortest: int
    most: int | None
    seed: int

    def __post_init__(self) -> None:
        least = {"length": 2, "validation": 1, "shortest": 0, "most": self.validation * self.length}
        for name, smallest in least.items():
            value = getattr(self, name)
            if name == "most" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                why = ": training needs as many rows as validation" if name == "most" else ""
                raise GraphPruneError(f"{name}= is an integer of at least {smallest}{why}; not {value!r}.")


def prepare(
    sources: Sequence[Source],
    tokenizer: Any,
    folder: str | Path,
    *,
    length: int = 512,
    validation: int = 64,
    shortest: int = 64,
    most: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Corpus]:
    """Filter and tokenise sources into ``folder``, or open what was prepared there before.

    Every source has a folder of its own in ``folder``, named after it and its fingerprint; others stay as they are. A
    call that was interrupted leaves nothing that is taken for a finished one. Calls for the same folder, from several
    processes, wait for one another. The same arguments give bitwise the same shards.

    Args:
        sources: of different names, as :func:`graphprune.data.sources.sources_of` makes them. Streams are read in every
            call, all others when something has changed.
        tokenizer: of the library ``transformers``.
        folder: is made when there is none. For a time it holds twice the bytes of the result.
        length: tokens of a row.
        validation: rows of each source to hold out; training gets at least as many.
        shortest: paragraphs of pretraining text are kept when they have more tokens.
        most: at most so many tokens are trained on per source, from its beginning.
        seed: of the choice of what is held out.
        progress: is told what is going on.

    Returns:
        A corpus for each source, in the same order.

    Raises:
        GraphPruneError: for settings out of range, a source that is empty, cannot be read, has rows without the wanted
            fields, or too few; for damaged files of an earlier call; when files cannot be written.
    """
    settings = _Settings(length, validation, shortest, most, seed)
    sources = list(sources)
    for source in sources:
        if not isinstance(source, Source):
            raise GraphPruneError(f"prepare() takes sources, as sources_of(…) makes them; not {type(source).__name__}.")
    check_names(sources)
    job = _Job(tokenizer, _of_tokenizer(tokenizer), Path(folder), settings, progress or silent)
    return [_prepared(source, job) for source in sources]


def open_corpus(folder: str | Path) -> Corpus:
    """Open a folder of one source that :func:`prepare` wrote. Its files are checked, and not read into memory.

    Raises :class:`GraphPruneError` naming the file that is missing, damaged or not of this kind.
    """
    path = Path(folder) / INDEX
    data, where = read_json(path), str(path)
    if take(data, "format", int, where) != FORMAT:
        raise GraphPruneError(
            f"{path} is of format {data['format']}, not {FORMAT}: another version of graphprune wrote it."
        )
    try:
        name, instruct = take(data, "name", str, where), take(data, "instruct", bool, where)
        found = take(data, "fingerprint", str, where)
        take(data, "settings", dict, where)
        dropped = {key: of_kind(n, int, where) for key, n in take(data, "dropped", dict, where).items()}
        train, validation = (
            Rows([_shard(Path(folder), one, instruct, where) for one in take(data, part, list, where)])
            for part in ("train", "validation")
        )
    except GraphPruneError as error:
        hint = "" if "Delete the folder" in str(error) else f" Delete the folder {folder} to prepare it anew."
        raise GraphPruneError(f"{error}{hint}") from error
    return Corpus(name, instruct, train, validation, found, dropped)


def _shard(folder: Path, said: Any, instruct: bool, where: str) -> Shard:
    of_kind(said, dict, where)
    kinds = {one.name: str if one.name in ("file", "sha256") else int for one in dataclasses.fields(Written)}
    written = Written(**{name: take(said, name, kind, where) for name, kind in kinds.items()})
    if not _SHARD_NAME.fullmatch(written.file):
        raise GraphPruneError(f"{where} is damaged: {written.file!r} is no name of a shard.")
    return Shard(folder / written.file, written, instruct).check()


# ---------------------------------------------------------------------------------------------------------- preparing


def _prepared(source: Source, tokenizer: Any, folder: Path, settings: _Settings, say: Say) -> Corpus:
    known = digest(source)
    key = None if known is None else _fingerprint(source, tokenizer, settings, known)
    if key is not None and (done := _done(source, folder, key)) is not None:
        say(f"opening {source.name}")
        return done
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise shards.not_written(folder, 0, error) from error
    with FileLock(folder / ".lock"):
        _remove_orphans(folder)
        done = None if key is None else _done(source, folder, key)  # by another process, while this one waited
        return done or _made(source, tokenizer, folder, settings, key, say)


def _made(source: Source, tokenizer: Any, folder: Path, settings: _Settings, key: str | None, say: Say) -> Corpus:
    """Prepare a source; ``key`` is its fingerprint, where it is known before the source is read."""
    spool = _Spool(folder / f".{source.name}.spool.partial")
    try:
        read = _read(source, tokenizer, settings, spool, say)
        key = key or _fingerprint(source, tokenizer, settings, read)
        done = _done(source, folder, key)
        if done is not None:
            return done
        _write(source, spool, folder, key, settings, say)
    finally:
        spool.remove()
    return open_corpus(_target(source, folder, key))


def _done(source: Source, folder: Path, key: str) -> Corpus | None:
    """What is prepared already, if it is."""
    target = _target(source, folder, key)
    if not (target / INDEX).exists():
        return None
    corpus = open_corpus(target)
    if (corpus.fingerprint, corpus.name, corpus.instruct) != (key, source.name, source.instruct):
        raise GraphPruneError(f"{target / INDEX} is of something else. Delete the folder {target} to prepare it anew.")
    return corpus


def _target(source: Source, folder: Path, key: str) -> Path:
    return folder / f"{source.name}-{key[:20]}"


def _remove_orphans(folder: Path) -> None:
    """Remove what calls left that were killed: nobody else is at work in the folder."""
    for path in folder.iterdir():
        if path.name.startswith(".") and path.name.endswith(".spool.partial"):
            path.unlink(missing_ok=True)
        elif _FOLDER_NAME.fullmatch(path.name) and path.is_dir() and not (path / INDEX).exists():
            inside = list(path.iterdir())
            if all(_SHARD_NAME.fullmatch(one.name) or one.name.endswith(".partial") for one in inside):
                shutil.rmtree(path)


def _fingerprint(source: Source, tokenizer: Any, settings: _Settings, of_data: str) -> str:
    told = {**dataclasses.asdict(settings), "instruct": source.instruct, "format": FORMAT}
    if source.instruct:
        del told["shortest"]  # it is of paragraphs
    return fingerprint(json.dumps(told, sort_keys=True), _of_tokenizer(tokenizer), of_data)


def _of_tokenizer(tokenizer: Any) -> str:
    """All that decides on tokens; not how the tokenizer was last told to pad or truncate."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        data = json.loads(backend.to_str())
        inside = {key: value for key, value in data.items() if key not in ("padding", "truncation")}
    else:
        inside = dict(sorted(getattr(tokenizer, "get_vocab", dict)().items()))
    told = [getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "chat_template")]
    probe = tokenise([_PROBE], tokenizer)
    return fingerprint(type(tokenizer).__name__, json.dumps([inside, told, probe], sort_keys=True, default=str))


# ------------------------------------------------------------------------------------------------------------- reading


class _Spool:
    """The tokens of all documents in a file, int32, and of each document its tokens and a hash of them."""

    def __init__(self, path: Path):
        self.path = path
        self.sizes, self.hashes = array("q"), array("Q")
        self.tokens = 0
        self.dropped: Counter[str] = Counter()
        self._file = shards.opened(path)

    def add(self, tokens: np.ndarray, key: bytes) -> None:
        data = tokens.astype("<i4").tobytes()
        shards.put(self._file, data, self.path.parent)
        self.sizes.append(len(tokens))
        self.hashes.append(int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "little"))
        self.tokens += len(tokens)

    def finish(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise shards.not_written(self.path.parent, 4 * self.tokens, error) from error

    def documents(self, which: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """The tokens of some documents."""
        flat = np.memmap(self.path, dtype="<i4", mode="r")
        ends = np.cumsum(np.asarray(self.sizes))
        for n in which:
            yield flat[ends[n] - self.sizes[n] : ends[n]]

    def remove(self) -> None:
        with suppress(OSError):  # on a full disk closing fails too, and what it would have written is not wanted
            self._file.close()
        self.path.unlink(missing_ok=True)


def _read(source: Source, tokenizer: Any, settings: _Settings, spool: _Spool, say: Say) -> str:
    """Fill the spool with as many documents as are needed; returns the sha256 of these."""
    found = hashlib.sha256()
    read = 0
    enough = _enough(source, settings)
    stream = documents(source)
    encode = _encode_rows if source.instruct else _encode_texts
    key = str(settings.seed).encode()
    while spool.tokens < enough and (some := list(islice(stream, _AT_ONCE))):
        for item, _ in some:
            add_document(found, item)
        for tokens in encode(some, tokenizer, settings, spool.dropped):
            spool.add(tokens, key)
        read += len(some)
        say(f"tokenising {source.name}: {read:,} documents, {spool.tokens:,} tokens")
    if not read:
        raise GraphPruneError(f"Source {source.name!r} is empty: it has no documents.")
    spool.finish()
    return found.hexdigest()


def _enough(source: Source, settings: _Settings) -> float:
    """So many tokens that ``most`` are left when validation has taken its share, which is unknown before."""
    if settings.most is None:
        return float("inf")
    held = settings.validation * settings.length
    return settings.most + held if source.instruct else (settings.most + held) * 8 / 7


def _encode_rows(
    rows: Sequence[tuple[Any, str]], tokenizer: Any, settings: _Settings, dropped: Counter[str]
) -> Iterator[np.ndarray]:
    for example in instructions.encode(rows, tokenizer):
        cut = None if example is None else example.cut(settings.length)
        if cut is not None:
            yield shards.coded(cut.tokens, cut.counts)
        else:
            dropped["rows without an answer" if example is None else "rows whose answer is cut off"] += 1


def _encode_texts(
    texts: Sequence[tuple[str, str]], tokenizer: Any, settings: _Settings, dropped: Counter[str]
) -> Iterator[np.ndarray]:
    paragraphs = [_paragraphs(text) for text, _ in texts]
    tokens = iter(tokenise([one for document in paragraphs for one in document], tokenizer))
    kept: list[list[tuple[str, list[int]]]] = []
    for document in paragraphs:
        pairs = [(one, next(tokens)) for one in document]
        kept.append([(one, ids) for one, ids in pairs if len(ids) > settings.shortest])
        dropped[_ALL] += len(pairs)
        dropped["short paragraphs"] += len(pairs) - len(kept[-1])
    joined = iter(tokenise(["\n\n".join(one for one, _ in d) for d in kept if len(d) > 1], tokenizer))
    end = getattr(tokenizer, "eos_token_id", None)
    for document_kept in kept:
        if document_kept:
            ids = next(joined) if len(document_kept) > 1 else document_kept[0][1]
            yield np.asarray(ids if end is None else [*ids, end], dtype=np.int32)


def _paragraphs(text: str) -> list[str]:
    """The longest pieces without an empty line, with lines that end as on Unix, and without control characters."""
    clean = _NO_TEXT.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return [piece for piece in (one.strip("\n") for one in _EMPTY_LINES.split(clean)) if piece.strip()]


# ------------------------------------------------------------------------------------------------------------- writing


def _write(source: Source, spool: _Spool, folder: Path, key: str, settings: _Settings, say: Say) -> None:
    """Write shards and, when they are there, the index; or nothing."""
    held, pieces = (_held_examples if source.instruct else _held_documents)(source, spool, settings)
    length = None if source.instruct else settings.length
    train = _first(_rows(spool.documents(np.flatnonzero(~held)), length), settings.most)
    validation = islice(_rows(pieces, length), settings.validation)
    say(f"writing {source.name}")
    target = _target(source, folder, key)
    target.mkdir(exist_ok=True)
    try:
        parts = {
            "train": shards.write_shards(train, target, "train", source.instruct),
            "validation": shards.write_shards(validation, target, "validation", source.instruct),
        }
        rows = {part: sum(one.rows for one in written) for part, written in parts.items()}
        if min(rows.values()) < settings.validation:  # documents that are equal count once in validation
            raise _too_few(source, spool, settings, sum(rows.values()))
        index = {
            "format": FORMAT,
            "name": source.name,
            "instruct": source.instruct,
            "fingerprint": key,
            "settings": dataclasses.asdict(settings),
            "dropped": {what: n for what, n in sorted(spool.dropped.items()) if what != _ALL},
            **{part: [dataclasses.asdict(one) for one in written] for part, written in parts.items()},
        }
        shards.replace_bytes(target / INDEX, json.dumps(index, indent=1).encode())
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _rows(pieces: Iterator[np.ndarray], length: int | None) -> Iterator[np.ndarray]:
    """Each piece as a row or, with a length, rows of that many of the joined tokens; what is over is not used."""
    if length is None:
        yield from pieces
        return
    left = np.empty(0, dtype=np.int32)
    for piece in pieces:
        left = np.concatenate([left, piece])
        whole = len(left) // length * length
        yield from left[:whole].reshape(-1, length)
        left = left[whole:]


def _first(rows: Iterator[np.ndarray], most: int | None) -> Iterator[np.ndarray]:
    """The first rows, of at most so many tokens together."""
    size = 0
    for row in rows:
        size += len(row)
        if most is not None and size > most:
            return
        yield row


# --------------------------------------------------------------------------------------------------------- holding out


def _held_examples(source: Source, spool: _Spool, settings: _Settings) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """Which examples are not trained on, and those to validate with: one of each that are equal."""
    hashes = np.asarray(spool.hashes)
    order = np.unique(hashes, return_index=True)[1]
    if len(hashes) < 2 * settings.validation:
        raise _too_few(source, spool, settings, len(hashes))
    chosen = order[: settings.validation]
    return np.isin(hashes, hashes[chosen]), spool.documents(chosen)


def _held_documents(source: Source, spool: _Spool, settings: _Settings) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """Which documents are not trained on, and the pieces of them to validate with."""
    hashes, sizes = np.asarray(spool.hashes), np.asarray(spool.sizes)
    _, order, copies = np.unique(hashes, return_index=True, return_counts=True)
    needed = settings.validation * settings.length
    for share in (spool.tokens // 8, spool.tokens // 4, spool.tokens - needed):
        per = 1
        while per < 2 * settings.validation:
            chosen = _choose(sizes[order], copies, needed, per * settings.length, share)
            if chosen is not None:
                held = np.isin(hashes, hashes[order[chosen]])
                return held, _pieces(spool, order[chosen], hashes, per * settings.length)
            per *= 2
    raise _too_few(source, spool, settings, spool.tokens // settings.length)


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


def _pieces(spool: _Spool, which: np.ndarray, hashes: np.ndarray, per: int) -> Iterator[np.ndarray]:
    """At most ``per`` tokens of each document, from a place that its hash decides on."""
    for n, tokens in zip(which, spool.documents(which), strict=True):
        begin = int(hashes[n]) // 2**16 % (max(len(tokens) - per, 0) + 1)
        yield tokens[begin : begin + per]


def _too_few(source: Source, spool: _Spool, settings: _Settings, rows: int) -> GraphPruneError:
    what, wanted = (
        ("examples", "") if source.instruct else (f"rows of {settings.length} tokens", "length=, shortest= or ")
    )
    paragraphs, short = spool.dropped[_ALL], spool.dropped["short paragraphs"]
    if paragraphs and paragraphs == short:
        return GraphPruneError(
            f"Source {source.name!r}: all of its {paragraphs:,} paragraphs have at most {settings.shortest} tokens, "
            "and are left out. A paragraph ends at an empty line; lower shortest=, or join the texts."
        )
    lost = [f"{n:,} {name}" for name, n in sorted(spool.dropped.items()) if name != _ALL and n]
    return GraphPruneError(
        f"Source {source.name!r} gives {rows:,} {what}, from {len(spool.sizes):,} documents"
        f"{f' ({chr(44).join(lost)} left out)' if lost else ''}; {settings.validation} for validation and as many for "
        f"training, of different documents, are {2 * settings.validation}. Give more documents, cut long ones in "
        f"several, or lower {wanted}validation=."
    )
