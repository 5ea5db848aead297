"""Every format against an independent reader, on real files: nothing lost, nothing twice, columns found."""

from __future__ import annotations

import csv
import json
import random
from typing import TYPE_CHECKING

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collector.data.formats import REASONS, lines
from collector.data.sources import BadRow, Document
from tests.helpers.documents import BAD_JSON, HUGE, ROWS, brief, expected_of, read, write

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("every", [1, 3, HUGE])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_every_row_once_and_in_order(tmp_path: Path, kind: str, every: int) -> None:
    got = read(write(tmp_path, kind), docs_per_shard=every)
    assert [{"text": row.text, "label": row.label, "id": row.id} for row in got] == ROWS
    assert {row.source for row in got} == {f"rows.{kind}"}


@pytest.mark.parametrize("every", [1, 3, HUGE])
def test_plain_text_takes_its_label_from_the_file(tmp_path: Path, every: int) -> None:
    (tmp_path / "deu_Latn.dev.txt").write_bytes("eins\r\nzwei é\n\nvier".encode())
    (tmp_path / "eng_Latn.devtest").write_text("one\n", encoding="utf-8")
    got = read(tmp_path / "*", docs_per_shard=every)
    expected = [("eins", "deu_Latn"), ("zwei é", "deu_Latn"), "empty text", ("vier", "deu_Latn"), ("one", "eng_Latn")]
    assert brief(got) == expected
    assert [row.id for row in got if isinstance(row, Document)] == [
        *(f"deu_Latn.dev.txt#{row}" for row in (0, 1, 3)), "eng_Latn.devtest#0"
    ]  # fmt: skip
    assert got[2] == BadRow(source="deu_Latn.dev.txt", row=2, reason="empty text")
    assert got[2].where == "deu_Latn.dev.txt#2"


# -- bytes and blocks --------------------------------------------------------------------------------


def test_line_ends_at_the_edges_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_SCAN_BLOCK", 7)
    texts = ["ü" * n for n in random.Random(1).choices(range(1, 30), k=60)]
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    for every in (1, 4):
        assert [row.text for row in read(tmp_path / "a.txt", docs_per_shard=every)] == texts


def test_lines_longer_than_a_block(tmp_path: Path) -> None:
    texts = ["short", "é" * (3 << 20), "", "x" * (5 << 20), "end"]
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    for every in (1, 2):
        assert brief(read(tmp_path / "a.txt", docs_per_shard=every)) == [expected_of(text, "a") for text in texts]


def test_a_csv_field_longer_than_pythons_limit(tmp_path: Path) -> None:
    (tmp_path / "book.csv").write_text('text,label\n"' + "word, " * 100_000 + '",eng\nshort,eng\n', encoding="utf-8")
    assert [len(row.text) for row in read(tmp_path / "book.csv", docs_per_shard=1)] == [600_000, 5]


def test_a_csv_quote_that_never_closes_is_reported(tmp_path: Path) -> None:
    (tmp_path / "open.csv").write_text('text,label\nfine,eng\n"open,eng\nnext,eng\n', encoding="utf-8")
    assert brief(read(tmp_path / "open.csv")) == [("fine", "eng"), "invalid CSV"]


def test_csv_as_the_csv_module_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    path.write_bytes(b'label,text\r\nx,"a ""b"", c"\r\nx,"line\r\nline"\r\nx, spaced \r\nx,"a"b\r\nx,5" disk\r\n')
    with path.open(newline="", encoding="utf-8") as file:
        expected = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    for every in (1, 2, HUGE):
        assert brief(read(path, docs_per_shard=every)) == expected


def test_reasons_are_a_closed_set_and_hold_no_text(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(BAD_JSON) + b'\n{"text": 1, "secret": 2}\n')
    bad = read(tmp_path / "bad.jsonl")
    assert all(isinstance(row, BadRow) and row.reason in REASONS for row in bad)
    assert [row.where for row in bad] == [f"bad.jsonl#{i}" for i in range(len(BAD_JSON) + 1)]


# -- columns -----------------------------------------------------------------------------------------


def test_named_columns_and_values_that_are_no_strings(tmp_path: Path) -> None:
    row = {"satz": "Text", "sprache": 7, "nr": 3, "parallel_id": 12, "source": "wiki"}
    (tmp_path / "a.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps({"satz": "ohne", "sprache": "x"}), encoding="utf-8"
    )
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    columns = {"text_column": "satz", "label_column": "sprache", "id_column": "nr"}
    full = Document(text="Text", label="7", id="3", parallel_id="12", source="wiki")
    assert read(tmp_path / "a.parquet", **columns) == [full]
    plain = Document(text="ohne", label="x", id="a.jsonl#1", parallel_id=None, source="a.jsonl")
    assert read(tmp_path / "a.jsonl", **columns) == [full, plain]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_positions_mean_that_there_is_no_header(tmp_path: Path, kind: str) -> None:
    separator = "," if kind == "csv" else "\t"
    (tmp_path / f"eng.{kind}").write_text(f"en{separator}one\nen{separator}two\n", encoding="utf-8")
    assert brief(read(tmp_path / f"eng.{kind}", text_column="1", label_column="0")) == [("one", "en"), ("two", "en")]
    assert brief(read(tmp_path / f"eng.{kind}", text_column="1", label_column="@file")) == [
        ("one", "eng"),
        ("two", "eng"),
    ]
    with pytest.raises(ValueError, match=r"no column 'label'; it has 0, 1: set --label-column, or @file"):
        read(tmp_path / f"eng.{kind}", text_column="1")


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "saved"])
def test_a_missing_column_names_those_there_are(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "saved" if kind == "saved" else tmp_path
    if kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    else:
        path = write(tmp_path, kind)
    with pytest.raises(ValueError, match=r"no column 'body'; it has text, label, id: set --text-column"):
        read(path, text_column="body")
    with pytest.raises(ValueError, match=r"no column 'lang'.*--label-column, or @file"):
        read(path, label_column="lang")
    with pytest.raises(ValueError, match=r"no column 'key'.*--id-column"):
        read(path, id_column="key")
    assert {row.label for row in read(path, label_column="@file")} == {path.name.split(".")[0]}


def test_a_column_of_token_ids_gives_texts_that_are_tokenized(tmp_path: Path) -> None:
    values = [[5, 0, 7], [2**31 - 1], [-1], [2**31], [], None, [1.5], [True]]
    pq.write_table(pa.table({"input_ids": values[:6], "label": ["en"] * 6}), tmp_path / "ids.parquet")
    rows = "".join(json.dumps({"input_ids": value, "label": "en"}) + "\n" for value in values)
    (tmp_path / "ids.jsonl").write_text(rows)
    reasons = ["token ids out of range"] * 2 + ["text is not a string", "no text"] + ["text is not a string"] * 2
    for name, count in (("ids.parquet", 6), ("ids.jsonl", 8)):
        got = read(tmp_path / name, text_column="input_ids")
        assert [row.ids for row in got if isinstance(row, Document)] == [(5, 0, 7), (2**31 - 1,)]
        assert [row.reason for row in got if isinstance(row, BadRow)] == reasons[: count - 2]
