"""What kind a file is: its name tells kinds of text, its first bytes everything else."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from collector.data import plan, sources
from tests.helpers.documents import ROWS, brief, config, read, write

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TABLE = pa.Table.from_pylist(ROWS)
EXPECTED = [(row["text"], row["label"]) for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write_file(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


def write_stream(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


def kinds(*specs: object) -> list[str]:
    return [source.kind for source in sources.resolve(config(*specs).data)]


# -- Arrow and Parquet -------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, 7, 1000])
@pytest.mark.parametrize("name", ["rows.arrow", "rows.ipc", "rows.feather", "rows.bin", "rows"])
@pytest.mark.parametrize("writer", [write_file, write_stream, pyarrow.feather.write_feather])
def test_arrow_files_and_streams_by_any_name(tmp_path: Path, writer, name: str, every: int) -> None:
    if writer is pyarrow.feather.write_feather:
        writer(TABLE, str(tmp_path / name), chunksize=5)
    else:
        writer(tmp_path / name, TABLE)
    found = read(tmp_path / name, docs_per_shard=every)
    assert brief(found) == EXPECTED
    assert [row.id for row in found] == [row["id"] for row in ROWS]


def test_arrow_files_that_datasets_keeps_in_its_cache(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    cached = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    cached.map(lambda row: row, cache_file_name=str(tmp_path / "cache.arrow"))
    assert brief(read(tmp_path / "cache.arrow")) == [("a", "pos"), ("b", "neg")]


def test_arrow_columns_are_checked_while_planning_and_nested_ones_found(tmp_path: Path) -> None:
    write_stream(tmp_path / "a.arrow", pa.Table.from_pylist([{"text": "a", "meta": {"lang": "ko"}}]))
    with pytest.raises(ValueError, match=r"no column 'label'; it has text, meta, meta\.lang"):
        plan.make_plan(config(tmp_path / "a.arrow"))
    assert brief(read(tmp_path / "a.arrow", label_column="meta.lang")) == [("a", "ko")]


def test_a_selection_of_arrow_rows(tmp_path: Path) -> None:
    write_file(tmp_path / "a.arrow", TABLE)
    found = read(tmp_path / "a.arrow", per_label=2, docs_per_shard=4)
    assert [row.text for row in found] == [row["text"] for row in ROWS[:6]]


@pytest.mark.parametrize("name", ["rows.parq", "rows.pq", "rows.dat", "rows.txt", "rows"])
def test_parquet_by_any_name(tmp_path: Path, name: str) -> None:
    pq.write_table(TABLE, tmp_path / name)
    assert brief(read(tmp_path / name)) == EXPECTED


def test_a_broken_arrow_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(b"ARROW1\0\0 and nothing else")
    with pytest.raises(ValueError, match=r"a\.arrow cannot be read as Arrow"):
        read(tmp_path / "a.arrow")


# -- compressions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.gzip", "a.jsonl.zst", "a.jsonl.zstd"])
@pytest.mark.parametrize("pack", [gzip.compress, zstd.compress, bytes])
def test_what_is_compressed_and_how_is_seen_whatever_the_name(tmp_path: Path, name: str, pack) -> None:
    (tmp_path / name).write_bytes(pack(LINES))
    assert brief(read(tmp_path / name, docs_per_shard=4)) == EXPECTED


def test_columns_inside_of_a_compression_are_refused(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet")
    (tmp_path / "b").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(
        ValueError, match="parquet files compress their own columns and are read by range: decompress it"
    ):
        read(tmp_path / "b")


# -- what is refused ---------------------------------------------------------------------------------

REFUSED = {
    "a.xlsx": (b"PK\x03\x04\x14\0\0\0", "is a zip archive"),
    "a.dat": (b"BZh91AY&SY\xff\xff", "compressed with bzip2"),
    "b.jsonl": (b"\xfd7zXZ\0\0\x04", "compressed with xz"),
    "c.txt": (b"\x04\x22\x4d\x18\x64\0", "compressed with lz4"),
    "d.txt": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "is a PDF document"),
    "e": (b"SQLite format 3\0\x10", "an SQLite database"),
    "f.npy": (b"\x93NUMPY\x01\0", "is a NumPy array"), "g.pkl": (b"\x80\x04\x95\0\0", "is a pickle"),
    "h.h5": (b"\x89HDF\r\n\x1a\n\0", "is an HDF5 file"), "i.avro": (b"Obj\x01\0", "is an Avro file"),
    "j": (b"\0" * 257 + b"ustar\0", "is a tar archive"),
    "k.bin": (b"abc\0\x01\x02def", "is binary, and neither Parquet"),
    "l.safetensors": ((64).to_bytes(8, "little") + b'{"a": 1}', "is binary, and neither"),
    "m.jsonl": (LINES.decode().encode("utf-16-le"), "is UTF-16 without a byte order mark: .*iconv -f UTF-16LE"),
    "n.csv": (b"text,label\n".decode().encode("utf-16-be") * 9, "is UTF-16 without .*iconv -f UTF-16BE"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_binaries_and_encodings_are_refused_by_their_name(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_texts_that_begin_like_a_binary_are_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("%PDF is a format\nOrca\nORC too\nBZh\nPK\n", encoding="utf-8")
    assert len(read(tmp_path / "a.txt")) == 5


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a pipe or device, which can be read only once"):
        read(tmp_path / "pipe")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match=r"link\.jsonl"):
        read(tmp_path / "link.jsonl")


def test_links_to_files_are_files(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a1").write_bytes(LINES)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "rows.jsonl").symlink_to("../blobs/a1")
    for spec in (tmp_path / "snapshot" / "rows.jsonl", tmp_path / "snapshot" / "*.jsonl"):
        assert brief(read(spec)) == EXPECTED


# -- folders and globs -------------------------------------------------------------------------------


def test_a_folder_of_one_kind_is_read_whole(tmp_path: Path) -> None:
    for place in ("b/lang=ko", "a"):
        (tmp_path / place).mkdir(parents=True)
        write(tmp_path / place, "jsonl")
    for beside in ("README.md", "LICENSE", "_SUCCESS", ".hidden", "a/rows.jsonl.crc", "dataset_infos.json"):
        (tmp_path / beside).write_text("not data", encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(LINES))
    found = read(tmp_path)
    assert [row.source for row in found[::23]] == ["a/rows.jsonl", "b/lang=ko/rows.jsonl", "c.jsonl.gz"]
    assert len(found) == 3 * len(ROWS)


def test_a_folder_of_several_kinds_is_refused_with_what_to_choose(tmp_path: Path) -> None:
    write(tmp_path, "jsonl")
    write(tmp_path, "csv")
    with pytest.raises(
        ValueError, match=r"\(1 \.csv, 1 \.jsonl\): choose one with a glob, such as '.*/\*\*/\*\.csv' or"
    ):
        read(tmp_path)


@pytest.mark.parametrize("folder", ["[2024] texts", "what?", "a*b", "{x}", "sp ace", "100%"])
def test_what_exists_by_a_name_with_wildcards_is_meant(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    write(tmp_path / folder, "jsonl")
    for spec in (tmp_path / folder, tmp_path / folder / "rows.jsonl", tmp_path / folder / "*.jsonl"):
        assert brief(read(spec)) == EXPECTED
    (tmp_path / "rows[1].jsonl").write_bytes(LINES)
    assert brief(read(tmp_path / "rows[1].jsonl")) == EXPECTED


# -- data cards --------------------------------------------------------------------------------------


def with_card(folder: Path, card: str) -> str:
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{card}\n---\n", encoding="utf-8")
    return f"hf:{folder}"


def test_a_data_card_says_how_columns_are_separated(tmp_path: Path) -> None:
    spec = with_card(tmp_path / "d", 'configs:\n- config_name: default\n  data_files: "*.csv"\n  sep: ";"')
    (tmp_path / "d" / "a.csv").write_text('text;label\n"a; b";x\nc, d;y\n', encoding="utf-8")
    assert brief(read(spec)) == [("a; b", "x"), ("c, d", "y")]
    assert datasets.load_dataset(str(tmp_path / "d"), split="train").to_list() == [
        {"text": "a; b", "label": "x"}, {"text": "c, d", "label": "y"},
    ]  # fmt: skip


def test_a_data_card_says_in_which_field_the_rows_are(tmp_path: Path) -> None:
    spec = with_card(tmp_path / "d", 'configs:\n- config_name: default\n  data_files: "*.json"\n  field: rows')
    content = {"other": [{"x": 1}], "rows": [{"text": "a", "label": "x"}]}
    (tmp_path / "d" / "a.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    assert brief(read(spec)) == [("a", "x")]


def test_a_data_card_names_classes(tmp_path: Path) -> None:
    card = ("configs:\n- config_name: default\n  data_files: '*.csv'\n"
            "dataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype:\n"
            "      class_label:\n        names:\n          '0': neg\n          '1': pos")  # fmt: skip
    spec = with_card(tmp_path / "d", card)
    (tmp_path / "d" / "a.csv").write_text("text,label\na,1\nb,0\n", encoding="utf-8")
    assert brief(read(spec)) == [("a", "pos"), ("b", "neg")]


def test_what_a_data_card_asks_for_and_is_not_known_is_refused(tmp_path: Path) -> None:
    card = 'configs:\n- config_name: default\n  data_files: "*.csv"\n  skiprows: 2\n  quotechar: "|"'
    spec = with_card(tmp_path / "d", card)
    (tmp_path / "d" / "a.csv").write_text("text,label\na,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"reads the files with quotechar: \|, skiprows: 2, which is not known here"):
        read(spec)


def test_kinds_by_name(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.ndjson", "c.csv", "d.tsv", "e.txt", "f", "g.log"):
        (tmp_path / name).write_bytes(b"text,label\n")
    assert kinds(tmp_path / "*") == ["jsonl", "jsonl", "csv", "tsv", "txt", "txt", "txt"]
    np.save(tmp_path / "h.npy", np.ones(3))
    with pytest.raises(ValueError, match="NumPy array"):
        kinds(tmp_path / "*")
