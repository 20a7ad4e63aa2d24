"""Whatever a user gives, it becomes sources with names, and their documents are read one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from graphprune import GraphPruneError
from graphprune.data.sources import Source, digest, documents, sources_of


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def read(source: Source) -> list[Any]:
    return [document for document, _ in documents(source)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, a folder with files at two levels, and what is no text."""
    write(tmp_path / "corpora/c4.jsonl", {"text": "one"}, {"text": "two"})
    write(tmp_path / "corpora/books/b.jsonl", {"text": "four"})
    write(tmp_path / "corpora/books/a/z.jsonl", {"text": "three"})
    write(tmp_path / "corpora/books/.hidden.jsonl", {"text": "hidden"})
    write(tmp_path / "corpora/empty/readme.md")
    (tmp_path / "corpora/wiki.en.txt").write_text("five\n\nsix", encoding="utf-8")
    return tmp_path / "corpora"


# ------------------------------------------------------------------------------------------------------------- sources


def test_a_folder_has_a_source_in_each_file_and_folder(folder: Path) -> None:
    found = sources_of(folder)
    assert {source.name: read(source) for source in found} == {
        "books": ["three", "four"],
        "c4": ["one", "two"],
        "wiki.en": ["five\n\nsix"],
    }
    assert [source.name for source in sources_of(str(folder))] == [source.name for source in found]


def test_paths_are_sources_of_their_own(folder: Path) -> None:
    paths = [folder / "wiki.en.txt", str(folder / "c4.jsonl"), str(folder / "books")]
    assert [source.name for source in sources_of(paths)] == ["wiki.en", "c4", "books"]
    assert [read(source) for source in sources_of(folder / "c4.jsonl")] == [["one", "two"]]


def test_names_from_paths_have_no_odd_characters(tmp_path: Path) -> None:
    assert [s.name for s in sources_of([write(tmp_path / "my corpus (2).jsonl", {"text": "x"})])] == ["my-corpus--2-"]


def test_all_else_is_one_source_or_named() -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    ways: list[Any] = [
        ["one", "two"],
        rows,
        (row for row in rows),
        datasets.Dataset.from_list(rows),
        datasets.Dataset.from_list(rows).to_iterable_dataset(),
    ]
    for way in ways:
        (source,) = sources_of(way)
        assert (source.name, source.instruct, read(source)) == ("data", False, ["one", "two"])
    (source,) = sources_of([{"instruction": "a", "output": "b"}], instruct=True)
    assert (source.name, source.instruct) == ("instruct", True)
    named = sources_of({"a": ["one"], "b": ["two"]}, instruct=True)
    assert [(source.name, source.data, source.instruct) for source in named] == [
        ("a", ["one"], True),
        ("b", ["two"], True),
    ]
    given = [Source("x", ["one"]), Source("y", [], True)]
    assert sources_of(given) == given
    assert sources_of(given[0], instruct=True) == [given[0]]


def test_a_text_that_ends_like_a_path_is_a_text() -> None:
    texts = ["See what is in\nnotes.txt", "y" * 5000]
    assert [read(source) for source in sources_of(texts)] == [texts]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "no source in an empty list"),
        ({}, "no source in an empty dict"),
        (3, "not int"),
        ("missing.jsonl", "no file or folder missing.jsonl"),
        ([Path("missing.jsonl")], "no file or folder missing.jsonl"),
        ({"../up": ["x"]}, "made of letters, digits"),
        ({".hidden": ["x"]}, "made of letters, digits"),
        ([Source("a", ["x"]), Source("a", ["y"])], "Several sources are named 'a'"),
        ([Source("a", ["x"]), ["y"]], "Among sources"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "x"}])}), "several splits"),
    ],
)
def test_what_is_no_source(given: Any, says: str) -> None:
    with pytest.raises(GraphPruneError, match=says):
        sources_of(given)


def test_two_files_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "c4.txt").write_text("x")
    write(tmp_path / "c4.jsonl", {"text": "x"})
    with pytest.raises(GraphPruneError, match="named 'c4'"):
        sources_of(tmp_path)


def test_a_folder_without_texts(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match=r"holds no \.txt or \.jsonl"):
        sources_of(tmp_path)
    with pytest.raises(GraphPruneError, match=r"'a': .* holds no \.txt or \.jsonl"):
        read(Source("a", tmp_path))


# ----------------------------------------------------------------------------------------------------------- documents


def test_rows_without_the_field_are_named(tmp_path: Path) -> None:
    rows = [{"text": "x"}, {"content": "y", "id": 3}]
    with pytest.raises(GraphPruneError, match=r"a\.jsonl, row 2 has no field 'text'; it has: content, id"):
        read(Source("a", write(tmp_path / "a.jsonl", *rows)))
    with pytest.raises(GraphPruneError, match="Row 1 of source 'a' has no field 'text'; it has: content, id"):
        read(Source("a", iter(rows)))
    with pytest.raises(GraphPruneError, match="Row 0 of source 'a': the field 'text' is NoneType"):
        read(Source("a", [{"text": None}]))
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(GraphPruneError, match=r"b\.jsonl, row 2 is no JSON"):
        read(Source("b", tmp_path / "b.jsonl"))


@pytest.mark.parametrize("data", [3, {"text": "x"}, None])
def test_data_of_a_wrong_type(data: Any) -> None:
    with pytest.raises(GraphPruneError, match=r"Source 'a' has .* as data; it takes"):
        read(Source("a", data))


def test_paths_among_texts() -> None:
    with pytest.raises(GraphPruneError, match="mixes paths"):
        read(Source("a", ["a text", Path("b.jsonl")]))


def test_a_stream_is_read_as_it_is_wanted_and_may_fail() -> None:
    read_so_far = []

    def stream() -> Iterator[str]:
        for n in range(3):
            read_so_far.append(n)
            yield f"text {n}"
        raise ConnectionError("gone")

    found = documents(Source("a", stream()))
    assert next(found)[0] == "text 0"
    assert read_so_far == [0]
    with pytest.raises(GraphPruneError, match="'a' failed after 3 documents: ConnectionError: gone"):
        list(found)


# -------------------------------------------------------------------------------------------------------------- digest


def test_digests_follow_the_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "one"})
    before = digest(Source("a", path))
    assert before == digest(Source("b", [path]))
    write(path, {"text": "two"})  # as many bytes, perhaps at the same time
    assert digest(Source("a", path)) not in (None, before)

    texts = digest(Source("a", ["one", "two"]))
    rows = [{"text": "one"}, {"text": "two"}]
    assert texts == digest(Source("a", rows)) == digest(Source("a", datasets.Dataset.from_list(rows)))
    assert texts != digest(Source("a", ["one", "too"]))
    assert texts != digest(Source("a", ["onetwo"]))


def test_streams_have_no_digest_and_are_not_read_for_one() -> None:
    stream = iter(["one"])
    assert digest(Source("a", stream)) is None
    assert next(stream) == "one"
    rows = datasets.Dataset.from_list([{"text": "one"}]).to_iterable_dataset()
    assert digest(Source("a", rows)) is None
