"""Whatever ``data=`` is, what runs through the model are rows of it; what cannot be used is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers import X, analyse, toy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import graphprune
from graphprune import GraphPruneError
from graphprune.data.calibration import calibration_batches
from graphprune.data.texts import read_texts, token_rows
from graphprune.ir.program import Options, Program
from graphprune.passes import run_passes
from graphprune.passes.score import score_by

TEXT = "The quick brown fox jumps over the lazy dog. " * 3
LETTERS = 128


def letters(text: str, **_: Any) -> dict[str, list[int]]:
    """A tokenizer: one token for each letter."""
    return {"input_ids": [ord(letter) for letter in text]}


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=LETTERS
    )
    return LlamaForCausalLM(config).eval()


class Reader(nn.Module):
    """Reads tokens, and names no other argument."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(LETTERS, 7), nn.Linear(7, 10), nn.Linear(10, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.down(self.up(self.table(input_ids)).relu())


EXAMPLE = {"input_ids": torch.arange(10).view(2, 5)}


@cache
def traced(make: Callable[[], nn.Module]) -> Program:
    return analyse(make(), {"toy": X}.get(make.__name__, EXAMPLE))


def batches(data: Any, make: Callable[[], nn.Module] = Reader, **options: Any) -> list[dict[str, Any]]:
    wanted = Options(data=data, **({"tokenizer": letters, "samples": 6, "length": 8} | options))
    return calibration_batches(replace(traced(make), options=wanted))


def rows(data: Any, **options: Any) -> Tensor:
    return torch.cat([batch["input_ids"] for batch in batches(data, **options)])


def spelled(tokens: Tensor) -> list[str]:
    return ["".join(map(chr, row)) for row in tokens.tolist()]


def write(path: Path, *texts: Any) -> Path:
    lines = [text if isinstance(text, str) else json.dumps(text) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------- texts and tokens


def test_rows_are_pieces_of_the_joined_texts() -> None:
    found = spelled(rows([TEXT[:60], TEXT[60:]]))
    assert len(found) == 6
    assert {len(row) for row in found} == {8}
    assert all(row in TEXT for row in found)
    assert len(set(found)) > 3


def test_draws_follow_the_seed_and_no_generator_is_touched() -> None:
    state = torch.get_rng_state()
    same = [rows(TEXT, seed=3), rows([TEXT], seed=3)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], rows(TEXT, seed=4))
    loader = DataLoader(TensorDataset(torch.arange(120).view(12, 10)), batch_size=3, shuffle=True)
    assert torch.equal(rows(loader, seed=3), rows(loader, seed=3))
    assert not torch.equal(rows(loader, seed=3), rows(loader, seed=4))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_way_to_give_a_text_gives_the_same_rows(tmp_path: Path) -> None:
    txt = write(tmp_path / "a.txt", TEXT)
    halves = [{"text": TEXT[:50], "source": "x"}, {"text": TEXT[50:]}]
    jsonl = write(tmp_path / "b.jsonl", *halves)
    expected = rows(TEXT)
    stream = torch.tensor(letters(TEXT)["input_ids"])
    ways: list[Any] = [
        txt,
        str(txt),
        [txt],
        jsonl,
        [str(jsonl)],
        halves,
        (half["text"] for half in halves),
        datasets.Dataset.from_list([{"text": h["text"]} for h in halves]),
        datasets.Dataset.from_list([{"text": h["text"]} for h in halves]).to_iterable_dataset(),
        stream,
        stream.int(),
        [stream[:50], stream[50:]],
        [stream[:50].tolist(), stream[50:].tolist()],
        datasets.Dataset.from_list([{"input_ids": stream[:50].tolist()}, {"input_ids": stream[50:].tolist()}]),
    ]
    for way in ways:
        assert torch.equal(rows(way), expected), way


def test_a_text_may_mention_a_file(tmp_path: Path) -> None:
    text = "what is in notes.txt\nis not read, though the text ends in notes.txt"
    assert all(row in text for row in spelled(rows(text)))


def test_of_many_texts_random_ones_are_read() -> None:
    texts = [f"<{n:06}>" for n in range(10_000)]
    read: list[str] = []

    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        read.append(text)
        return letters(text)

    token_rows(texts, tokenizer, samples=4, length=10, seed=0)
    assert len(read) == 4 * 10 * 16 // 8
    assert len(set(read)) == len(read)
    assert max(read) > "<005000>"


def test_progress_is_told() -> None:
    program = analyse(Reader(), EXAMPLE, data=[TEXT] * 150, tokenizer=letters, samples=4, length=8)
    told: list[str] = []
    program.progress = told.append
    calibration_batches(program)
    assert told == ["tokenising calibration texts: 0 of 150", "tokenising calibration texts: 100 of 150"]


def test_padding_of_a_dataset_is_left_out() -> None:
    ids = torch.arange(1, 41).view(4, 10)
    table = {
        "input_ids": torch.cat([ids, torch.zeros_like(ids)], 1).tolist(),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1).tolist(),
    }
    assert torch.equal(rows(datasets.Dataset.from_dict(table), make=llama), rows(ids.flatten()))


# ---------------------------------------------------------------------------------------------------------- batches


def test_rows_of_tokens_stay_as_they_are() -> None:
    tokens = torch.arange(90).view(9, 10)
    assert torch.equal(rows(tokens), tokens)
    assert torch.equal(rows([tokens[:5], tokens[5:]]), tokens)


def test_an_encoder_and_its_decoder_read_the_same() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, vocab_size=LETTERS)).eval()
    options = {"tokenizer": letters, "samples": 6, "length": 8}
    program = analyse(model, data=TEXT, method="wanda-sp", **options)
    run_passes(program, (score_by("wanda-sp"),))
    assert all(torch.equal(batch["decoder_input_ids"], batch["input_ids"]) for batch in program.need("batches"))
    assert program.need("scores")


def test_a_loader_is_read_until_it_gave_enough() -> None:
    read: list[int] = []

    def endless() -> Iterator[dict[str, Tensor]]:
        for n in range(1000):
            read.append(n)
            yield {"input_ids": torch.full((4, 3), n % LETTERS)}

    assert len(rows(endless())) == 8  # 6 are wanted, and they come by four
    assert read == [0, 1]


def test_an_iterator_serves_every_pass() -> None:
    program = analyse(Reader(), EXAMPLE, data=iter([{"input_ids": torch.ones(2, 3).long()}]))
    assert calibration_batches(program) is calibration_batches(program)
    program.batches = None
    assert len(calibration_batches(program)) == 1


def test_labels_behind_the_inputs_are_left_out() -> None:
    x = torch.randn(8, 5, 7)
    loader = DataLoader(TensorDataset(x, torch.zeros(8)), batch_size=4)
    found = batches(loader, toy)
    assert [list(batch) for batch in found] == [["x"], ["x"]]
    assert torch.equal(torch.cat([batch["x"] for batch in found]), x)


def test_columns_that_forward_takes() -> None:
    table = datasets.Dataset.from_dict({"x": torch.randn(9, 5, 7).tolist(), "label": list(range(9))})
    found = batches(table, toy)
    assert [tuple(batch["x"].shape) for batch in found] == [(4, 5, 7), (2, 5, 7)]
    given = {tuple(row) for row in torch.tensor(table["x"][:]).flatten(1).tolist()}
    drawn = [tuple(row) for batch in found for row in batch["x"].flatten(1).tolist()]
    assert len(set(drawn)) == 6
    assert set(drawn) <= given


def test_columns_of_several_shapes() -> None:
    table = datasets.Dataset.from_dict({"x": [torch.randn(n, 7).tolist() for n in (5, 5, 4, 3)]})
    found = batches(table, toy)
    assert sorted(row.shape[0] for batch in found for row in batch["x"]) == [3, 4, 5, 5]


def test_pruning_with_every_kind() -> None:
    model = llama()
    stream = torch.tensor(letters(TEXT)["input_ids"])
    table = datasets.Dataset.from_dict({"text": [TEXT, TEXT]})
    for data in (TEXT, stream, stream[:40].view(4, 10), DataLoader(stream[:40].view(4, 10), 2), table):
        pruned = graphprune.compile(
            model, 0.1, method="wanda-sp", data=data, tokenizer=letters, samples=4, length=8, include=["*.mlp"]
        )
        assert graphprune.report(pruned).oracle_error <= 1e-4


# ---------------------------------------------------------------------------------------------------------- refusals


def broken() -> Iterator[Tensor]:
    yield torch.zeros(1, 3).long()
    raise OSError("the disk is gone")


REFUSED: dict[str, tuple[Any, str]] = {
    "a number": (3, "data= takes a list of texts, .*; not int"),
    "a list of numbers and texts": ([TEXT, 3.0], "item 1 is float"),
    "texts and batches": ([TEXT, {"input_ids": torch.ones(1, 3).long()}], "item 1 is dict"),
    "nothing": ([], "data= is empty"),
    "an empty iterator": (iter(()), "data= is empty"),
    "an empty dataset": (datasets.Dataset.from_dict({"text": []}), "no rows"),
    "too little text": ("short", "has 5 tokens; at least 16 are needed for rows of 8"),
    "too few tokens": (torch.arange(15), "has 15 tokens"),
    "an empty text": ([TEXT, " \n"], "Row 1 of the calibration texts .* is empty"),
    "an empty row of tokens": ([torch.arange(20), torch.arange(0)], "Row 1 of data= .* is empty"),
    "an empty row of a dataset": (
        datasets.Dataset.from_dict({"input_ids": [list(range(20)), []]}),
        "Row 1 of the dataset .* is empty",
    ),
    "an empty text of a dataset": (datasets.Dataset.from_dict({"text": [TEXT, ""]}), "Row 1 .* is empty"),
    "rows without tokens": (torch.zeros(4, 0).long(), "this one is empty"),
    "an empty batch": ([{"input_ids": torch.zeros(0, 3).long()}], r"Batch 0 .* is empty: input_ids .* \(0, 3\)"),
    "a token outside": (torch.tensor([[1, 2], [127, 128]]), "Token 128 in batch 0 .* knows 0 to 127"),
    "a negative token": ([torch.ones(1, 2).long(), torch.tensor([[1, -100]])], "Token -100 in batch 1"),
    "a letter outside": ([TEXT + "é" * 200], "Token 233 .* not this model's tokenizer"),
    "tokens with fractions": (torch.randn(4, 5), "tokens are integers, not torch.float32"),
    "a vector of fractions": (torch.randn(50), r"this one is torch.float32 of shape \(50,\)"),
    "an argument too many": ([{"input_ids": torch.ones(1, 3).long(), "odd": 1}], "has odd, which Reader.forward"),
    "no tensors": ([{"input_ids": [[1, 2], [3]]}], r"holds no tensor \(input_ids: list\); return_tensors='pt'"),
    "tuples without tensors": ([("a", 3)], r"Batch 0 of data= has \(str, int\); forward takes tensors for input_ids"),
    "a row without the field": ([{"text": TEXT}, {"text": None}], "Row 1 of data=: the field 'text' is NoneType"),
    "a dataset without a column": (
        datasets.Dataset.from_dict({"content": [TEXT]}),
        r"columns content: neither 'text' nor .* \(input_ids\)",
    ),
    "several datasets": (
        datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": [TEXT]})),
        r"choose one, such as data\['train'\]",
    ),
    "a loader that breaks": (broken(), "data= failed after 1 items: OSError: the disk is gone"),
    "a missing file": (Path("missing.txt"), "There is no file missing.txt"),
    "a missing file as a str": (["missing.jsonl"], "There is no file missing.jsonl"),
    "another kind of file": (Path("notes.md"), "are read from .txt and .jsonl files"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused(name: str) -> None:
    data, message = REFUSED[name]
    with pytest.raises(GraphPruneError, match=message):
        rows(data)


def test_texts_need_a_tokenizer_that_is_one() -> None:
    with pytest.raises(GraphPruneError, match="pass tokenizer="):
        rows(TEXT, tokenizer=None)
    for wrong in (object(), lambda text, **_: [1, 2], lambda text: {"input_ids": [1]}):
        with pytest.raises(GraphPruneError, match="tokenizer= turns a text into"):
            rows(TEXT, tokenizer=wrong)


def test_columns_that_are_no_tensors() -> None:
    with pytest.raises(GraphPruneError, match="Row 0 of the dataset: x is str, which is no tensor"):
        batches(datasets.Dataset.from_dict({"x": ["a"]}), toy)


def test_placeholders_beyond_the_vocabulary_are_no_tokens() -> None:
    model = llama()
    model.config.image_token_id = LETTERS + 5
    with pytest.raises(GraphPruneError, match=f"Token {LETTERS} "):
        calibration_batches(analyse(model, data=torch.tensor([[LETTERS]])))
    batch = torch.tensor([[3, LETTERS + 5]])
    assert torch.equal(calibration_batches(analyse(model, data=batch))[0]["input_ids"], batch)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "fine"}', "", '{"texts": "x", "source": "y"}'], "row 3 has no field 'text'; it has: texts, source"),
        (['{"text": "fine"}', '{"text": 3}'], "row 2: the field 'text' is int, not text"),
        (['{"text": "fine"}', "{text"], "row 2 is no JSON"),
        (["[1]"], "row 1 is no object"),
    ],
)
def test_the_wrong_row_of_a_file_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(GraphPruneError, match=message):
        read_texts([write(tmp_path / "a.jsonl", *lines)])


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(GraphPruneError, match="cannot be read as text"):
        read_texts([tmp_path / "a.txt"])
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(GraphPruneError, match="cannot be read"):
        read_texts([tmp_path / "b.txt"])


def test_separators_inside_a_row_are_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\u2028row"}\n', encoding="utf-8")
    assert read_texts([path]) == ["one\u2028row"]
