"""Corpora for training: sources filtered, tokenised once into shards, with a validation sample held out.

:func:`prepare` reads each source as a stream. Tokens of documents go to a *spool*, one file on the disk, since only
when all documents are read is it known which of them to hold out; then rows go from there to shards, and the spool is
removed. What was prepared from the same data, with the same tokenizer and settings, is opened as it is.

What is left out of documents is said in :mod:`graphprune.data.paragraphs` and :mod:`graphprune.data.instructions`, what
is held out in :mod:`graphprune.data.held_out`. Documents of pretraining text end with the EOS token, and are joined and
cut into rows; of instructions each is a row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from graphprune.data import instructions, shards
from graphprune.data.held_out import held_documents, held_examples
from graphprune.data.instructions import tokenise
from graphprune.data.paragraphs import ALL, SHORT, encode_texts
from graphprune.data.shards import Rows, Shard, Written
from graphprune.data.sources import Source, add_document, check_names, digest, documents
from graphprune.data.spool import Spool
from graphprune.data.texts import Say, silent
from graphprune.errors import GraphPruneError
from graphprune.io.checked_json import of_kind, read_json, take
from graphprune.io.fingerprint import fingerprint

__all__ = ["Corpus", "Rows", "open_corpus", "prepare"]

FORMAT = 1
INDEX = "index.json"
_SHARD_NAME = re.compile(r"(?:train|validation)-[0-9]{5}\.safetensors")
_SPOOL = ".spool.partial"
_FOLDER_NAME = re.compile(r".+-[0-9a-f]{20}")
_AT_ONCE = 64  # documents that are tokenised together
_PROBE = "The quick brown fox (née 狐) can't jump 3.14 times;\n\n\tit sleeps."


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
        if not isinstance(self.seed, int):
            raise GraphPruneError(f"seed= is an integer, not {self.seed!r}.")
        least = {"length": 2, "validation": 1, "shortest": 0, "most": self.validation * self.length}
        for name, smallest in least.items():
            value = getattr(self, name)
            if name == "most" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                why = ": training needs as many rows as validation" if name == "most" else ""
                raise GraphPruneError(f"{name}= is an integer of at least {smallest}{why}; not {value!r}.")


@dataclass(frozen=True)
class _Job:
    """What a call is about, whatever the source: ``tokens_by`` is the fingerprint of the tokenizer."""

    tokenizer: Any
    tokens_by: str
    folder: Path
    settings: _Settings
    say: Say

    def key(self, source: Source, of_data: str) -> str:
        """The fingerprint of what is prepared from a source whose data has that one."""
        told = {**dataclasses.asdict(self.settings), "instruct": source.instruct, "format": FORMAT}
        if source.instruct:
            del told["shortest"]  # it is of paragraphs
        return fingerprint(json.dumps(told, sort_keys=True), self.tokens_by, of_data)

    def target(self, source: Source, key: str) -> Path:
        return self.folder / f"{source.name}-{key[:20]}"


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
    try:
        return _opened(Path(folder), read_json(Path(folder) / INDEX))
    except GraphPruneError as error:
        raise GraphPruneError(f"{error} Delete the folder {folder} to prepare it anew.") from error


def _opened(folder: Path, data: dict[str, Any]) -> Corpus:
    where = str(folder / INDEX)
    if take(data, "format", int, where) != FORMAT:
        raise GraphPruneError(f"{where} is of format {data['format']}, not {FORMAT}: another version of this wrote it.")
    take(data, "settings", dict, where)
    train, validation = (
        Rows([_shard(folder, one, data, where) for one in take(data, part, list, where)])
        for part in ("train", "validation")
    )
    return Corpus(
        take(data, "name", str, where),
        take(data, "instruct", bool, where),
        train,
        validation,
        take(data, "fingerprint", str, where),
        {what: of_kind(n, int, where) for what, n in take(data, "dropped", dict, where).items()},
    )


def _shard(folder: Path, said: Any, data: dict[str, Any], where: str) -> Shard:
    of_kind(said, dict, where)
    kinds = {one.name: str if one.name in ("file", "sha256") else int for one in dataclasses.fields(Written)}
    written = Written(**{name: take(said, name, kind, where) for name, kind in kinds.items()})
    if not _SHARD_NAME.fullmatch(written.file):
        raise GraphPruneError(f"{where} is damaged: {written.file!r} is no name of a shard.")
    return Shard(folder / written.file, written, take(data, "instruct", bool, where)).check()


# ---------------------------------------------------------------------------------------------------------- preparing


def _prepared(source: Source, job: _Job) -> Corpus:
    known = digest(source)
    key = None if known is None else job.key(source, known)
    done = None if key is None else _done(source, job, key)
    if done is None:
        with _locked(job.folder):
            _remove_orphans(job.folder)
            done = None if key is None else _done(source, job, key)  # by another process, while this one waited
            done = done or _made(source, job, key)
    job.say(f"{source.name}: {len(done.train):,} rows to train on, {len(done.validation):,} to validate with")
    return done


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder, and be the only one who prepares there; the system lets go when a process is killed."""
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise shards.not_written(folder, 0, error) from error
    try:
        yield
    finally:
        lock.release()


def _made(source: Source, job: _Job, key: str | None) -> Corpus:
    """Prepare a source; ``key`` is its fingerprint, where it is known before the source is read."""
    spool = Spool(job.folder / f".{source.name}{_SPOOL}", job.settings.seed)
    try:
        dropped: Counter[str] = Counter()
        read = _read(source, job, spool, dropped)
        key = key or job.key(source, read)
        done = _done(source, job, key)  # a stream that was prepared before
        if done is None:
            _write(source, job, key, spool, dropped)
    finally:
        spool.remove()
    return done or open_corpus(job.target(source, key))


def _done(source: Source, job: _Job, key: str) -> Corpus | None:
    """What is prepared already, if it is."""
    target = job.target(source, key)
    if not (target / INDEX).exists():
        return None
    corpus = open_corpus(target)
    if (corpus.fingerprint, corpus.name, corpus.instruct) != (key, source.name, source.instruct):
        raise GraphPruneError(f"{target / INDEX} is of something else. Delete the folder {target} to prepare it anew.")
    return corpus


def _remove_orphans(folder: Path) -> None:
    """Remove what calls left that were killed: nobody else is at work in the folder."""
    for path in folder.iterdir():
        if path.name.startswith(".") and path.name.endswith(_SPOOL):
            path.unlink(missing_ok=True)
        elif _FOLDER_NAME.fullmatch(path.name) and path.is_dir() and not (path / INDEX).exists():
            inside = list(path.iterdir())
            if all(_SHARD_NAME.fullmatch(one.name) or one.name.endswith(".partial") for one in inside):
                shutil.rmtree(path)


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


def _read(source: Source, job: _Job, spool: Spool, dropped: Counter[str]) -> str:
    """Fill the spool with as many documents as are needed; returns the sha256 of these."""
    found = hashlib.sha256()
    read = 0
    enough = _enough(source, job.settings)
    stream = documents(source)
    while spool.tokens < enough and (some := list(islice(stream, _AT_ONCE))):
        for item, _ in some:
            add_document(found, item)
        for tokens in _encode(some, source, job, dropped):
            spool.add(tokens)
        read += len(some)
        job.say(f"tokenising {source.name}: {read:,} documents, {spool.tokens:,} tokens")
    if not read:
        raise GraphPruneError(f"Source {source.name!r} is empty: it has no documents.")
    spool.finish()
    return found.hexdigest()


def _encode(some: Sequence[tuple[Any, str]], source: Source, job: _Job, dropped: Counter[str]) -> Iterator[np.ndarray]:
    if not source.instruct:
        texts = [text for text, _ in some]
        for ids in encode_texts(texts, job.tokenizer, job.settings.shortest, dropped):
            yield np.asarray(ids, dtype=np.int32)
        return
    for example in instructions.encode(some, job.tokenizer):
        cut = None if example is None else example.cut(job.settings.length)
        if cut is not None:
            yield shards.coded(cut.tokens, cut.counts)
        else:
            dropped["rows without an answer" if example is None else "rows whose answer is cut off"] += 1


def _enough(source: Source, settings: _Settings) -> float:
    """So many tokens that ``most`` are left when validation has taken its share, which is unknown before."""
    if settings.most is None:
        return float("inf")
    held = settings.validation * settings.length
    return settings.most + held if source.instruct else (settings.most + held) * 8 / 7


# ------------------------------------------------------------------------------------------------------------- writing


def _write(source: Source, job: _Job, key: str, spool: Spool, dropped: Counter[str]) -> None:
    """Write shards and, when they are there, the index; or nothing."""
    settings, length = job.settings, None if source.instruct else job.settings.length
    wanted = settings.validation
    held = held_examples(spool, wanted) if length is None else held_documents(spool, wanted, length)
    if held is None:
        raise _too_few(source, settings, spool, dropped)
    train = _first(_rows(spool.documents(np.flatnonzero(~held.held)), length), settings.most)
    validation = islice(_rows(held.pieces, length), wanted)
    job.say(f"writing {source.name}")
    target = job.target(source, key)
    try:
        target.mkdir(exist_ok=True)
        parts = {
            "train": shards.write_shards(train, target, "train", source.instruct),
            "validation": shards.write_shards(validation, target, "validation", source.instruct),
        }
        index = {
            "format": FORMAT,
            "name": source.name,
            "instruct": source.instruct,
            "fingerprint": key,
            "settings": dataclasses.asdict(settings),
            "dropped": {what: n for what, n in sorted(dropped.items()) if what != ALL},
            **{part: [dataclasses.asdict(one) for one in written] for part, written in parts.items()},
        }
        shards.replace_bytes(target / INDEX, json.dumps(index, indent=1).encode())
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, OSError):
            raise shards.not_written(job.folder, 0, error) from error
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


def _too_few(source: Source, settings: _Settings, spool: Spool, dropped: Counter[str]) -> GraphPruneError:
    if dropped[ALL] and dropped[ALL] == dropped[SHORT]:
        return GraphPruneError(
            f"Source {source.name!r}: all of its {dropped[ALL]:,} paragraphs have at most {settings.shortest} tokens, "
            "and are left out. A paragraph ends at an empty line; lower shortest=, or join the texts."
        )
    lost = ", ".join(f"{n:,} {name}" for name, n in sorted(dropped.items()) if name != ALL and n)
    different = len(set(spool.hashes))
    if source.instruct:
        gives, what = f"{different:,} different examples", "examples"
        remedy = "give more, raise length=, or lower validation="
    else:
        rows = spool.tokens // settings.length
        gives, what = f"{rows:,} rows of {settings.length} tokens, from {different:,} different documents", "documents"
        remedy = "give more documents, cut long ones in several, or lower length=, shortest= or validation="
    return GraphPruneError(
        f"Source {source.name!r} gives {gives}{f' ({lost} are left out)' if lost else ''}. Wanted are "
        f"{settings.validation} to validate with, and as many of other {what} to train on: {remedy}."
    )
