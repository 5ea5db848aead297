"""The manifest is the commit records, exactly, and is read in their place only when it is surely the right one."""

from __future__ import annotations

import dataclasses
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.store import manifest
from collector.store.run_directory import (
    MANIFEST,
    SUCCESS,
    Commit,
    DamagedRecordError,
    LocalStore,
    Part,
    RunDirectory,
    Skipped,
)
from tests.helpers.runs import attempt

NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
COUNTS = st.integers(0, 2**62)
PARTS = st.builds(Part, path=NAMES, rows=COUNTS, bytes=COUNTS, sha256=NAMES)
SKIPPED = st.builds(Skipped, count=COUNTS, examples=st.lists(NAMES, max_size=3).map(tuple))
COMMITS = st.builds(
    Commit,
    shard=st.integers(0, 2**31), attempt=NAMES, plan_hash=NAMES, node=NAMES,
    files=st.dictionaries(NAMES, PARTS, max_size=4), skipped=st.dictionaries(NAMES, SKIPPED, max_size=3),
    seconds=st.dictionaries(NAMES, st.floats(allow_nan=False), max_size=4),
    **dict.fromkeys(
        ("documents", "tokens", "rows", "characters", "truncated", "batches", "padded_tokens", "halved"), COUNTS
    ),
)  # fmt: skip


@given(st.lists(COMMITS, max_size=5))
@settings(deadline=None, max_examples=50)
def test_the_round_trip_is_exact(commits):
    decoded = list(manifest.decode(manifest.encode(commits)))
    assert decoded == commits
    assert [each.to_json() for each in decoded] == [each.to_json() for each in commits], "order and digits too"


def test_every_field_of_a_record_has_a_column():
    assert manifest.SCHEMA.names == [field.name for field in dataclasses.fields(Commit)]


def test_the_same_records_give_the_same_bytes(tmp_path):
    run = RunDirectory(tmp_path / "run")
    commits = [attempt(run, shard, "a") for shard in range(3)]
    assert manifest.encode(commits) == manifest.encode(commits)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no parquet at all"])
def test_what_is_no_manifest_is_an_error(data):
    with pytest.raises(DamagedRecordError, match=r"_MANIFEST\.parquet cannot be read"):
        list(manifest.decode(data))


def test_a_table_of_other_columns_is_an_error(tmp_path):
    pq.write_table(pa.table({"shard": [1], "files": [[]]}), tmp_path / "other")
    with pytest.raises(DamagedRecordError, match="KeyError"):
        list(manifest.decode((tmp_path / "other").read_bytes()))


# ---- complete runs ----


class CountingStore(LocalStore):
    """Remembers which files are read."""

    def __init__(self, root) -> None:
        super().__init__(root)
        self.reads: list[str] = []

    def read(self, name: str) -> bytes:
        self.reads.append(name)
        return super().read(name)


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """Complete, of 40 shards."""
    run = RunDirectory(tmp_path / "run", store=CountingStore(tmp_path / "run"))
    for shard in range(40):
        run.commit(dataclasses.replace(attempt(run, shard, "a"), seconds={"forward": math.pi * shard}))
    run.finish("p", 40)
    run.store.reads.clear()
    return run


def test_a_complete_run_is_read_from_one_file(run):
    found = list(run.commits())
    assert sorted(run.store.reads) == [MANIFEST, SUCCESS]
    assert found == list(run.records())
    assert [each.shard for each in found] == list(range(40))


def test_success_holds_the_hash_of_the_manifest(run, tmp_path):
    from collector.store.run_directory import sha256_of

    mark = json.loads(run.store.read(SUCCESS))
    assert mark == {"plan_hash": "p", "shards": 40, "manifest": sha256_of(tmp_path / "run" / MANIFEST)}


@pytest.mark.parametrize(
    "damage",
    [
        lambda store: store.put(MANIFEST, store.read(MANIFEST)[:-1]),
        lambda store: store.put(MANIFEST, b""),
        lambda store: store.delete(MANIFEST),
        lambda store: store.delete(SUCCESS),
        lambda store: store.put(SUCCESS, b"{}"),
        lambda store: store.put(SUCCESS, b"[]"),
        lambda store: store.put(SUCCESS, b'{"manifest": "0'),
        lambda store: store.put(SUCCESS, b'{"manifest": 3}'),
    ],
)
def test_a_manifest_that_success_does_not_vouch_for_is_not_read(run, damage):
    expected = list(run.commits())
    damage(run.store)
    run.store.reads.clear()
    assert list(run.commits()) == expected
    assert len([name for name in run.store.reads if name.startswith("commits/")]) == 40
    run.finish("p", 40)
    run.store.reads.clear()
    assert list(run.commits()) == expected
    assert sorted(run.store.reads) == [MANIFEST, SUCCESS], "and the next driver to finish puts it right"


def test_several_drivers_finish_as_one(run):
    before = run.store.read(SUCCESS), run.store.read(MANIFEST)
    run.finish("p", 40)
    assert (run.store.read(SUCCESS), run.store.read(MANIFEST)) == before


def test_a_run_that_lacks_a_shard_cannot_be_finished(run):
    run.reopen()
    run.set_aside(7)
    with pytest.raises(ValueError, match="holds 39 of 40 commit records"):
        run.finish("p", 40)
    assert run.read_or_none(SUCCESS) is None


def test_a_manifest_from_before_a_shard_was_collected_again_is_replaced(run):
    old = run.store.read(MANIFEST)
    run.reopen()
    run.set_aside(7)
    run.store.put(MANIFEST, old)
    run.commit(attempt(run, 7, "b"))
    run.finish("p", 40)
    assert [each.attempt for each in run.commits() if each.shard == 7] == ["b"]
    assert list(run.commits()) == list(run.records())
