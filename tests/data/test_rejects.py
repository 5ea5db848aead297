"""Rows that become no document: each is named in a file of its own, without a word of its text."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collector.config import DataConfig, ModelConfig
from collector.data.formats import REASONS
from collector.store import tables
from tests.helpers.runs import collect_here, run_config

SECRET = "confidential"
GOOD = json.dumps({"text": f"a {SECRET} sentence", "label": "en"})
LINES = [
    GOOD,
    json.dumps({"text": "  ", "label": SECRET}),
    f'{{"text": "{SECRET}',
    GOOD,
    # the second shard has no bad row
    GOOD,
    GOOD,
    GOOD,
    GOOD,
    # the third has nothing else
    json.dumps({"text": [SECRET], "label": "en"}),
    json.dumps([SECRET]),
    json.dumps({"label": SECRET}),
    f"{SECRET}",
]
BAD = [
    (0, 1, "empty text"),
    (0, 2, "invalid JSON"),
    (2, 8, "text is not a string"),
    (2, 9, "not an object"),
    (2, 10, "no text"),
    (2, 11, "invalid JSON"),
]


@pytest.fixture
def run(tmp_path, tiny_folder, tiny_model):
    """Three shards of four rows."""
    (tmp_path / "rows.jsonl").write_text("\n".join(LINES) + "\n")
    data = DataConfig(data=(str(tmp_path / "rows.jsonl"),), docs_per_shard=4)
    return collect_here(tmp_path / "run", run_config(data, ModelConfig(model=str(tiny_folder))), loaded=tiny_model)


def rejects(run) -> dict[int, pa.Table]:
    """Shard -> its rejects file, as it lies on the disk."""
    return {
        commit.shard: pq.read_table(run.store.location(commit.files["rejects"].path))
        for commit in run.commits()
        if "rejects" in commit.files
    }


def test_every_bad_row_is_named_with_its_place_in_the_source_and_its_reason(run):
    rows = [row for table in rejects(run).values() for row in table.to_pylist()]
    assert rows == [
        {"shard": shard, "source": "rows.jsonl", "row": row, "reason": reason} for shard, row, reason in BAD
    ]
    assert {reason for _, _, reason in BAD} <= set(REASONS)


def test_a_shard_without_bad_rows_has_no_such_file(run):
    assert list(rejects(run)) == [0, 2]
    assert len(list(Path(run.root).rglob("*.rejects.parquet"))) == 2


def test_the_commit_record_names_the_file_and_still_counts_by_reason(run):
    for commit, table in zip([c for c in run.commits() if c.skipped], rejects(run).values(), strict=True):
        part = commit.files["rejects"]
        assert part.path == f"rejects/{commit.shard:06d}-{commit.attempt}.rejects.parquet"
        assert part.rows == table.num_rows == sum(skipped.count for skipped in commit.skipped.values())
        for reason, skipped in commit.skipped.items():
            assert table["reason"].to_pylist().count(reason) == skipped.count
    assert [len(commit.skipped) for commit in run.commits()] == [2, 0, 4]


def test_the_file_holds_no_text(run):
    """Uncompressed, for compression would hide it."""
    for table in rejects(run).values():
        assert table.schema.equals(tables.REJECTS_SCHEMA)
        assert SECRET.encode() not in table.to_pandas().to_csv().encode()
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="none", use_dictionary=False)
        assert b"rows.jsonl" in sink.getvalue().to_pybytes()
        assert SECRET.encode() not in sink.getvalue().to_pybytes()
