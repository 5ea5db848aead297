"""Random bytes and values in each format: every row becomes a document or has a reason, however the file is cut."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.data import plan
from collector.data.formats import REASONS
from collector.data.sources import BadRow, Document
from tests.helpers.documents import HUGE, config, read

if TYPE_CHECKING:
    from pathlib import Path

pieces = st.lists(
    st.one_of(
        st.binary(max_size=6),
        st.sampled_from([b'{"text": "', b'", "label": "', b'"}', b"\n", b"\r\n", b'"', b",", b"\t", b"\0", b"[", b"{",
                         b"\\ud800", b"\xed\xa0\x80", b"1e999", b"NaN", b"null"]),
        st.just(json.dumps({"text": "some text", "label": "x"}).encode()),
    ),
    max_size=25,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("random")


@settings(deadline=None, max_examples=200)
@given(pieces)
def test_random_bytes_become_rows_that_do_not_depend_on_the_cut(folder: Path, pieces: list[bytes]) -> None:
    for kind in ("jsonl", "csv", "tsv", "txt"):
        # Another encoding is refused; see above.
        body = b"text\tlabel\n" if kind == "tsv" else b"text,label\n" if kind == "csv" else b"x"
        (folder / f"a.{kind}").write_bytes(body + b"".join(pieces) + b"x")
        whole = read(folder / f"a.{kind}", docs_per_shard=HUGE)
        for row in whole:
            if isinstance(row, BadRow):
                assert row.reason in REASONS
            else:
                row.text.encode(), row.label.encode(), row.id.encode()
        if kind in ("jsonl", "txt"):
            assert len(whole) == (folder / f"a.{kind}").read_bytes().count(b"\n") + 1
        numbers = [row.row for row in whole if isinstance(row, BadRow)]
        ids = [row.id for row in whole if isinstance(row, Document)]
        assert len(set(numbers)) + len(ids) == len(whole)
        for every in (1, 2, 5):
            assert read(folder / f"a.{kind}", docs_per_shard=every) == whole


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200), st.sampled_from(["gz", "zst"]), st.sampled_from(["jsonl", "csv", "txt"]))
def test_random_bytes_for_a_compressed_file_fail_in_their_own_shard(
    folder: Path, body: bytes, ending: str, kind: str
) -> None:
    path = folder / f"a.{kind}.{ending}"
    path.write_bytes(b"\x01\xff" + body)  # neither compressed nor text
    settings = config(path)
    (shard,) = plan.make_plan(settings).shards
    with pytest.raises(ValueError, match="is damaged"):
        list(plan.read_shard(shard, settings.data))


VALUES = {
    pa.string(): st.text(max_size=4), pa.large_string(): st.text(max_size=4),
    pa.int64(): st.integers(-(2**63), 2**63 - 1), pa.float64(): st.floats(), pa.bool_(): st.booleans(),
    pa.binary(): st.binary(max_size=4),
    pa.list_(pa.string()): st.lists(st.text(max_size=2), max_size=2), pa.date32(): st.integers(-(2**31), 2**31 - 1),
    pa.timestamp("us"): st.integers(-(2**63), 2**63 - 1), pa.time64("us"): st.integers(0, 86_399_999_999),
    pa.struct([("a", pa.int32())]): st.fixed_dictionaries({"a": st.integers(0, 9)}),
    pa.map_(pa.string(), pa.int32()): st.lists(st.tuples(st.text(max_size=2), st.integers(0, 9)), max_size=2),
    pa.dictionary(pa.int32(), pa.string()): st.text(max_size=4),
}  # fmt: skip


@st.composite
def columns(draw: st.DrawFn, rows: int) -> pa.Array:
    kind = draw(st.sampled_from(list(VALUES)))
    values = draw(st.lists(st.none() | VALUES[kind], min_size=rows, max_size=rows))
    if pa.types.is_binary(kind) and draw(st.booleans()):  # bytes that claim to be text
        return pa.Array.from_buffers(pa.string(), rows, pa.array(values, kind).buffers())
    if pa.types.is_temporal(kind):
        return pa.array(values, pa.int32() if kind == pa.date32() else pa.int64()).cast(kind)
    return pa.array(values, kind)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(1, 9))
def test_random_parquet_columns(folder: Path, data: st.DataObject, rows: int) -> None:
    table = {name: data.draw(columns(rows), name) for name in ("text", "label", "id", "parallel_id", "source")}
    pq.write_table(pa.table(table), folder / "a.parquet", row_group_size=4)
    whole = read(folder / "a.parquet", docs_per_shard=HUGE)
    assert len(whole) == rows
    for place, row in enumerate(whole):
        if isinstance(row, BadRow):
            assert (row.row, row.reason in REASONS) == (place, True)
        else:
            assert row.text == table["text"][place].as_py()
            row.text.encode(), row.label.encode(), row.id.encode()
    for every in (1, 3):
        assert read(folder / "a.parquet", docs_per_shard=every) == whole
