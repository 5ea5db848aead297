"""Parquet: only the wanted row groups and columns are read, each row of a group once."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collector.data import plan, sources
from collector.data.sources import files
from tests.helpers.documents import ROWS, brief, config, count_bytes, read, write

if TYPE_CHECKING:
    from pathlib import Path

    from collector.config import RunConfig


def test_parquet_strings_that_are_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff", None], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": text, "label": ["x"] * 3}), tmp_path / "a.parquet")
    assert brief(read(tmp_path / "a.parquet")) == [("good", "x"), "invalid UTF-8", "no text"]


def test_parquet_reads_only_the_row_groups_of_a_shard(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet")
    settings = config(path, docs_per_shard=5)
    made = plan.make_plan(settings)
    chunk = pq.ParquetFile(path).metadata.row_group(2).column(0)
    content = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    now = sources.fingerprint(sources.resolve(settings.data)[0])
    for shard in (dataclasses.replace(shard, fingerprint=now) for shard in made.shards):
        if shard.first_row == 10:
            with pytest.raises((OSError, pa.ArrowException)):
                list(plan.read_shard(shard, settings.data))
        else:
            got = [row.id for row in plan.read_shard(shard, settings.data)]
            assert got == [row["id"] for row in ROWS[shard.first_row : shard.first_row + 5]]


def rows_in_groups(path: Path, rows: int, size: int) -> Path:
    """Rows that do not compress, beside a column that nobody wants."""
    random_text = random.Random(2)
    table = pa.table({
        "text": [f"{i} {random_text.randbytes(100).hex()}" for i in range(rows)],
        "label": [f"l{i % 3}" for i in range(rows)],
        "unwanted": [random_text.randbytes(1000) for _ in range(rows)],
    })  # fmt: skip
    pq.write_table(table, path, row_group_size=size)
    return path


def numbers(shard: plan.Shard, settings: RunConfig) -> list[int]:
    return [int(row.text.split()[0]) for row in plan.read_shard(shard, settings.data)]


@pytest.mark.parametrize("spec", ["{}", "hf:{}"])
def test_a_shard_reads_the_bytes_of_its_row_groups_and_columns(
    tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows_in_groups(tmp_path / "train.parquet", 10_000, 1000)
    settings = config(spec.format(tmp_path if spec.startswith("hf:") else path), docs_per_shard=1000)
    shards = plan.make_plan(settings).shards
    metadata = pq.read_metadata(path)
    wanted = [sum(metadata.row_group(g).column(c).total_compressed_size for c in range(2)) for g in range(10)]
    monkeypatch.setattr(files, "fingerprint", lambda _: shards[0].fingerprint)
    bytes_read = count_bytes(monkeypatch)
    for place in (7, 2, 9):
        bytes_read.clear()
        assert numbers(shards[place], settings) == list(range(1000 * place, 1000 * (place + 1)))
        assert wanted[place] <= sum(bytes_read) < 1.2 * wanted[place] + metadata.serialized_size + 70_000
        assert sum(bytes_read) < 0.03 * path.stat().st_size


def test_shards_in_order_decode_a_big_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rows_in_groups(tmp_path / "a.parquet", 20_000, 20_000)
    settings = config(path, docs_per_shard=100)
    shards = plan.make_plan(settings).shards
    decoded: list[int] = []
    batches = pq.ParquetFile.iter_batches

    def counted(self, *args, **kwargs):
        for batch in batches(self, *args, **kwargs):
            decoded.append(len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    assert [row for shard in shards for row in numbers(shard, settings)] == list(range(20_000))
    assert sum(decoded) == 20_000
    random.Random(1).shuffle(some := list(shards[:40]))
    assert sorted(row for shard in some for row in numbers(shard, settings)) == list(range(4000))


def test_a_selection_decodes_what_it_passes_over_once(tmp_path: Path) -> None:
    path = rows_in_groups(tmp_path / "a.parquet", 3000, 1000)
    got = read(path, per_label=700, docs_per_shard=64)
    assert [int(row.text.split()[0]) for row in got] == list(range(2100))


def test_two_readers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    settings = config(rows_in_groups(tmp_path / "a.parquet", 4000, 4000), docs_per_shard=1000)
    shards = plan.make_plan(settings).shards
    numbers(shards[0], settings)
    pairs = zip(*(plan.read_shard(shard, settings.data) for shard in shards[1:3]), strict=True)
    assert [tuple(int(row.text.split()[0]) for row in pair) for pair in pairs] == [
        (1000 + i, 2000 + i) for i in range(1000)
    ]


def test_values_that_python_cannot_hold(tmp_path: Path) -> None:
    """They spoil their own row, or are told as a number where they are a label."""
    bad = pa.Array.from_buffers(pa.string(), 3, pa.array([b"good", b"\xff", None], pa.binary()).buffers())
    later = pa.array([1, 1 << 62, None], pa.timestamp("us"))
    columns = {"dictionary": bad.dictionary_encode(), "list": pa.ListArray.from_arrays(pa.array([0, 1, 2, 3]), bad),
               "large": bad.cast(pa.large_string()), "later": later, "text": pa.array(["x"] * 3)}  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    for name in ("dictionary", "large"):
        got = brief(read(tmp_path / "a.parquet", text_column=name, label_column="@file"))
        assert got == [("good", "a"), "invalid UTF-8", "no text"]
    lists = brief(read(tmp_path / "a.parquet", text_column="list", label_column="@file"))
    assert lists == ["text is not a string"] * 3
    told = brief(read(tmp_path / "a.parquet", label_column="later"))
    assert told == [("x", "1970-01-01 00:00:00.000001"), ("x", "4611686018427387904"), "no label"]


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    text = pa.array(["x"])
    pq.write_table(pa.Table.from_arrays([text, text, text], names=["text", "label", "text"]), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,label,text\nx,y,z\n", encoding="utf-8")
    for kind in ("parquet", "csv"):
        with pytest.raises(ValueError, match="has 2 columns 'text': rename all but one"):
            read(tmp_path / f"a.{kind}")
