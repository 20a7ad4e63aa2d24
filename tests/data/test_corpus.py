"""Corpora are prepared once and whole, hold out what they validate with, and are checked when they are opened."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from graphprune import GraphPruneError
from graphprune.data import corpus as corpora
from graphprune.data import shards
from graphprune.data.corpus import Corpus, Rows, open_corpus, prepare
from graphprune.data.sources import Source, sources_of

WORDS = 4000
END = WORDS
ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(os.environ.get("GRAPHPRUNE_TEST_MODEL", ROOT / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"))
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}<end> {% endif %}{% endfor %}"


@cache
def words(template: str | None = None, end: str | None = "<end>") -> Any:
    """A tokenizer in which the word wN is token N, and EOS is token 4000."""
    backend = Tokenizer(WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)
    tokenizer.chat_template = template
    return tokenizer


def text(first: int, size: int) -> str:
    return " ".join(f"w{n}" for n in range(first, first + size))


def own_words(sizes: Iterable[int]) -> list[str]:
    """Documents of so many words each, no word of which is in another document."""
    first, found = 0, []
    for size in sizes:
        found.append(text(first, size))
        first += size
    assert first <= WORDS
    return found


def made(data: Any, folder: Path, *, instruct: bool = False, tokenizer: Any = None, **options: Any) -> Corpus:
    settings = {"length": 8, "validation": 4, "shortest": 2} | options
    (found,) = prepare(
        [Source("toy", data, instruct)], tokenizer or words(TEMPLATE if instruct else None), folder, **settings
    )
    return found


def tokens(rows: Rows) -> list[list[int]]:
    return [rows[n]["input_ids"].tolist() for n in range(len(rows))]


def flat(rows: Rows) -> list[int]:
    return [token for row in tokens(rows) for token in row]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


TEXTS = own_words([20] * 60)
INSTRUCTIONS = [
    {"instruction": text(20 * n, 3), "input": text(20 * n + 3, 2), "output": text(20 * n + 5, 1 + n % 9)}
    for n in range(100)
]


# ------------------------------------------------------------------------------------------------------------- packing


def test_documents_are_joined_with_eos_and_cut_into_rows(tmp_path: Path) -> None:
    found = made(TEXTS, tmp_path)
    held = {token // 20 for token in flat(found.validation) if token != END}
    stream = [t for n in range(60) if n not in held for t in [*range(20 * n, 20 * n + 20), END]]
    assert tokens(found.train) == [stream[at : at + 8] for at in range(0, len(stream) - 7, 8)]
    row = found.train[0]
    assert (row["input_ids"].dtype, row["labels"].dtype) == (torch.int64, torch.int64)
    assert torch.equal(row["input_ids"], row["labels"])
    assert found.train.tokens == 8 * len(found.train)
    assert found.validation.tokens == 8 * 4
    assert (found.name, found.instruct) == ("toy", False)


def test_a_tokenizer_without_eos(tmp_path: Path) -> None:
    assert END not in flat(made(TEXTS, tmp_path, tokenizer=words(end=None)).train)


def test_short_paragraphs_are_left_out(tmp_path: Path) -> None:
    """A paragraph ends at an empty line, on any system; one of just ``shortest`` tokens is short."""
    odd = f"w3001 w3002\n \t\n{text(3100, 3)}\nw3103\r\n\r\n\r\nw3003\r\r{text(3200, 3)}\x00\ud83d\n\n"
    found = made([odd, *TEXTS], tmp_path, validation=1)
    stream = flat(found.train)
    assert not {3001, 3002, 3003} & {*stream}
    at = stream.index(3100)
    assert stream[at : at + 7] == [*range(3100, 3104), *range(3200, 3203)]
    assert found.dropped == {"short paragraphs": 2}


@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=40),
    length=st.integers(2, 17),
    validation=st.integers(1, 6),
    seed=st.integers(0, 5),
)
def test_nothing_that_is_validated_is_trained_on(
    sizes: list[int], length: int, validation: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    texts = own_words(sizes)
    folder = tmp_path_factory.mktemp("corpus")
    options = {"length": length, "validation": validation, "shortest": 0, "seed": seed}
    try:
        found = made(texts, folder, **options)
    except GraphPruneError as error:
        if "documents to train on" not in str(error):
            raise
        return
    owner = [n for n, size in enumerate(sizes) for _ in range(size)]
    train, held = ({owner[t] for t in flat(rows) if t != END} for rows in (found.train, found.validation))
    assert not train & held
    assert len(found.validation) == validation <= len(found.train)
    assert {len(row) for row in tokens(found.train) + tokens(found.validation)} == {length}
    kept = [t for t in flat(found.train) if t != END]
    assert kept == sorted(kept)
    everything = [t for n, size in enumerate(sizes) if n in train for t in range(sum(sizes[:n]), sum(sizes[: n + 1]))]
    assert kept == everything[: len(kept)]


def test_what_can_be_halved_is(tmp_path: Path) -> None:
    """Eight documents of one row each give four rows for each purpose, and not five."""
    texts = own_words([7] * 8)
    assert len(made(texts, tmp_path).train) == 4
    with pytest.raises(GraphPruneError, match="'toy' gives 8 rows of 8 tokens, from 8 different documents"):
        made(texts, tmp_path, validation=5)


def test_long_documents_do_not_eat_the_source(tmp_path: Path) -> None:
    """Nineteen long documents lose at most an eighth; of many short ones, each gives a row at most."""
    found = made(own_words([200] * 19), tmp_path, validation=8)
    held = {t // 200 for t in flat(found.validation) if t != END}
    assert len(held) == 2
    assert len(found.train) >= 19 * 201 * 7 // 8 // 8
    found = made(own_words([20] * 200), tmp_path, validation=8)
    assert len({t // 20 for t in flat(found.validation) if t != END}) == 8


def test_what_is_held_out_is_a_uniform_sample(tmp_path: Path) -> None:
    """Every document is held out as often as another, wherever it comes in the source."""
    times = [0] * 60
    for seed in range(60):
        found = made(TEXTS, tmp_path, seed=seed)
        for n in {t // 20 for t in flat(found.validation) if t != END}:
            times[n] += 1
    assert sum(times) == 60 * 4
    assert max(times) <= 12  # 4 on average
    assert 60 <= sum(times[:30]) <= 180


def test_a_document_that_comes_again_is_held_out_each_time(tmp_path: Path) -> None:
    found = made(own_words([20] * 30) * 2, tmp_path)
    assert not {*flat(found.train)} & {*flat(found.validation)} - {END}
    rows = [{"instruction": f"w{n}", "output": f"w{n}"} for n in range(30)] * 2
    found = made(rows, tmp_path, instruct=True)
    assert not {*flat(found.train)} & {*flat(found.validation)} - {END}
    assert (len(found.train), len(found.validation)) == (52, 4)


def test_copies_count_in_what_is_held_out(tmp_path: Path) -> None:
    """One document that is most of the source, page by page, is not held out if training could not do without it."""
    common, *others = own_words([31] * 9)
    for seed in range(20):
        found = made([common] * 20 + others, tmp_path, validation=2, seed=seed)
        assert not {*range(31)} & {*flat(found.validation)}
        assert len(found.train) >= 4 * 20


@pytest.mark.parametrize("most", [32, 100, 333])
def test_most(most: int, tmp_path: Path) -> None:
    whole, part = made(TEXTS, tmp_path), made(TEXTS, tmp_path, most=most)
    assert len(part.train) == most // 8 < len(whole.train)
    part = made(INSTRUCTIONS, tmp_path, instruct=True, most=most)
    assert most - 8 < len(flat(part.train)) <= most


def test_most_reads_a_stream_no_further_than_it_must(tmp_path: Path) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            yield text(read % 3900, 20)
            read += 1

    assert len(made(endless(), tmp_path, most=8000).train) == 1000
    assert read < 600


# -------------------------------------------------------------------------------------------------------- instructions


def test_an_example_is_a_row_and_its_answer_is_what_counts(tmp_path: Path) -> None:
    found = made(INSTRUCTIONS, tmp_path, instruct=True, length=16)
    seen = set()
    for rows in (found.train, found.validation):
        for n in range(len(rows)):
            ids, labels = rows[n]["input_ids"].tolist(), rows[n]["labels"].tolist()
            first = ids[0]
            asked, answer = [*range(first, first + 5)], [*range(first + 5, first + 6 + first // 20 % 9), END]
            assert (ids, labels) == (asked + answer, [-100] * 5 + answer)
            seen.add(first // 20)
    assert seen == {*range(100)}
    assert len(found.validation) == 4
    answers = [n % 9 + 2 for n in range(100)]
    assert found.train.tokens + found.validation.tokens == sum(answers)
    assert found.instruct


def test_rows_are_cut_at_the_end_and_dropped_without_an_answer(tmp_path: Path) -> None:
    rows = [*INSTRUCTIONS, {"instruction": text(3000, 8), "output": "w1"}, {"instruction": text(3000, 1), "output": ""}]
    found = made(rows, tmp_path, instruct=True)
    assert max(map(len, tokens(found.train))) == 8
    assert 3000 not in flat(found.train) + flat(found.validation)
    assert found.dropped == {"rows whose answer is cut off": 1, "rows without an answer": 1}
    assert made(rows, tmp_path, instruct=True).dropped == found.dropped


def test_too_few_examples(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match=r"'toy' gives 7 different examples\. Wanted are 4 .* lower validation="):
        made(INSTRUCTIONS[:7], tmp_path, instruct=True)
    assert len(made(INSTRUCTIONS[:8], tmp_path, instruct=True).train) == 4


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("data", [[], iter([]), datasets.Dataset.from_dict({"text": []})])
def test_empty_sources(data: Any, tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match="'toy' is empty"):
        made(data, tmp_path)
    assert [*contents(tmp_path)] in ([], [".lock"])


def test_too_few_rows_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match=r"'toy' gives 5 rows .*\(1 short paragraphs are left out\).*documents"):
        made([*TEXTS[:2], "w1"], tmp_path)
    assert [*contents(tmp_path)] in ([], [".lock"])


def test_only_short_paragraphs(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match=r"all of its 60 paragraphs have at most 20 tokens.*lower shortest="):
        made(TEXTS, tmp_path, shortest=20)


def test_bad_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match="Row 60 of source 'toy' has no field 'text'; it has: body"):
        made([*({"text": one} for one in TEXTS), {"body": "x"}], tmp_path)
    with pytest.raises(GraphPruneError, match=r"Row 1 of source 'toy' has neither 'instruction'.*it has: text"):
        made(iter([INSTRUCTIONS[0], {"text": "x"}]), tmp_path, instruct=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 1}, "length= is an integer of at least 2"),
        ({"validation": 0}, "validation= is an integer of at least 1"),
        ({"shortest": -1}, "shortest= is an integer"),
        ({"shortest": True}, "shortest= is an integer"),
        ({"most": 31}, "most= is an integer of at least 32: training needs as many rows"),
        ({"seed": 0.5}, "seed= is an integer"),
        ({"tokenizer": lambda one: one}, "this function does not"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match=says):
        made(TEXTS, tmp_path, **options)


def test_names_are_different(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match="named 'toy'"):
        prepare([Source("toy", TEXTS), Source("toy", TEXTS)], words(), tmp_path)
    with pytest.raises(GraphPruneError, match="not str"):
        prepare(TEXTS, words(), tmp_path)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(GraphPruneError, match=r"could not be written to .*file"):
        made(TEXTS, tmp_path / "file")


# ------------------------------------------------------------------------------------------------------------- keeping


def no_tokenising(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(corpora, "_read", refuse)


def test_what_is_prepared_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": one}) for one in TEXTS))
    said: list[str] = []
    first = made(path, tmp_path / "corpora", progress=said.append)
    assert "tokenising toy: 60 documents, 1,260 tokens" in said
    before = contents(tmp_path / "corpora")
    words(None).pad_token = "w0"
    words(None)(["w1", "w1 w2"], padding=True)  # leaves its mark in the tokenizer, but changes no tokens
    no_tokenising(monkeypatch)
    again = made(path, tmp_path / "corpora")
    assert (again.fingerprint, tokens(again.train)) == (first.fingerprint, tokens(first.train))
    assert tokens(open_corpus(next((tmp_path / "corpora").glob("toy-*"))).train) == tokens(first.train)
    assert contents(tmp_path / "corpora") == before


@pytest.mark.parametrize("instruct", [False, True])
def test_other_settings_data_and_tokenizers_are_prepared_beside_it(instruct: bool, tmp_path: Path) -> None:
    data = INSTRUCTIONS if instruct else TEXTS
    ways: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"length": 9},
        {"validation": 5},
        {"most": 64},
        {"tokenizer": words(TEMPLATE if instruct else None, end=None)},
        {"tokenizer": words("{# another #}" + TEMPLATE)},
    ]
    found = {made(data, tmp_path, instruct=instruct, **way).fingerprint for way in ways}
    found |= {made(data[1:], tmp_path, instruct=instruct).fingerprint}
    assert len(found) == len(ways) + 1 == len([*tmp_path.glob("toy-*")])
    assert all(int(one, 16) for one in found)
    assert (made(data, tmp_path, instruct=instruct, shortest=3).fingerprint in found) is instruct


@pytest.mark.parametrize("instruct", [False, True])
def test_every_way_to_give_data_gives_the_same_shards(instruct: bool, tmp_path: Path) -> None:
    rows = INSTRUCTIONS if instruct else [{"text": one} for one in TEXTS]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    table = datasets.Dataset.from_list(rows)
    ways: list[Any] = [rows, rows, path, table, table.to_iterable_dataset(), iter(rows)]
    found = []
    for n, way in enumerate(ways):
        made(way, tmp_path / str(n), instruct=instruct)
        found.append({Path(k).name: v for k, v in contents(tmp_path / str(n)).items() if k.endswith(".safetensors")})
    assert all(one == found[0] for one in found)
    assert {*found[0]} == {"train-00000.safetensors", "validation-00000.safetensors"}
    assert contents(tmp_path / "0") == contents(tmp_path / "1")


def test_streams_are_read_each_time_and_prepared_once(tmp_path: Path) -> None:
    first = made(iter(TEXTS), tmp_path)
    before = contents(tmp_path)
    assert made(iter(TEXTS), tmp_path).fingerprint == first.fingerprint
    assert contents(tmp_path) == before
    assert made(iter(TEXTS[1:]), tmp_path).fingerprint != first.fingerprint
    assert not [*tmp_path.glob(".*.partial")]


def test_several_shards_are_one_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made(INSTRUCTIONS, tmp_path / "one", instruct=True, length=16)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 50)
    parts = made(INSTRUCTIONS, tmp_path / "many", instruct=True, length=16)
    assert len(parts.train.shards) > 10
    assert all(shard.written.tokens <= 50 for shard in parts.train.shards)
    assert tokens(parts.train) == tokens(whole.train)
    assert parts.train.tokens == whole.train.tokens
    assert torch.equal(parts.train[-1]["labels"], whole.train[len(whole.train) - 1]["labels"])
    for index in (len(parts.train), -len(parts.train) - 1):
        with pytest.raises(IndexError):
            parts.train[index]


def test_rows_go_to_other_processes(tmp_path: Path) -> None:
    rows = made(TEXTS, tmp_path).train
    assert rows[3]["input_ids"].tolist() == tokens(rows)[3]  # open already
    copied = pickle.dumps(rows)
    assert len(copied) < 2000
    assert tokens(pickle.loads(copied)) == tokens(rows)  # noqa: S301
    loader = DataLoader(rows, batch_size=5, num_workers=1)  # type: ignore[arg-type]
    assert torch.cat([batch["input_ids"] for batch in loader]).tolist() == tokens(rows)


# ------------------------------------------------------------------------------------------------------------- damage

# The imports are what takes time: done once, before a process is forked off for each of the moments to be killed at.
SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from graphprune.data import shards
from test_corpus import INSTRUCTIONS, TEXTS, made
shards.SHARD_TOKENS = 300
write = shards.write
def dying(file, data):
    global left
    left -= 1
    write(file, data[: len(data) // 2] if left < 0 else data)
    if left < 0:
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
shards.write = dying
for left in {moments}:
    if not os.fork():
        made(TEXTS, Path({folder!r}, str(left)))
        os._exit(0)
    print(-os.waitstatus_to_exitcode(os.wait()[1]))
"""
MOMENTS = [30, 61, 64, 65]  # in the spool, in a shard, in the last one, in the index


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of the moments leaves behind, in a folder of its name."""
    folder, paths = tmp_path_factory.mktemp("killed"), [str(ROOT), str(Path(__file__).parent)]
    script = SCRIPT.format(paths=paths, moments=MOMENTS, folder=str(folder))
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}  # whose threads no fork has
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * len(MOMENTS), done.stderr
    return folder


@pytest.mark.parametrize("left", MOMENTS)
def test_killed_while_preparing(left: int, killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 300)
    made(TEXTS, tmp_path / "whole")
    shutil.copytree(killed / str(left), tmp_path / "killed")
    assert any(name.endswith(".partial") for name in contents(tmp_path / "killed"))
    assert not [*tmp_path.glob("killed/*/index.json")]
    made(TEXTS[:-1], tmp_path / "killed")  # of other data, removes what was left
    assert {name.partition("/")[2] for name in contents(tmp_path / "killed")} == {
        name.partition("/")[2] for name in contents(tmp_path / "whole")
    }
    made(TEXTS, tmp_path / "killed")
    found = contents(tmp_path / "killed")
    assert {name: found[name] for name in contents(tmp_path / "whole")} == contents(tmp_path / "whole")


@pytest.mark.parametrize("left", [0, 30, 60, 61, 62])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk(left: int, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(TEXTS[1:], tmp_path)
    before = contents(tmp_path)
    write = shards.write

    def full(file: Any, data: bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            write(file, data[:5])
            raise OSError(number, os.strerror(number))
        write(file, data)

    monkeypatch.setattr(shards, "write", full)
    with pytest.raises(GraphPruneError, match=rf"[1-9][\d,]* bytes could not be written to {tmp_path}.*make room"):
        made(TEXTS, tmp_path)
    assert contents(tmp_path) == before


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = json.loads((folder / "index.json").read_text())
        change(data)
        (folder / "index.json").write_text(json.dumps(data))

    return damage


def flipped(folder: Path) -> None:
    path = folder / "train-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncated(folder: Path) -> None:
    path = folder / "train-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def shuffled_offsets(folder: Path) -> None:
    """A shard that is what the index says, and still nonsense."""
    from safetensors.numpy import load_file, save

    path = folder / "train-00000.safetensors"
    tensors = load_file(path)
    tensors["offsets"][[1, 2]] = tensors["offsets"][[2, 1]]
    path.write_bytes(save(tensors))
    edited(lambda data: data["train"][0].update(sha256=shards.sha256_of(path)))(folder)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flipped, r"train-00000\.safetensors is damaged: its sha256"),
        (truncated, r"train-00000\.safetensors is damaged: it has [\d,]+ bytes instead of"),
        (shuffled_offsets, r"train-00000\.safetensors is damaged: its rows do not follow"),
        (
            lambda folder: (folder / "train-00000.safetensors").unlink(),
            r"train-00000\.safetensors is damaged: .*No such",
        ),
        (lambda folder: (folder / "index.json").write_text("{"), r"index\.json is damaged, it is not JSON"),
        (lambda folder: (folder / "index.json").write_text("[]"), r"index\.json is damaged"),
        (edited(lambda data: data.pop("train")), r"index\.json is damaged: 'train' is missing"),
        (edited(lambda data: data.update(train=3)), r"index\.json: train is damaged: expected list"),
        (edited(lambda data: data.update(train=[3])), r"index\.json is damaged: expected dict"),
        (edited(lambda data: data["train"][0].pop("rows")), "'rows' is missing"),
        (edited(lambda data: data["train"][0].update(rows="9")), "rows is damaged: expected int"),
        (edited(lambda data: data["train"][0].update(rows=9)), r"train-00000\.safetensors is damaged: it holds"),
        (edited(lambda data: data["train"][0].update(file="../x.safetensors")), r"'\.\./x\.safetensors' is no name"),
        (edited(lambda data: data["train"][0].update(file="/etc/passwd")), "'/etc/passwd' is no name of a shard"),
        (edited(lambda data: data.update(fingerprint="0")), "is of something else"),
    ],
)
def test_damaged_files_are_named(damage: Callable[[Path], Any], says: str, tmp_path: Path) -> None:
    made(TEXTS, tmp_path)
    (folder,) = tmp_path.glob("toy-*")
    damage(folder)
    with pytest.raises(GraphPruneError, match=f"{says}.*Delete the folder {folder} to prepare it anew"):
        made(TEXTS, tmp_path)


def test_an_index_of_another_format(tmp_path: Path) -> None:
    made(TEXTS, tmp_path)
    (folder,) = tmp_path.glob("toy-*")
    edited(lambda data: data.update(format=2))(folder)
    with pytest.raises(GraphPruneError, match="of format 2, not 1"):
        open_corpus(folder)


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    mine = tmp_path / f"notes-{'0' * 20}" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("x")
    made(TEXTS, tmp_path)
    assert mine.exists()


# ----------------------------------------------------------------------------------------------------------- a real one


def test_a_real_tokenizer(tmp_path: Path) -> None:
    if not MODEL.is_file():
        pytest.fail(f"{MODEL} is missing: `make test` fetches it")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL.parent, gguf_file=MODEL.name)
    drawn = random.Random(0)
    texts = [
        "\n\n".join(" ".join(drawn.choices(["the", "cat", "sat", "on", "a", "warm", "mat"], k=90)) for _ in range(2))
        for _ in range(20)
    ]
    rows = [{"instruction": f"Add {n} and {n}.", "output": f"{n} + {n} = {2 * n}"} for n in range(20)]
    sources = sources_of({"cats": [*texts, "short"]}) + sources_of({"sums": rows}, instruct=True)
    cats, sums = prepare(sources, tokenizer, tmp_path, length=64, validation=3)
    assert cats.dropped == {"short paragraphs": 1}
    assert tokenizer.decode(cats.train[0]["input_ids"]) in (text[:300] for text in texts) or any(
        text.startswith(tokenizer.decode(cats.train[0]["input_ids"])) for text in texts
    )
    row = sums.train[0]
    whole, answer = (tokenizer.decode(ids) for ids in (row["input_ids"], row["labels"][row["labels"] != -100]))
    n = int(answer.split()[0])
    assert answer == f"{n} + {n} = {2 * n}<|im_end|>"
    assert whole.endswith(f"<|im_start|>user\nAdd {n} and {n}.<|im_end|>\n<|im_start|>assistant\n{answer}")
