"""A plan of some documents of another plan: it reads exactly their rows, in their order."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.config import RunConfig
from collector.data import plan
from tests.helpers.documents import config

ROWS = [23, 0, 9, 14]
"""Rows of each file."""


def write(folder: Path, kind: str) -> RunConfig:
    """Four files; every fifth row has no text."""
    for number, count in enumerate(ROWS):
        rows = [{"text": "" if row % 5 == 4 else f"text {number} {row}", "label": "x"} for row in range(count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path = folder / f"{number}.{kind}"
        if kind == "jsonl":
            path.write_text(lines)
        elif kind == "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        else:
            columns = pa.schema([("text", pa.string()), ("label", pa.string())])
            pq.write_table(pa.Table.from_pylist(rows, schema=columns), path)
    return config(folder, docs_per_shard=4)


@pytest.fixture(scope="module", params=["jsonl", "jsonl.gz", "parquet"])
def made(request, tmp_path_factory):
    of = write(tmp_path_factory.mktemp("narrowing"), request.param)
    return plan.make_plan(of), of


def read(narrow, of) -> list:
    return [row for shard in narrow.shards for row in plan.read_shard(shard, of.data)]


@given(chosen=st.lists(st.booleans(), min_size=46, max_size=46), every=st.integers(1, 9))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_it_reads_exactly_the_chosen_rows(made, chosen, every) -> None:
    whole, of = made
    everything = [
        (shard, row) for shard in whole.shards for row in range(shard.first_row, shard.first_row + shard.rows)
    ]
    taken = [pair for pair, keeps in zip(everything, chosen, strict=True) if keeps]
    rows: dict[int, list[int]] = {}
    for shard, row in taken:
        rows.setdefault(shard.shard, []).append(row)
    if not taken:
        with pytest.raises(ValueError, match="no document is selected"):
            plan.narrow(whole, whole.config, every, rows)
        return
    narrow = plan.narrow(whole, whole.config, every, rows)
    by_place = dict(zip([(shard.source, row) for shard, row in everything], read(whole, of), strict=True))
    assert read(narrow, of) == [by_place[shard.source, row] for shard, row in taken]
    assert [shard.shard for shard in narrow.shards] == list(range(len(narrow.shards)))
    assert max(shard.planned for shard in narrow.shards) <= every
    assert sum(shard.planned == every for shard in narrow.shards) >= len(narrow.shards) - len(ROWS), "full ones"
    assert narrow.sources == whole.sources


@pytest.mark.parametrize("every", [1, 3, 4, 100])
def test_all_rows_may_come_in_smaller_shards(made, every) -> None:
    whole, of = made
    same = plan.narrow(whole, whole.config, every)
    assert read(same, of) == read(whole, of)
    assert max(shard.planned for shard in same.shards) == min(every, 4)
    if every >= 4:
        assert same.shards == whole.shards


def test_settings_and_rows_are_in_the_hash(made) -> None:
    whole, _ = made
    hashes = {
        plan.narrow(whole, settings, 4, rows).hash
        for settings in (whole.config, {**whole.config, "arms": ["x"]})
        for rows in (None, {0: [1]}, {0: [2]})
    }
    assert len(hashes) == 6
