"""Named sources of documents: what a source is, and reading it as a stream."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphprune.data.columns import is_dataset
from graphprune.data.texts import SUFFIXES, contents, is_path, text_of
from graphprune.errors import GraphPruneError

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_READ = 2**20
_LONGEST_PATH = 4096
_TAKES = (
    "a path of a .txt or .jsonl file or of a folder of these, a list of paths, texts or rows, a datasets.Dataset or "
    "IterableDataset, or anything that gives texts or rows one by one"
)


@dataclass(frozen=True, eq=False)
class Source:
    """A named collection of documents.

    Attributes:
        name: letters, digits, ``-``, ``_`` and ``.``, not ``.`` first; the sources of a run have different names.
        data: a path of a ``.txt`` (one document) or ``.jsonl`` file (a document in every row) or of a folder, whose
            files of these kinds are read in sorted order with those of all folders in it; a list of such paths; a list
            of texts; a list of rows (dicts); a ``datasets.Dataset``; or a stream: a ``datasets.IterableDataset`` or
            any other iterable of texts or rows, which is read once and never in memory as a whole.
        instruct: rows are instructions, ``{"instruction", "input", "output"}`` (``input`` may be missing or empty) or
            ``{"messages": [{"role", "content"}, …]}``; otherwise documents are texts or rows with a field ``text``.

    Raises:
        GraphPruneError: for a name of other characters.
    """

    name: str
    data: Any
    instruct: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise GraphPruneError(
                f"The name of a source is made of letters, digits, '-', '_' and '.', not '.' first; not {self.name!r}."
            )


def sources_of(given: Any, instruct: bool = False) -> list[Source]:
    """The sources that a user gives as ``data=`` or, with ``instruct``, as ``instruct=``.

    Args:
        given: a path of a folder with one file (``.txt``, ``.jsonl``) or folder per source, which the source is named
            after, without the suffix; a path of one file (one source); a list of paths (one source each); a dict
            name → data; a :class:`Source` or a list of these, which are taken as they are; anything else that
            :class:`Source` takes as data (one source, named ``"data"`` or ``"instruct"``).
        instruct: whether the sources hold instructions.

    Returns:
        At least one source, all names different.

    Raises:
        GraphPruneError: for what can be no source, missing files, folders without texts, and two sources of one name.
    """
    found = list(_sources_of(given, instruct))
    if not found:
        raise GraphPruneError(f"There is no source in {_kind(given)}: give {_TAKES}.")
    check_names(found)
    return found


def check_names(sources: Sequence[Source]) -> None:
    """Raise :class:`GraphPruneError` when two sources have one name."""
    again = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
    if again:
        raise GraphPruneError(
            f"Several sources are named {', '.join(map(repr, again))}: name them anew, in a dict name → data."
        )


def _sources_of(given: Any, instruct: bool) -> Iterable[Source]:
    default = "instruct" if instruct else "data"
    if isinstance(given, Source):
        return [given]
    if _is_split(given):
        raise GraphPruneError(f"A {type(given).__name__} has several splits: choose one, such as data['train'].")
    if isinstance(given, Mapping):
        return [Source(name, data, instruct) for name, data in given.items()]
    if isinstance(given, (str, Path)):
        path = Path(given)
        return [_named(one, instruct) for one in (_inside(path) if path.is_dir() else [_existing(path)])]
    if isinstance(given, (list, tuple)):
        if any(isinstance(item, Source) for item in given):
            if not all(isinstance(item, Source) for item in given):
                raise GraphPruneError("Among sources are other things: make them a graphprune Source too.")
            return given
        if given and all(map(_is_path, given)):
            return [_named(_existing(Path(item)), instruct) for item in given]
        return [Source(default, given, instruct)] if given else []
    if isinstance(given, Iterable):
        return [Source(default, given, instruct)]
    raise GraphPruneError(f"Sources are {_TAKES}; not {_kind(given)}.")


def _is_split(given: Any) -> bool:
    """Whether this is several splits of a dataset of the library ``datasets``, which is not imported for it."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(given, (library.DatasetDict, library.IterableDatasetDict))


def _is_path(item: Any) -> bool:
    if isinstance(item, str):
        return is_path(item) or ("\n" not in item and len(item) < _LONGEST_PATH and os.path.isdir(item))
    return isinstance(item, Path)


def _named(path: Path, instruct: bool) -> Source:
    """A source named after its path; what a name may not have becomes ``-``."""
    stem = path.stem if path.is_file() else path.resolve().name
    return Source(re.sub(r"[^A-Za-z0-9_.-]|^\.", "-", stem) or "data", path, instruct)


def _inside(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES or (path.is_dir() and _files(path))]
    found = [path for path in found if not path.name.startswith(".")]
    if not found:
        raise GraphPruneError(f"The folder {folder} holds no .txt or .jsonl files.")
    return found


def _existing(path: Path) -> Path:
    if not path.exists():
        raise GraphPruneError(f"There is no file or folder {path}; texts themselves are given as a list.")
    return path


def _files(path: Path) -> list[Path]:
    """The text files of a folder and of those in it, sorted; a file is itself."""
    if not path.is_dir():
        return [_existing(path)]
    inside = (one for one in path.rglob("*") if one.suffix in SUFFIXES and one.is_file())
    return sorted(one for one in inside if not any(part.startswith(".") for part in one.relative_to(path).parts))


# ------------------------------------------------------------------------------------------------------------ reading


def files_of(source: Source) -> list[Path] | None:
    """The files of a source that is given by paths, in the order in which they are read; None of any other source.

    Raises :class:`GraphPruneError` for paths that do not exist and folders without texts.
    """
    data = source.data
    if isinstance(data, (str, Path)):
        data = [data]
    elif not (isinstance(data, (list, tuple)) and data and all(map(_is_path, data))):
        return None
    files = [file for path in data for file in _files(Path(path))]
    if not files:
        raise GraphPruneError(f"Source {source.name!r}: {data[0]} holds no .txt or .jsonl files.")
    return files


def documents(source: Source) -> Iterator[tuple[Any, str]]:
    """Every document, read as it is wanted: a text or, of instructions, a row; with words for where it is.

    Raises :class:`GraphPruneError` naming the file or row that cannot be read, or that has no field ``text``.
    """
    for item, where in _items(source):
        if source.instruct:
            yield item, where
        else:
            yield item if isinstance(item, str) else text_of(item, where), where


def digest(source: Source) -> str | None:
    """The sha256 of what a source holds; None of a stream, which can be read only once.

    That of files is of their bytes and names, of texts, rows and datasets of every document.
    """
    files = files_of(source)
    found = hashlib.sha256()
    if files is not None:
        for path in files:
            found.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
            _add_file(found, path)
    elif isinstance(source.data, (list, tuple)) or (is_dataset(source.data) and hasattr(source.data, "__len__")):
        for item, _ in documents(source):
            add_document(found, item)
    else:
        return None
    return found.hexdigest()


def add_document(found: Any, document: Any) -> None:
    """Add a text or a row to a hash."""
    found.update(json.dumps(document, sort_keys=True, default=repr).encode() + b"\0")


def _add_file(found: Any, path: Path) -> None:
    try:
        with path.open("rb") as file:
            while piece := file.read(_READ):
                found.update(piece)
    except OSError as error:
        raise GraphPruneError(f"{path} cannot be read: {error}") from error


def _items(source: Source) -> Iterator[tuple[Any, str]]:
    files = files_of(source)
    if files is not None:
        for path in files:
            yield from contents(path)
        return
    if isinstance(source.data, Mapping) or not isinstance(source.data, Iterable):
        raise GraphPruneError(f"Source {source.name!r} has {_kind(source.data)} as data; it takes {_TAKES}.")
    for n, item in enumerate(_given(source)):
        if isinstance(item, Path):
            raise GraphPruneError(
                f"Source {source.name!r} mixes paths with other data: make them sources of their own."
            )
        yield item, f"Row {n} of source {source.name!r}"


def _given(source: Source) -> Iterator[Any]:
    """The items of an iterable, whose own code may fail."""
    done = 0
    try:
        for item in source.data:
            yield item
            done += 1
    except GraphPruneError:
        raise
    except Exception as error:  # whatever the code of the user raises
        what = f"{type(error).__name__}: {error}"
        raise GraphPruneError(f"Source {source.name!r} failed after {done} documents: {what}") from error


def _kind(given: Any) -> str:
    return f"an empty {type(given).__name__}" if isinstance(given, (list, tuple, dict)) else type(given).__name__
